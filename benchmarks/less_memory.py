"""What a step holds in memory, what each cure saves, and what it costs in time.

    python benchmarks/less_memory.py           # whole steps, about seven minutes on one core
    python benchmarks/less_memory.py --heads   # head and loss alone, about five minutes
    python benchmarks/less_memory.py --quick   # small shapes only, nothing stored

Ways: plain; the batch in pieces of one row; the loss without logits; blocks that compute their
activations again; both; bfloat16; all of them. Peaks are those of a fresh process for each way
(Linux), above what it held with weights and moments in place, so gradients are in them. In
each round all ways take one step, and a ratio is the median over the rounds of two times of one
round: seconds of the processor that one thread has used, so that a neighbour does not count.
Head and loss are measured by themselves, too, beside PyTorch's own chunked function.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from results_file import record
from torch import nn
from tqdm import tqdm

from gptbook.accumulation import Accumulate
from gptbook.core import GPTConfig, GPTModel, LossModel, set_seed
from gptbook.less_memory import ChunkedLoss, checkpoint_activations, head_loss, saved_bytes
from gptbook.precision import BFloat16
from gptbook.runs import TrainConfig
from gptbook.training import Precision, compute_gradients, make_optimizer

SHAPES = {  # sizes, rows, rounds of the timing
    "small": (dict(vocab_size=2048, context_length=256, emb_dim=192, n_layers=6, n_heads=6), 16, 7),
    "124M": (dict(vocab_size=50257, context_length=512, emb_dim=768, n_layers=12, n_heads=12), 2, 3),
}
PIECES, BF16 = Accumulate(rows=1), BFloat16("cpu")
WAYS = {  # loss, checkpointed, gradients, precision
    "plain": (LossModel, False, compute_gradients, Precision()),
    "pieces": (LossModel, False, PIECES, Precision()),
    "chunked": (ChunkedLoss, False, compute_gradients, Precision()),
    "checkpointed": (LossModel, True, compute_gradients, Precision()),
    "chunked, checkpointed": (ChunkedLoss, True, compute_gradients, Precision()),
    "bfloat16": (LossModel, False, compute_gradients, BF16),
    "pieces, chunked, checkpointed": (ChunkedLoss, True, PIECES, Precision()),
}
ONCE = ("bfloat16", "pieces, chunked, checkpointed")  # slow: timed in the first round alone
NARROW, WIDE = (2048, 192, 2048), (50257, 768, 1024)  # vocabulary, width, tokens of a head


def batch(shape: str) -> tuple:
    sizes, rows, _ = SHAPES[shape]
    ids = torch.randint(sizes["vocab_size"], (rows, sizes["context_length"] + 1),
                        generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


class Stepper:
    """A model with its optimiser that takes a step in any of the ways."""

    def __init__(self, shape: str, model: GPTModel | None = None):
        set_seed(0)
        self.model = model or GPTModel(GPTConfig(**SHAPES[shape][0]))
        self.batch, self.optimizer = batch(shape), make_optimizer(self.model, TrainConfig(2))
        self.classes = [type(block) for block in self.model.blocks]

    def fill(self) -> None:
        """Moments as they are after a step, without one."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.update()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, way: str) -> float:  # seconds
        loss, again, gradients, precision = WAYS[way]
        if again:
            checkpoint_activations(self.model)
        started = time.process_time()
        gradients(loss(self.model).train(), *self.batch, precision)
        self.update()
        seconds = time.process_time() - started
        for block, kind in zip(self.model.blocks, self.classes):
            block.__class__ = kind
        return seconds


def memory(key: str) -> float:  # MB
    """VmRSS is what the process holds now, VmHWM the most so far; ru_maxrss will not do, since
    a child begins with that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1]) * 1024 / 1e6


def child_step(shape: str, way: str) -> float:
    stepper = Stepper(shape)
    stepper.fill()
    start = memory("VmRSS")
    stepper.step(way)
    return memory("VmHWM") - start


def child_head(kind: str, tokens: str) -> float:
    V, C, _ = WIDE
    head, x, t = a_head(V, C, int(tokens))
    start = memory("VmRSS")
    HEADS[kind](head, x, t).backward()
    return memory("VmHWM") - start


def peak(*task) -> float:
    """The MB that a fresh process needs for a task, large tensors in pages of their own."""
    command = [sys.executable, __file__, "--child", *map(str, task)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return round(json.loads(done.stdout.splitlines()[-1]), 1)


# Head and loss -----------------------------------------------------------------------
def a_head(V: int, C: int, tokens: int, asked: float = 1.0):
    set_seed(0)
    head, x = nn.Linear(C, V, bias=False), torch.randn(tokens, C, requires_grad=True)
    t = torch.randint(V, (tokens,))
    t[torch.rand(tokens) >= asked] = -100
    return head, x, t


def torch_chunked(head, x, t):
    return F.linear_cross_entropy(x, head.weight, t, ignore_index=-100,
                                  options=nn.LinearCrossEntropyOptions())


HEADS = {
    "plain": lambda head, x, t: F.cross_entropy(head(x), t),
    "chunked": partial(head_loss, chunk=256),
    "linear_cross_entropy": torch_chunked,
}


def seconds_of(loss, head, x, t) -> float:
    head.weight.grad = x.grad = None
    started = time.process_time()
    loss(head, x, t).backward()
    return time.process_time() - started


def compare(ways: dict, rounds: int, title: str) -> dict:
    """Median over the rounds of the seconds of each way beside the first one's."""
    first, ratios = next(iter(ways)), {name: [] for name in ways}
    for name, way in ways.items():  # warm up
        way()
    for _ in tqdm(range(rounds), title):
        times = {name: way() for name, way in ways.items()}
        for name, seconds in times.items():
            ratios[name].append(seconds / times[first])
    return {name: round(median(x), 4) for name, x in ratios.items() if name != first}


def heads(quick: bool) -> tuple[dict, dict]:
    found, chunks = {}, {}
    for shape, rounds in ((NARROW, 15), *([] if quick else [(WIDE, 3)])):
        full, half = a_head(*shape), a_head(*shape, asked=0.5)
        ways = {name: partial(seconds_of, loss, *full) for name, loss in HEADS.items()}
        ways["chunked, half asked"] = partial(seconds_of, HEADS["chunked"], *half)
        ratio = compare(ways, rounds, f"heads, V = {shape[0]}")
        found[str(shape[0])] = {"width": shape[1], "tokens": shape[2], "ratio": ratio}
        print(found, flush=True)
    full = a_head(*(NARROW if quick else WIDE))
    ways = {"plain": partial(seconds_of, HEADS["plain"], *full)}
    ways |= {str(n): partial(seconds_of, partial(head_loss, chunk=n), *full)
             for n in (32, 64, 128, 256, 512, 1024)}
    chunks = {"chunked": compare(ways, 3, "sizes of chunks"), "tokens": len(full[1])}
    return found, chunks


# Steps -------------------------------------------------------------------------------
def step_figures(shape: str, quick: bool) -> dict:
    sizes, rows, rounds = SHAPES[shape]
    peaks = {way: peak("step", shape, way) for way in tqdm(WAYS, f"peaks, {shape}")}
    stepper = Stepper(shape)
    tokens, model = rows * sizes["context_length"], stepper.model
    weights = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    found = {**sizes, "rows": rows, "tokens": tokens, "weights_mb": round(weights, 1),
             "logits_mb": round(4 * tokens * sizes["vocab_size"] / 1e6, 1),
             "ways": {way: {"peak_mb": mb} for way, mb in peaks.items()}}
    kept = saved_bytes(lambda: model.features(stepper.batch[0]), model)
    found["blocks_mb"] = round(kept / 1e6, 1)
    times = {way: [] for way in WAYS}
    stepper.step("plain")
    for i in tqdm(range(1 if quick else rounds), f"times, {shape}"):
        for way in WAYS:
            if i == 0 or way not in ONCE:
                times[way].append(stepper.step(way))
    found["plain_seconds"] = round(min(times["plain"]), 3)
    for way, seconds in times.items():
        ratio = [a / b for a, b in zip(seconds, times["plain"])]
        found["ways"][way] |= {"ratio": round(median(ratio), 4),
                               "ratio_ends": [round(f(ratio), 4) for f in (min, max)]}
    print(found, flush=True)
    return found


def head_figures(quick: bool) -> dict:
    found, chunks = heads(quick)
    tokens = [64, 256] if quick else [64, 128, 256, 512, 1024, 2048]
    pairs = {kind: [peak("head", kind, n) for n in tqdm(tokens, f"peaks of {kind}")]
             for kind in ("plain", "chunked")}
    return {"heads": found, "chunks": chunks, "head_peak_mb": {"tokens": tokens, **pairs}}


def all_steps(quick: bool) -> dict:
    steps = {shape: step_figures(shape, quick) for shape in SHAPES
             if not (quick and shape == "124M")}
    last = [*steps.values()][-1]
    weights = last["weights_mb"]
    parts = {"weights": weights, "gradients": weights, "moments": 2 * weights,
             "blocks": last["blocks_mb"], "logits": round(3 * last["logits_mb"], 1)}
    return {"steps": steps, "parts_mb": parts}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        task = {"step": child_step, "head": child_head}[args.child[0]]
        print(json.dumps(task(*args.child[1:])))
        return
    figures = (head_figures if args.heads else all_steps)(args.quick)
    print(json.dumps(figures, indent=1))
    if not args.quick:
        print(record("less_memory_heads" if args.heads else "less_memory", figures))


if __name__ == "__main__":
    main()
