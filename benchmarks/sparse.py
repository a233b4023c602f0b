"""Sparse attention beside full attention, timed in turn.

    flock /tmp/bench.lock python benchmarks/sparse.py   # about three minutes, one thread
    python benchmarks/sparse.py --quick                 # seconds, writes nothing

T = 4,096 tokens, 12 heads of 64, window 256. `causal`: PyTorch's fused kernel with is_causal.
`mask`: the same kernel with the window as a boolean matrix. `window`, `Longformer`, `BigBird`,
`strided`: `gptbook.sparse.blocked_attention`. `flex`: compiled flex_attention, forward only, where
a C++ compiler is found. The ratios are causal / other of the same round. Then the time against T.
"""
import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from results_file import record
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

from gptbook.core import Causal, Positions, sdpa, set_seed, visible
from gptbook.sparse import BigBird, Longformer, SlidingWindow, Strided, blocked_attention

WINDOW, HEADS, DIM = 256, 12, 64


def inputs(n: int) -> tuple:
    """q, k, v as a model makes them, and their positions."""
    set_seed(0)
    tensors = [torch.randn(1, n, HEADS, DIM).transpose(1, 2).requires_grad_() for _ in range(3)]
    where = Positions(torch.arange(n)[None], aligned=True)
    return tensors, dict(q_pos=where, k_pos=where)


def calls(n: int) -> dict:
    """{name: function without arguments}."""
    tensors, where = inputs(n)

    def call(kernel, mask):
        return partial(kernel, *tensors, mask=mask, **where)

    masks = {"window": SlidingWindow(WINDOW), "Longformer": Longformer(WINDOW, 16),
             "BigBird": BigBird(WINDOW, 16, 2, 64), "strided": Strided(64)}
    seen = visible(*where.values(), SlidingWindow(WINDOW))  # once: it costs time as well
    return {"causal": call(sdpa, Causal()),
            "mask": partial(F.scaled_dot_product_attention, *tensors, attn_mask=seen),
            **{name: call(blocked_attention, mask) for name, mask in masks.items()}}


def flex_call(n: int):
    """Compiled flex_attention with the same window; the block mask is made once."""
    (q, k, v), _ = inputs(n)

    def rule(b, h, i, j):
        return (j <= i) & (j > i - WINDOW)

    blocks = create_block_mask(rule, None, None, n, n, "cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q.detach(), k.detach(), v.detach(), block_mask=blocks)


def seconds(call, backward: bool) -> float:
    started = time.perf_counter()
    if backward:
        call().sum().backward()
    else:
        with torch.no_grad():
            call()
    return time.perf_counter() - started


def in_turn(calls: dict, backward: bool, repeats: int) -> dict:
    """{name: seconds of each round}."""
    for call in calls.values():
        seconds(call, backward)
    found = {name: [] for name in calls}
    for _ in tqdm(range(repeats), "rounds", leave=False):
        for name, call in calls.items():
            found[name].append(seconds(call, backward))
    return found


def table(found: dict) -> dict:
    """Fastest milliseconds, and quartiles of causal / other."""
    figures = {}
    for name, times in found.items():
        pairs = [a / b for a, b in zip(found["causal"], times)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        figures[name] = {"milliseconds": round(1e3 * min(times), 1), "low": round(low, 2),
                         "times_as_fast": round(middle, 2), "high": round(high, 2)}
    return figures


def with_flex(n: int, timed: dict) -> tuple:
    """(the calls with flex, what became of it)."""
    try:
        call = flex_call(n)
        with torch.no_grad():
            error = (call() - timed["window"]()).abs().max().item()
        return timed | {"flex": call}, f"compiled; differs by {error:.0e}"
    except Exception as problem:  # no compiler, or a torch without flex on CPUs
        return timed, f"not compiled: {type(problem).__name__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--no-flex", action="store_true", help="do not try to compile")
    parser.add_argument("--quick", action="store_true", help="short, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.tokens, args.no_flex = 2, 512, True
    torch.set_num_threads(1)
    timed, flex = calls(args.tokens), "not tried"
    figures = {"tokens": args.tokens, "window": WINDOW, "heads": HEADS, "dim": DIM,
               "repeats": args.repeats,
               "forward_backward": table(in_turn(timed, True, max(2, args.repeats - 2)))}
    against = {}
    for n in (args.tokens // 4, args.tokens // 2, args.tokens, 2 * args.tokens):
        two = {name: call for name, call in calls(n).items() if name in ("causal", "window")}
        against[n] = {name: round(1e3 * min(times), 2)
                      for name, times in in_turn(two, False, 3).items()}
    if not args.no_flex:
        timed, flex = with_flex(args.tokens, timed)
    figures |= {"forward": table(in_turn(timed, False, args.repeats)), "flex": flex,
                "forward_milliseconds": against}
    print(figures if args.quick else record("sparse", figures))


if __name__ == "__main__":
    main()
