"""Attention kernels on the CPU: time and peak memory against the number of tokens.

    flock bench.lock env OMP_NUM_THREADS=1 python benchmarks/flash.py    # about five minutes
    python benchmarks/flash.py --quick

One sequence, four causal heads of 64, one thread. The kernels take turns (A B C A B C); times
are the fastest turn, ratios the median over the turns. Memory is the peak of a fresh process
(VmHWM), counted from the moment when the inputs are there and the libraries are warm, less
the output and, where there is a backward pass, the gradients: what a kernel needs for itself.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from results_file import record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

from gptbook.attention_kernels import sdpa_backend
from gptbook.core import Causal, Positions, naive_attention, sdpa
from gptbook.flash import flash_attention

HEADS, DIM = 4, 64
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
LIMIT = {"naive": 4096, "flex, eager": 2048, "sdpa math": 4096}  # beyond that it takes too much


def math_only(*qkv, **where):
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(*qkv, **where)


def flex_once(call):
    """flex_attention with a block mask that is made at the first call of a length."""
    made = {}

    def kernel(q, k, v, **where):
        T = q.shape[2]
        if T not in made:
            made[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, "cpu")
        return call(q, k, v, block_mask=made[T])

    return kernel


KERNELS = {"naive": naive_attention, "flash": flash_attention, "sdpa": sdpa,
           "sdpa math": math_only}


def inputs(T: int) -> tuple[list, dict]:
    torch.manual_seed(0)
    qkv = [torch.randn(1, HEADS, T, DIM, requires_grad=True) for _ in range(3)]
    where = Positions(torch.arange(T)[None], aligned=True)
    return qkv, dict(q_pos=where, k_pos=where, mask=Causal())


def forward(kernel, qkv, where):
    with torch.no_grad():  # and detached: flex refuses what asks for a gradient on a CPU
        return kernel(*(y.detach() for y in qkv), **where)


def both_ways(kernel, qkv, where):
    out = kernel(*qkv, **where)
    return torch.autograd.grad(out, qkv, torch.ones_like(out))


WAYS = {"forward": forward, "both ways": both_ways}


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times(way: str, kernels: dict, lengths: list, rounds: int) -> dict:
    """{kernel: {T: milliseconds}}, and the ratio of each to flash."""
    found = {"milliseconds": {}, "over_flash": {}}
    for T in tqdm(lengths, way):
        qkv, where = inputs(T)
        calls = {name: partial(WAYS[way], kernel, qkv, where)
                 for name, kernel in kernels.items() if T <= LIMIT.get(name, T)}
        for name, call in [*calls.items()]:
            try:
                call()
            except Exception as error:  # no C++ compiler, or one that refuses
                print(name, T, str(error).splitlines()[0])
                del calls[name]
        turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
        for name in calls:
            ms = 1e3 * min(turn[name] for turn in turns)
            ratio = statistics.median(turn[name] / turn["flash"] for turn in turns)
            found["milliseconds"].setdefault(name, {})[T] = round(ms, 3)
            found["over_flash"].setdefault(name, {})[T] = round(ratio, 3)
    return found


def largest_error(T: int) -> dict:
    """Flash in float32 against naive in float64: outputs, and gradients over their largest."""
    qkv, where = inputs(T)
    exact = [y.detach().double().requires_grad_() for y in qkv]
    truth, out = naive_attention(*exact, **where), flash_attention(*qkv, **where)
    up = torch.randn_like(out)
    wanted = torch.autograd.grad(truth, exact, up.double())
    got = torch.autograd.grad(out, qkv, up)
    return {"values": (out - truth).abs().max().item(), "gradients": max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, wanted))}


def resident(field: str) -> int:  # bytes
    status = Path("/proc/self/status").read_text()  # ru_maxrss inherits the parent's peak
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def peak_of(name: str, way: str, T: int) -> None:
    """Print the MB that a kernel needs beside its inputs and results, in a fresh process."""
    torch.set_num_threads(1)
    qkv, where = inputs(T)
    WAYS[way](KERNELS[name], *inputs(8))  # the libraries are warm
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    results = WAYS[way](KERNELS[name], qkv, where)
    results = (results,) if way == "forward" else (*results, results[0], results[0])
    known = sum(y.numel() * y.element_size() for y in results)  # + output and its gradient
    print((resident("VmHWM") - before - known) / 1e6)


def memory(lengths: list) -> dict:
    """{way: {kernel: {T: MB beside inputs and results}}}."""
    def peak(*job):
        out = subprocess.run([sys.executable, __file__, "--peak-of", json.dumps(job)],
                             check=True, capture_output=True, text=True).stdout
        return round(float(out.strip().splitlines()[-1]), 3)

    jobs = [(way, name, T) for way in WAYS for name in ("naive", "flash", "sdpa")
            for T in lengths if T <= LIMIT.get(name, T)]
    found = {way: {} for way in WAYS}
    for way, name, T in tqdm(jobs, "memory"):
        found[way].setdefault(name, {})[T] = peak(name, way, T)
    return found


def picked() -> dict:
    """Which kernel SDPA takes by itself on this machine."""
    def kind(dtype=torch.float32, kv_heads=8, aligned=True, dropout=0.0):
        q, k, v = (torch.randn(1, n, 64, 64, dtype=dtype) for n in (8, kv_heads, kv_heads))
        where = Positions(torch.arange(64)[None], aligned)
        return sdpa_backend(lambda: sdpa(q, k, v, q_pos=where, k_pos=where, mask=Causal(),
                                         dropout=dropout))

    return {"float32, causal": kind(), "bfloat16, causal": kind(torch.bfloat16),
            "a mask matrix": kind(aligned=False), "grouped heads": kind(kv_heads=2),
            "dropout": kind(dropout=0.1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short, nothing stored")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return peak_of(*json.loads(args.peak_of))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "flex_attention called without")
    lengths = LENGTHS[:2] if args.quick else LENGTHS
    figures = {"heads": HEADS, "head_dim": DIM, "lengths": lengths, "picked": picked(),
               "error": {T: largest_error(T) for T in (lengths[-1] // 4, lengths[-1] // 2)}}
    kernels = KERNELS | {"flex, eager": flex_once(flex_attention)}
    if not args.quick:
        # one graph a length: with lengths left open, what torch 2.13 writes does not compile
        kernels["flex, compiled"] = flex_once(torch.compile(flex_attention, dynamic=False))
    figures["forward"] = times("forward", kernels, lengths, args.rounds)
    figures["both ways"] = times("both ways", KERNELS, lengths, args.rounds)
    figures["memory_MB"] = memory(lengths[1:])
    print(json.dumps(figures, indent=1))
    if not args.quick:
        print(record("flash", figures))


if __name__ == "__main__":
    main()
