"""What the attention kernels of the core page cost: time and peak memory, paired runs.

    python benchmarks/core_attention.py            # one thread, about a minute
    python benchmarks/core_attention.py --threads 2 --device cuda

Each round times the three routes in turn, so that a busy neighbour hits all alike; the
ratios are medians over the rounds.
"""
import argparse
from functools import partial
from statistics import median
from time import perf_counter

import torch
from results_file import record
from tqdm import tqdm

from gptbook.core import GPTConfig, GPTModel, MultiHeadAttention, naive_attention

SIZES = dict(vocab_size=512, context_length=2048, emb_dim=256, n_layers=2, n_heads=4)


def seconds(call, device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = GPTConfig(**SIZES)
    by_name = {
        "naive": GPTModel(config, attention=partial(MultiHeadAttention, kernel=naive_attention)),
        "fused": GPTModel(config),
    }
    models = {k: m.eval().to(args.device) for k, m in by_name.items()}
    figures = {"lengths": [128, 256, 512, 1024, 2048], "milliseconds": {}, "ratios": {}}
    for T in tqdm(figures["lengths"], desc="tokens"):
        x, pos = torch.randint(512, (1, T), device=args.device), torch.arange(T, device=args.device)
        routes = {
            "naive": lambda: models["naive"].features(x),
            "mask matrix": lambda: models["fused"].features(x, positions=pos),
            "fast path": lambda: models["fused"].features(x),
        }
        times = {name: [] for name in routes}
        for call in routes.values():
            call()
        for _ in range(args.rounds):
            for name, call in routes.items():
                times[name].append(1e3 * seconds(call, args.device))
        for name, values in times.items():
            figures["milliseconds"].setdefault(name, []).append(round(median(values), 3))
            ratio = median(a / b for a, b in zip(values, times["fast path"]))
            figures["ratios"].setdefault(name, []).append(round(ratio, 3))
    suffix = "" if args.device == "cpu" else f"_{args.device}"
    print(record(f"core_attention{suffix}", figures))


if __name__ == "__main__":
    main()
