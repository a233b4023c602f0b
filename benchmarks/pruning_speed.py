"""What pruning gives: tokens a second, with zeros, with masks, with smaller matrices.

    python benchmarks/pruning_speed.py           # about four minutes on one core
    python benchmarks/pruning_speed.py --quick   # a small shape, writes nothing

Decodes greedily through the plain `KVCache` on the shape of GPT-2 124M with random weights:
the dense model beside one with zeros among its weights, one whose masks are still on, and two
from which a fifth and a third of the heads and neurons were removed. All are timed in turn, and
a figure is the median over the rounds; a ratio is that of the rounds, pair by pair. Then one
product of a matrix and a vector, stored densely and as sparse CSR: from which share of zeros on
the second is faster, on matrices that do not all fit into the caches.
"""
import argparse
import copy
import warnings
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from results_file import record
from tqdm import tqdm

from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.inference import KVCache
from gptbook.pruning import finalize, prune, sparsity
from gptbook.structured_pruning import prune_heads, prune_neurons

PROMPT = 64
ZEROS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def zeros(model, amount: float):
    """The model with this share of its weights zero, and no masks."""
    prune(model, amount, scope="layer")
    finalize(model)
    return model


def smaller(model, share: float):
    """The model without this share of its heads and neurons."""
    prune_heads(model, share)
    prune_neurons(model, share)
    return model


def masked(model):
    prune(model, 0.2, scope="layer")
    return model


def decode(model, ids, length: int) -> float:
    """Seconds for `length` greedy tokens after the prompt."""
    cache = KVCache(model, PROMPT + length)
    new = model.head(model.features(ids, cache=cache)[:, -1:]).argmax(-1)
    start = perf_counter()
    for _ in range(length - 1):
        new = model(new, cache=cache).argmax(-1)
    return (perf_counter() - start) / (length - 1)


def read_each_token(model) -> int:
    """Bytes of the matrices that one token reads: those of the blocks, and the head."""
    blocks = sum(p.numel() for p in model.blocks.parameters())
    return 4 * (blocks + model.head.weight.numel())


def ratios(times: dict, rounds: int, base: str = "dense") -> dict:
    """How many times as fast as the base each was, pair by pair: (low, median, high)."""
    found = {}
    for name, seconds in times.items():
        pairs = sorted(a / b for a, b in zip(times[base], seconds))
        found[name] = [round(x, 3) for x in (pairs[0], median(pairs), pairs[-1])]
    return found


def models(config: GPTConfig) -> dict:
    """{name: model}, all from the same random weights."""
    set_seed(0)
    dense, made = GPTModel(config).eval(), {}
    changes = {"dense": lambda m: m, "20% zeros": lambda m: zeros(m, 0.2),
               "90% zeros": lambda m: zeros(m, 0.9), "20% masked": masked,
               "20% removed": lambda m: smaller(m, 0.2),
               "33% removed": lambda m: smaller(m, 1 / 3)}
    for name, change in tqdm(changes.items(), "models"):
        made[name] = change(copy.deepcopy(dense))
    return made


def speed(config: GPTConfig, length: int, rounds: int) -> dict:
    """Tokens a second of each model, timed in turn."""
    made = models(config)
    ids = torch.randint(config.vocab_size, (1, PROMPT))
    times = {name: [] for name in made}
    for turn in tqdm(range(rounds + 1), "decoding"):
        for name, model in made.items():
            seconds = decode(model, ids, length)
            if turn:  # the first round warms up
                times[name].append(seconds)
    dense = read_each_token(made["dense"])
    return {
        "tokens_per_second": {n: round(1 / median(t), 2) for n, t in times.items()},
        "times_as_fast": ratios(times, rounds),
        "limit": {n: round(dense / read_each_token(m), 3) for n, m in made.items()},
        "zeros": {n: round(sparsity(m), 3) for n, m in made.items()},
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in made.items()},
    }


def sparse(weight: torch.Tensor) -> torch.Tensor:
    """Sparse CSR with the small indices that MKL takes as they are."""
    csr = weight.to_sparse_csr()
    return torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(),
                                   csr.values(), csr.shape, check_invariants=True)


def products(shape, copies: int, rounds: int) -> dict:
    """For each share of zeros: CSR's speed over the dense product's, (low, median, high)."""
    found, x = {}, torch.randn(shape[1])
    for amount in tqdm(ZEROS, "sparse products"):
        set_seed(0)
        dense = [torch.randn(shape).masked_fill(torch.rand(shape) < amount, 0.0)
                 for _ in range(copies)]
        csr = [sparse(w) for w in dense]
        for w, s in zip(dense, csr):
            torch.testing.assert_close(s @ x, F.linear(x, w), rtol=1e-4, atol=1e-3)
        times = {"dense": [], "sparse": []}
        for turn in range(rounds + 2):
            for name, many, multiply in (("dense", dense, lambda w: F.linear(x, w)),
                                         ("sparse", csr, lambda w: w @ x)):
                start = perf_counter()
                for w in many:
                    multiply(w)
                if turn > 1:
                    times[name].append((perf_counter() - start) / copies)
        found[f"{amount:g}"] = {
            "times_as_fast": ratios(times, rounds)["sparse"],
            "us": {name: round(1e6 * median(t), 1) for name, t in times.items()}}
    return found


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Sparse CSR")
    config, shape, copies = GPTConfig(), (3072, 768), 8
    if args.quick:
        config = GPTConfig(512, 128, 96, 2, 6)
        shape, copies, args.rounds, args.tokens = (256, 96), 2, 2, 4
    torch.set_num_threads(1)
    figures = {"prompt": PROMPT, "new_tokens": args.tokens, "rounds": args.rounds,
               "decode": speed(config, args.tokens, args.rounds),
               "matrix": list(shape), "product": products(shape, copies, 3 * args.rounds)}
    for name, value in figures["decode"]["times_as_fast"].items():
        print(f"{name}: {value} times as fast; limit {figures['decode']['limit'][name]}")
    for amount, value in figures["product"].items():
        print(f"{amount} zeros: {value}")
    if not args.quick:
        print(record("pruning_speed", figures))


if __name__ == "__main__":
    main()
