"""What a checkpoint costs: seconds and megabytes beside torch.save and safetensors.

    python benchmarks/checkpoints.py      writes benchmarks/results/checkpoints.json
"""
import hashlib
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from unittest import mock

import safetensors.torch
import torch

from gptbook import atomic_files as af
from gptbook import checkpoints as ck
from gptbook.core import GPTConfig, GPTModel
from results_file import record

SIZES = {  # name -> (vocab_size, context_length, emb_dim, n_layers, n_heads)
    "0.3M": (1024, 128, 64, 4, 4), "3.5M": (4096, 128, 192, 6, 6),
    "24M": (16384, 256, 384, 10, 6), "124M": (50257, 1024, 768, 12, 12),
}


def median_of(calls: dict, repeats: int) -> dict:
    """Median seconds of each call, taken in turn so that neighbours disturb all alike."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
    return {name: round(statistics.median(t), 5) for name, t in times.items()}


def synced(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def measure(sizes: tuple, folder: Path, repeats: int) -> dict:
    """Seconds to save and load one model in each way."""
    torch.manual_seed(0)
    config = GPTConfig(*sizes)
    model = GPTModel(config)
    ours, pt, theirs = (folder / name for name in ("a.safetensors", "b.pt", "c.safetensors"))
    state = {k: v for k, v in model.state_dict().items() if k != "head.weight"}

    def save_unsynced():
        skip = lambda call, *args: None if call is os.fsync else call(*args)
        with mock.patch.object(af, "_disk", skip):
            ck.save_model(ours, model)

    def load_pt():
        fresh = GPTModel(config)
        fresh.load_state_dict(torch.load(pt, weights_only=True))

    def load_theirs():
        fresh = GPTModel(config)
        fresh.load_state_dict(safetensors.torch.load_file(theirs), strict=False)

    seconds = median_of({
        "save": lambda: ck.save_model(ours, model), "save, no fsync": save_unsynced,
        "torch.save": lambda: torch.save(model.state_dict(), pt),
        "torch.save, fsync": lambda: (torch.save(model.state_dict(), pt), synced(pt)),
        "safetensors save_file": lambda: safetensors.torch.save_file(state, theirs),
    }, repeats)
    raw = ours.read_bytes()
    seconds |= median_of({
        "load": lambda: ck.load_model(ours), "torch.load": load_pt,
        "safetensors load_file": load_theirs,
        "sha256": lambda: hashlib.sha256(raw).hexdigest(),
    }, repeats)
    return dict(parameters=sum(p.numel() for p in model.parameters()), seconds=seconds,
                megabytes={"save": round(ours.stat().st_size / 1e6, 3),
                           "torch.save": round(pt.stat().st_size / 1e6, 3)})


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {name: measure(size, Path(folder), 9 if name != "124M" else 5)
                 for name, size in SIZES.items()}
    for name, row in sizes.items():
        print(name, row["megabytes"], row["seconds"])
    record("checkpoints", {"sizes": sizes})


if __name__ == "__main__":
    main()
