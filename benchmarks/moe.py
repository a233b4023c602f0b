"""Three ways to run eight experts of which each token asks two, timed in turn.

    python benchmarks/moe.py            # two minutes on one core
    python benchmarks/moe.py --quick    # seconds, writes nothing

`every`: each expert on each token, then a weighted sum. `loop`: the usual loop over the experts
with torch.where and index_add_. `grouped`: `gptbook.moe.run_experts`. Forward alone, and forward
with backward; and one whole training step of a small model, dense and with experts, whose ratio
says how many steps the dense one makes in the same time.
"""
import argparse
import statistics
import time
from functools import partial

import torch
from moe_training import LENGTH, ROWS, VOCAB, build, parts
from results_file import record
from torch import nn
from tqdm import tqdm

from gptbook.core import GPTConfig, LossModel, auxiliary_loss, clear_auxiliary_loss, set_seed
from gptbook.moe import MixtureOfExperts, run_experts


def every(experts, x, chosen, weights):
    """All experts on all tokens, (N, E, C), weighed by what is mostly zero."""
    share = torch.zeros(len(x), len(experts)).scatter(1, chosen, weights)
    return torch.stack([expert(x, None) for expert in experts], 1).mul(share[..., None]).sum(1)


def loop(experts, x, chosen, weights):
    """As Mixtral's block does it in transformers."""
    out = torch.zeros_like(x)
    mask = nn.functional.one_hot(chosen, len(experts)).permute(2, 1, 0)  # (E, k, N)
    for i, expert in enumerate(experts):
        place, token = torch.where(mask[i])
        out.index_add_(0, token, expert(x[token], None) * weights[token, place, None])
    return out


WAYS = {"every": every, "loop": loop, "grouped": run_experts}


def seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(calls: dict, repeats: int) -> dict:
    """{name: seconds of each repeat}, one after the other, so that noise meets all alike."""
    for call in calls.values():
        call()
    found = {name: [] for name in calls}
    for _ in tqdm(range(repeats), "repeats", leave=False):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return found


def ratios(found: dict, name: str, base: str) -> dict:
    """Quartiles of the paired ratio name / base."""
    pairs = [a / b for a, b in zip(found[name], found[base])]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"low": round(low, 3), "median": round(middle, 3), "high": round(high, 3)}


def time_ways(n_tokens: int, width: int, n_experts: int, top_k: int, repeats: int) -> dict:
    """Quartiles of `every` / `grouped` and `loop` / `grouped`, and what they differ by."""
    set_seed(0)
    part = MixtureOfExperts(GPTConfig(64, 64, width, 1, 4, bias=False), 0, n_experts, top_k)
    x = torch.randn(n_tokens, width, requires_grad=True)
    routing = part.route(x.detach())
    chosen, weights = routing.chosen, routing.weights.detach()

    def forward(run):
        with torch.no_grad():
            return run(part.experts, x, chosen, weights)

    def both(run):
        run(part.experts, x, chosen, weights).sum().backward()

    outs = {name: forward(run) for name, run in WAYS.items()}
    figures = {"largest_difference": {
        name: (out - outs["grouped"]).abs().max().item() for name, out in outs.items()},
        "load": [int(n) for n in chosen.flatten().bincount(minlength=n_experts)]}
    for label, kind in (("forward", forward), ("forward_backward", both)):
        found = in_turn({name: partial(kind, run) for name, run in WAYS.items()}, repeats)
        figures[label] = {
            "every_over_grouped": ratios(found, "every", "grouped"),
            "loop_over_grouped": ratios(found, "loop", "grouped"),
            "milliseconds": {name: round(1e3 * min(t), 2) for name, t in found.items()}}
    return figures


def step_of(part):
    """One step of `benchmarks/moe_training.py` with such feed-forwards."""
    set_seed(0)
    model = build(part, VOCAB).train()
    loss_model, ids = LossModel(model), torch.randint(VOCAB, (ROWS, LENGTH + 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step():
        (loss_model(ids[:, :-1], ids[:, 1:]) + auxiliary_loss(model)).backward()
        clear_auxiliary_loss(model)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(repeats: int) -> dict:
    """Quartiles of the step's time beside the dense model's."""
    found = in_turn({n: step_of(parts()[n]) for n in ("dense", "top-1", "top-2")}, repeats)
    return {name: ratios(found, name, "dense") for name in ("top-1", "top-2")} | {
        "dense_milliseconds": round(1e3 * min(found["dense"]), 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="few repeats, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 3
    torch.set_num_threads(1)
    figures = {"repeats": args.repeats, "shape": {"tokens": 2048, "width": 256},
               "top-2 of 8": time_ways(2048, 256, 8, 2, args.repeats),
               "top-1 of 8": time_ways(2048, 256, 8, 1, args.repeats),
               "step": time_steps(args.repeats)}
    print(figures if args.quick else record("moe", figures))


if __name__ == "__main__":
    main()
