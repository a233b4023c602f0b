"""Attention kernels on a GPU: values, times and peak memory from 512 to 16,384 tokens.

    python benchmarks/flash_gpu.py                  # under a minute on an H200
    python benchmarks/flash_gpu.py --quick          # few lengths, nothing stored

First every kernel is compared with `naive_attention` in float64. Then their forward passes are
timed in turns by CUDA events (A B C A B C, the median), and one forward and backward at 4,096
tokens. Memory is the peak that the allocator saw, less what was there before and the output.
A case that fails is stored as its error; one that there is no time for as "no time".
"""
import argparse
import time
from functools import partial
from statistics import median

import torch
from results_file import record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gptbook.attention_kernels import sdpa_backend, triton_attention, triton_forward
from gptbook.core import Causal, Positions, naive_attention, sdpa
from gptbook.flash import FlashAttention, Tiles, flash_attention

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
SHAPE = dict(batch=1, heads=16, head_dim=64, dtype="bfloat16")
CHECKS = [  # batch, heads, key heads, queries, keys, head dim, dtype, causal
    (1, 4, 4, 128, 128, 64, "float32", True), (2, 4, 2, 97, 97, 16, "float32", True),
    (1, 2, 1, 33, 161, 80, "float32", True), (1, 2, 2, 65, 130, 64, "float32", False),
    (1, 4, 2, 300, 300, 64, "float16", True), (1, 4, 2, 300, 300, 64, "bfloat16", True),
    (1, 2, 1, 77, 205, 128, "bfloat16", True), (1, 2, 2, 65, 130, 64, "bfloat16", False)]
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
started = time.monotonic()


class Everything:
    """All tokens see all."""

    def __call__(self, q_pos, k_pos):
        return (q_pos >= 0) & (k_pos >= 0)


def positions(first: int, last: int) -> Positions:
    return Positions(torch.arange(first, last, device="cuda")[None], aligned=True)


def tensors(batch, heads, kv_heads, queries, keys, dim, dtype, grad=False) -> list:
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, n, t, dim, device="cuda", dtype=getattr(torch, dtype),
                        requires_grad=grad) for n, t in sizes]


def guarded(call, seconds: float):
    """What `call` returns; its error, or "no time", as text."""
    if time.monotonic() - started > seconds:
        return "no time"
    try:
        return call()
    except Exception as error:  # out of memory, no such kernel, no compiler
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def largest_error(case) -> dict:
    """The kernels against naive in float64: outputs, and gradients over their largest."""
    *sizes, dtype, causal = case
    qkv = tensors(*sizes, dtype, grad=True)
    exact = [y.detach().double().requires_grad_() for y in qkv]
    n, m = sizes[3:5]
    where = dict(q_pos=positions(m - n, m), k_pos=positions(0, m),
                 mask=Causal() if causal else Everything())
    truth = naive_attention(*exact, **where)
    up = torch.randn_like(qkv[0])
    wanted = torch.autograd.grad(truth, exact, up.double())

    def by_triton(*qkv):
        return FlashAttention.apply(*qkv, Tiles(**where), lambda q, k, v, tiles:
                                    triton_forward(q, k, v, causal))

    found = {}
    for name, kernel in dict(triton=by_triton,
                             torch=partial(flash_attention, **where, block=64)).items():
        out = kernel(*qkv)
        got = torch.autograd.grad(out, qkv, up)
        found[name] = {
            "values": (out - truth).abs().max().item(),
            "gradients": max(((a - b).abs().max() / b.abs().max()).item()
                             for a, b in zip(got, wanted))}
        assert found[name]["values"] <= TOLERANCE[dtype], (case, found)
        assert found[name]["gradients"] <= TOLERANCE[dtype], (case, found)
    return found


def routes(T: int, flex: bool) -> dict:
    """Name -> function of (q, k, v) for causal attention over T tokens."""
    where = dict(q_pos=positions(0, T), k_pos=positions(0, T), mask=Causal())

    def chosen(backend):
        def call(*qkv):
            with sdpa_kernel(backend):
                return sdpa(*qkv, **where)
        return call

    found = {
        "naive": partial(naive_attention, **where),
        "torch, block 256": partial(flash_attention, **where),
        "torch, block 1024": partial(flash_attention, **where, block=1024),
        "triton": partial(triton_attention, **where),
        "sdpa": partial(sdpa, **where),
        "sdpa flash": chosen(SDPBackend.FLASH_ATTENTION),
        "sdpa efficient": chosen(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": chosen(SDPBackend.CUDNN_ATTENTION),
        "sdpa math": chosen(SDPBackend.MATH),
    }
    if flex:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, "cuda")
        found["flex, compiled"] = partial(COMPILED_FLEX, block_mask=blocks)
    return found


COMPILED_FLEX = torch.compile(flex_attention, dynamic=False)


def milliseconds(call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_mb(call) -> float:
    """The peak of the allocator during a call, less what was there and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return round((peak - out.numel() * out.element_size()) / 1e6, 3)


def measure(calls: dict, rounds: int, seconds: float, memory: bool) -> tuple[dict, dict]:
    """(milliseconds, MB) of each call; an error stands in place of a number."""
    ms, mb = {}, {}
    for name, call in calls.items():
        first = guarded(call, seconds)
        if isinstance(first, str):
            ms[name] = mb[name] = first
            continue
        del first
        mb[name] = guarded(lambda: peak_mb(call), seconds) if memory else None
    good = [name for name in calls if name not in ms]
    times = {name: [] for name in good}
    for name in good:
        milliseconds(calls[name])
    for _ in range(rounds):
        for name in good:
            times[name].append(milliseconds(calls[name]))
    return ms | {name: round(median(t), 4) for name, t in times.items()}, mb


def forward(T: int, args) -> tuple[dict, dict]:
    qkv = tensors(SHAPE["batch"], SHAPE["heads"], SHAPE["heads"], T, T, SHAPE["head_dim"],
                  SHAPE["dtype"])
    with torch.no_grad():
        calls = {name: partial(call, *qkv) for name, call in
                 routes(T, T in (1024, 4096, 16384)).items()}
        return measure(calls, args.rounds, args.seconds, memory=True)


def both_ways(T: int, args) -> dict:
    qkv = tensors(SHAPE["batch"], SHAPE["heads"], SHAPE["heads"], T, T, SHAPE["head_dim"],
                  SHAPE["dtype"], grad=True)
    up = torch.randn_like(qkv[0])
    kernels = routes(T, False)
    kernels["triton, block 1024"] = partial(kernels["triton"], block=1024)  # of the way back
    calls = {name: partial(lambda call: torch.autograd.grad(call(*qkv), qkv, up), call)
             for name, call in kernels.items()}
    return measure(calls, args.rounds, args.seconds, memory=False)[0]


def picked() -> dict:
    """Which kernel SDPA takes by itself."""
    found = {}
    for name, dtype, kv_heads, index, dropout in (
            ("bfloat16, causal", "bfloat16", 8, True, 0.0),
            ("float16, causal", "float16", 8, True, 0.0),
            ("float32, causal", "float32", 8, True, 0.0),
            ("bfloat16, a mask matrix", "bfloat16", 8, False, 0.0),
            ("bfloat16, grouped heads", "bfloat16", 2, True, 0.0),
            ("bfloat16, dropout", "bfloat16", 8, True, 0.1)):
        qkv = tensors(2, 8, kv_heads, 512, 512, 64, dtype)
        where = positions(0, 512)._replace(aligned=index)
        found[name] = guarded(lambda: sdpa_backend(lambda: sdpa(
            *qkv, q_pos=where, k_pos=where, mask=Causal(), dropout=dropout)), 1e9)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=50, help="start nothing after that")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    torch.manual_seed(0)
    lengths = LENGTHS[:2] if args.quick else LENGTHS
    figures = {"shape": SHAPE, "lengths": lengths, "picked": picked(), "milliseconds": {},
               "peak_MB": {}, "errors": {}, "tolerance": TOLERANCE}
    for case in CHECKS:
        figures["errors"][" ".join(map(str, case))] = found = guarded(
            lambda: largest_error(case), args.seconds)
        print(case, found, flush=True)
    for T in lengths:
        ms, mb = forward(T, args)
        print(T, ms, mb, flush=True)
        for name in ms:
            figures["milliseconds"].setdefault(name, {})[str(T)] = ms[name]
            figures["peak_MB"].setdefault(name, {})[str(T)] = mb[name]
    figures["both_ways_ms"] = {str(T): both_ways(T, args) for T in (min(4096, lengths[-1]),)}
    figures["seconds"] = round(time.monotonic() - started, 1)
    try:
        import triton
        figures["triton"] = triton.__version__
    except ImportError:
        figures["triton"] = None
    print(figures["both_ways_ms"], figures["picked"], figures["seconds"], flush=True)
    if not args.quick:
        print(record("flash_gpu", figures))


if __name__ == "__main__":
    main()
