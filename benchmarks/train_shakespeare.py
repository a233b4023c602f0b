"""Real text: 110 seconds of training on a file, then bits per byte on its last tenth.

    python benchmarks/train_shakespeare.py --data tinyshakespeare.txt

Runs `gptbook train --data FILE --minutes M` and scores its best weights on the last 10 % of
the file: every byte of it is scored once, in windows that move by half a context, so that a
token has at least half a context before it (but for the first window). The training time is
taken from the log: the sum over the steps, without tokenizer, validation and saving.
"""
import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from results_file import record

from gptbook.checkpoints import load_model
from gptbook.data import text_file


@torch.no_grad()
def bits_per_byte(model, tokenizer, text: str) -> tuple[float, int]:
    """Bits a byte of `text`, each token scored once; the number of tokens."""
    ids, context = tokenizer.encode(text), model.max_positions
    start = tokenizer.end_of_text  # something has to come before the first token
    ids, nats, scored = torch.tensor([start, *ids]), 0.0, 0
    while scored < len(ids) - 1:
        first = max(0, scored - context // 2)
        window = ids[first : first + context + 1]
        losses = F.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="none")
        nats += losses[scored - first :].sum().item()
        scored = first + len(window) - 1
    return nats / math.log(2) / len(text.encode()), scored


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=110 / 60)
    parser.add_argument("--name", default="train_shakespeare")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "run", time.perf_counter()
        call = [str(Path(sys.executable).with_name("gptbook")), "train", "--data", str(args.data)]
        subprocess.run([*call, "--minutes", str(args.minutes), "--out", str(out)], check=True)
        wall = time.perf_counter() - started
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        loaded = load_model(out / "best_model.safetensors")
        text = text_file(args.data).text("validation")
        score, tokens = bits_per_byte(loaded.model.eval(), loaded.tokenizer, text)
        figures = {
            "bits_per_byte": round(score, 4), "held_out_bytes": len(text.encode()),
            "held_out_tokens": tokens, "seconds_in_all": round(wall, 1),
            "seconds_training": round(sum(row["seconds"] for row in log), 1),
            "steps": len(log), "tokens_seen": sum(row["tokens"] for row in log),
            "bytes_per_token": round(len(text.encode()) / tokens, 3),
            "training": loaded.info,
        }
    for key, value in figures.items():
        print(f"{key}: {value}")
    print(record(args.name, figures))


if __name__ == "__main__":
    main()
