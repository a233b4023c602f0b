"""See what a checkpoint looks at, from a script: the same as `gptbook analyze-attention`.

    python examples/analyze_attention.py --checkpoint checkpoints/best_model.pt \
        --text "The cat sat on the mat. It was fluffy."
    python examples/analyze_attention.py --checkpoint checkpoints/best_model.pt \
        --layer 2 --head 0 --show-plots
    python examples/analyze_attention.py --text "The cat sat"       # untrained, to compare

The report is printed; pictures, the interactive view and all numbers go to the folder `attention`,
or to the one after --out. All options are listed by `--help`.
"""
import sys

from gptbook.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze-attention", *sys.argv[1:]]))
