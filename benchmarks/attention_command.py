"""How long does the command that looks take? 64 tokens, a model of GPT-2's shape (124M).

    python benchmarks/attention_command.py              # about two minutes on one core

A model with 12 layers of 12 heads and random weights reads 64 tokens of a text, in a process that
has drawn before: the pass with capturing; and the report, the pictures of the model and of one
layer, the view and the numbers, computed and written. Then the whole command in a process of its
own, with the start of Python and the reading of a checkpoint of half a gigabyte.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from results_file import record
from tqdm import trange

from gptbook.checkpoints import save_model
from gptbook.cli import load_checkpoint
from gptbook.cli_attention import look_at, told, write_look
from gptbook.core import GPTConfig, GPTModel, set_seed

TOKENS = 64
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "analyze_attention.py"


def case():
    """A checkpoint of GPT-2's shape, and a text of 64 tokens with the one that starts it."""
    set_seed(0)
    checkpoint = load_checkpoint(None, "cpu")
    checkpoint.model = GPTModel(GPTConfig()).eval()
    text = "The cat sat on the mat. " * 9
    while len(checkpoint.tokenizer.encode(text)) > TOKENS - 1:
        text = text[:-1]
    return checkpoint, text


def once(checkpoint, text, folder) -> tuple:
    """Seconds of reading and of all the rest, and what was written."""
    start = perf_counter()
    look = look_at(checkpoint, "m", text, None, None)
    middle = perf_counter()
    told(look, None)
    paths = write_look(look, folder, None, None)
    assert len(look.ids) == TOKENS and look.table().shape == (12, 12, TOKENS, TOKENS)
    return middle - start, perf_counter() - middle, paths


def whole(checkpoint, text, folder) -> float:
    """Seconds of the command itself, from a file."""
    path = save_model(folder / "m.safetensors", checkpoint.model, checkpoint.tokenizer)
    start = perf_counter()
    subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu", "--checkpoint", str(path), "--text",
                    text, "--out", str(folder / "whole")],
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round, not stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    checkpoint, text = case()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once(checkpoint, text, folder / "out")  # imports, fonts
        rounds = [once(checkpoint, text, folder / "out")
                  for _ in trange(1 if options.quick else options.rounds, unit="round")]
        commands = [whole(checkpoint, text, folder) for _ in range(1 if options.quick else 3)]
        sizes = {path.name: path.stat().st_size for path in rounds[-1][2]}
    both = [reading + rest for reading, rest, _ in rounds]
    figures = {
        "tokens": TOKENS, "layers": 12, "heads": 12,
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "seconds": {"median": round(median(both), 2), "slowest": round(max(both), 2)},
        "of these reading": round(median(reading for reading, *_ in rounds), 2),
        "whole command": {"median": round(median(commands), 2), "slowest": round(max(commands), 2)},
        "bytes": sizes,
        "note": f"load of the machine before it began: {load:.1f}",
    }
    print(figures)
    if not options.quick:
        print(record("attention_command", figures))


if __name__ == "__main__":
    main()
