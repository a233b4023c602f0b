"""The roof of this machine, and where whole models stand under it.

    python benchmarks/roofline.py            # about three minutes
    python benchmarks/roofline.py --quick    # seconds; writes nothing

For one thread and for all: bandwidth over the size of what is read, the peak of matrix products,
and steps of the plain model (one new token for 1 to 128 rows, a prompt of 512 tokens, and rows
with a long past). Rounds are repeated in turn; of each figure the fastest round counts, because a
neighbour on the machine can only slow it down.
"""
import argparse
import os

import torch
from results_file import record
from tqdm import tqdm

from gptbook.core import GPTConfig, GPTModel, Positions, set_seed
from gptbook.roofline import bandwidth, decode_roof, fastest, token_cost
from gptbook.throughput import matmul_peak

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)          # MB that are read
PRODUCTS = (256, 512, 1024, 1536)                        # width of square matrices
MODELS = {
    "gpt2": GPTConfig(),
    "small": GPTConfig(4096, 1024, 384, n_layers=6, n_heads=6),
}
STEPS = {f"decode, {b} row{'s' * (b > 1)}": dict(n_tokens_before=32, batch=b)
         for b in (1, 2, 4, 8, 16, 32, 64, 128)}
STEPS["prefill of 512"] = dict(n_tokens_before=0, batch=1, n_tokens=512, n_logits=1)
STEPS["decode, 1 row after 1000"] = dict(n_tokens_before=1000, batch=1)
STEPS["decode, 16 rows after 1000"] = dict(n_tokens_before=1000, batch=16)


class Full:
    """A cache that always holds the same number of tokens: steps can be repeated."""

    def __init__(self, config, n_before, batch, n_tokens):
        shape = batch, config.kv_heads, n_before + n_tokens, config.head_dim
        self.held = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.n_layers)]
        index = torch.arange(n_before + n_tokens)[None]
        self.keys = Positions(index, aligned=True)
        self.now = Positions(index[:, n_before:], aligned=True)

    def begin(self, B, T, positions=None):
        return self.now

    def update(self, layer, k, v):
        return *self.held[layer], self.keys

    def commit(self):
        pass


def step(model, n_tokens_before, batch, n_tokens=1, n_logits=None):
    """A call that takes one step, as `token_cost` counts it."""
    ids = torch.randint(model.config.vocab_size, (batch, n_tokens))
    cache = Full(model.config, n_tokens_before, batch, n_tokens)
    kept = slice(None if n_logits is None else -n_logits, None)
    return lambda: model.head(model.features(ids, cache=cache)[:, kept])


def measure(models, rounds, seconds, progress):
    """Figures of one number of threads."""
    read, peak, took = {}, {}, {}
    for _ in range(rounds):
        for mb in SIZES:
            read[mb] = max(read.get(mb, 0), bandwidth(megabytes=mb, seconds=seconds))
        for size in PRODUCTS:
            found = matmul_peak(torch.device("cpu"), size=size, seconds=seconds / 2)
            peak[size] = max(peak.get(size, 0), found)
        for name, model in models.items():
            for label, kind in STEPS.items():
                time = fastest(step(model, **kind), seconds / 2)
                took[name, label] = min(took.get((name, label), time), time)
                progress.update()
    return read, peak, took


def report(models, read, peak, took):
    """The figures as they are stored: each step beside the roof of the same run."""
    memory, arithmetic, steps = read[256], max(peak.values()), {}
    for (name, label), seconds in took.items():
        cost = token_cost(models[name], **STEPS[label])
        roof, speed = decode_roof(cost, memory, arithmetic), cost.tokens / seconds
        steps.setdefault(name, {})[label] = dict(
            seconds=seconds, tokens_per_second=speed, roof=roof, fraction=speed / roof,
            intensity=cost.intensity, bytes=cost.bytes, operations=cost.operations,
            product_peak_fraction=cost.operations / seconds / arithmetic)
    return dict(bandwidth_by_MB=read, peak_by_width=peak, bandwidth=memory,
                peak=arithmetic, ridge=arithmetic / memory, steps=steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each figure")
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes nothing")
    args = parser.parse_args()
    set_seed(0)
    configs = MODELS
    if args.quick:
        args.rounds, args.seconds = 1, 0.02
        configs = {"tiny": GPTConfig(512, 1024, 64, n_layers=2, n_heads=2)}
    models = {name: GPTModel(config).eval() for name, config in configs.items()}
    counts = sorted({1, len(os.sched_getaffinity(0))})
    total, figures = len(counts) * args.rounds * len(models) * len(STEPS), {}
    with torch.no_grad(), tqdm(total=total, unit="step") as progress:
        for threads in counts:
            torch.set_num_threads(threads)
            found = measure(models, args.rounds, args.seconds, progress)
            figures[str(threads)] = report(models, *found)
            if not args.quick:
                torch.set_num_threads(1)
                record("roofline", dict(threads=figures, parameters={
                    name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}))
    for threads, found in figures.items():
        print(f"{threads} thread(s): {found['bandwidth'] / 1e9:.1f} GB/s, "
              f"{found['peak'] / 1e9:.0f} GFLOP/s")
        for name, steps in found["steps"].items():
            for label, row in steps.items():
                print(f"  {name:6} {label:28} {row['tokens_per_second']:9.1f} tokens/s, "
                      f"{row['fraction']:.0%} of the roof")


if __name__ == "__main__":
    main()
