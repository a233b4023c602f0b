"""Write a text with a checkpoint, from a script: the same as `gptbook generate`.

python examples/generate_text.py --checkpoint checkpoints/best_model.pt --prompt "Once upon a time"
"""

import sys

from gptbook.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
