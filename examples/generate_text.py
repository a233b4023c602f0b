"""Write a text with a checkpoint, from a script: `gptbook generate` with other defaults.

    python examples/generate_text.py --checkpoint checkpoints/best_model.pt
    python examples/generate_text.py --checkpoint checkpoints/best_model.pt \
        --prompt "Once upon a time" --length 150 --temperature 0.7 --top-k 50

Without a checkpoint, the model that travels with the package writes. All other options of
`gptbook generate` work too; `--help` lists them. A .pt file is read with weights_only=True.
"""

import sys

from gptbook.cli import main

DEFAULTS = {"--prompt": "Once upon a time", "--length": "150", "--temperature": "0.7",
            "--top-k": "50"}
INSTEAD = {"--prompt": ["--prompt-file"], "--temperature": ["--beams"], "--top-k": ["--beams"]}


def with_defaults(words: list[str]) -> list[str]:
    """The words, behind the defaults of what they leave out or rule out."""
    typed = {word.split("=", 1)[0] for word in words}
    kept = [name for name in DEFAULTS if not typed & {name, *INSTEAD.get(name, [])}]
    return [part for name in kept for part in (name, DEFAULTS[name])] + words


if __name__ == "__main__":
    sys.exit(main(["generate", *with_defaults(sys.argv[1:])]))
