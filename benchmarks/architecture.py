"""What Llama's changes to GPT-2 are worth on the stories, one by one and together.

    python benchmarks/architecture.py --times      # step times, half a minute, one thread
    python benchmarks/architecture.py --jobs 16    # losses, about two minutes on 16 fast cores
    python benchmarks/architecture.py --quick      # both in seconds, writes nothing

Six models with the same number of parameters, to 1 %: GPT-2; four with one change each (rotation
for learned positions, RMSNorm, SwiGLU, half as many key/value heads); one with all four and no
biases, as in Llama. What a change saves or costs in weights is given to, or taken from, the width
of the feed-forward. Three seeds; the runs of a seed share their batches.

Each model is trained twice, each time with a whole schedule: for the same number of steps, and
for as many steps as the stored times allow in the time that GPT-2 takes. Finished runs are
recorded at once. `--times` measures the steps, in pairs, and each part alone at GPT-2's width.
"""
import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch
from results_file import load, record
from torch import nn
from tqdm import tqdm

from gptbook.architecture import NoPositions, RMSNorm, Rotary, SwiGLU
from gptbook.core import (Causal, FeedForward, GPTConfig, GPTModel, LossModel, MultiHeadAttention,
                          Positions, init_weights, naive_attention, sdpa, set_seed)
from gptbook.data import TokenDataset, tokenize
from gptbook.initial_weights import init_copying
from gptbook.runs import TrainConfig
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import begin_run, evaluate_loss, take_step, train

WIDTH, LAYERS, HEADS, LENGTH, ROWS, VOCAB = 96, 3, 4, 128, 8, 1024
RATE = 3e-3
BASELINE = "GPT-2"


class WideFeedForward(FeedForward):
    """GPT-2's feed-forward with a width that can be chosen."""

    def __init__(self, config, layer, hidden_dim):
        super().__init__(config, layer)
        self.fc_in = nn.Linear(config.emb_dim, hidden_dim, bias=config.bias)
        self.fc_out = nn.Linear(hidden_dim, config.emb_dim, bias=config.bias)


turned = dict(attention=partial(MultiHeadAttention, rotary=Rotary), position_embedding=NoPositions)
VARIANTS = {  # name -> (settings of the config, slots)
    BASELINE: ({}, {}),
    "rotation": ({}, turned),
    "RMSNorm": ({}, dict(norm=RMSNorm)),
    "SwiGLU": ({}, dict(mlp=SwiGLU)),
    "half the key heads": (dict(n_kv_heads=HEADS // 2), {}),
    "all four, no biases": (dict(n_kv_heads=HEADS // 2, bias=False),
                            dict(turned, norm=RMSNorm, mlp=SwiGLU)),
}


def build(name: str, hidden_dim: int, vocab_size: int = VOCAB) -> GPTModel:
    """One of the six, with a feed-forward of that width."""
    settings, slots = VARIANTS[name]
    mlp = partial(slots.get("mlp", WideFeedForward), hidden_dim=hidden_dim)
    sizes = GPTConfig(vocab_size, LENGTH, WIDTH, LAYERS, HEADS, **settings)
    return GPTModel(sizes, **{**slots, "mlp": mlp})


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fitting_width(name: str) -> int:
    """The feed-forward's width, a multiple of 4, at which it has GPT-2's parameters."""
    with torch.device("meta"):
        target, low, high = count(build(BASELINE, 4 * WIDTH)), *(
            count(build(name, width)) for width in (100, 200))
        width = 4 * round((100 + 100 * (target - low) / (high - low)) / 4)
        assert abs(count(build(name, width)) / target - 1) < 0.01, name
    return width


def prepare(n_stories: int) -> dict:
    """Tokens, made once and sent to every worker."""
    corpus = stories(n_stories, validation=100)
    tokenizer = train_bpe(corpus.text("train", 1_000_000), VOCAB)
    data, held_out = (TokenDataset(tokenize(corpus, tokenizer, split), LENGTH, ROWS,
                                   document_end=tokenizer.end_of_text)
                      for split in ("train", "validation"))
    return dict(data=data, held_out=held_out, vocab=tokenizer.n_vocab)


# Times ----------------------------------------------------------------------------------------

def fastest(call, repeats: int) -> float:
    """Seconds of the fastest of a few calls."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def paired(calls: dict, rounds: int, repeats: int) -> dict:
    """{name: milliseconds and its ratio to the first name's of the same round}."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in tqdm(range(rounds), f"rounds of {next(iter(calls))}", leave=False):
        for name in [*calls][::1 if i % 2 else -1]:
            seconds[name].append(fastest(calls[name], repeats))
    first, found = next(iter(calls)), {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[first])]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        found[name] = dict(milliseconds=round(1e3 * min(times), 4), ratio=round(middle, 4),
                           quartiles=[round(low, 4), round(high, 4)])
    return found


def training_steps(shared: dict) -> dict:
    """{name: a function that makes one step of it}."""
    calls = {}
    for name in VARIANTS:
        set_seed(0)
        model = build(name, fitting_width(name), shared["vocab"])
        run = begin_run(model, shared["data"], TrainConfig(10**6, RATE))
        calls[name] = partial(take_step, run, LossModel(model).train(), shared["data"])
    return calls


def backward_of(module, *inputs):
    """A forward and backward pass of one part."""
    def call():
        module.zero_grad()
        module(*inputs).sum().backward()

    return call


def parts() -> dict:
    """{what: {name: call}}: each part beside its predecessor, width 768, 512 tokens."""
    config, where = GPTConfig(bias=False), Positions(torch.arange(512)[None], aligned=True)
    x = torch.randn(1, 512, 768, requires_grad=True)
    attention = {"without": MultiHeadAttention(config, 0),
                 "with": MultiHeadAttention(config, 0, rotary=Rotary)}
    mlps = {"GELU": FeedForward(config, 0), "SwiGLU": SwiGLU(config, 0)}
    norms = {"LayerNorm": nn.LayerNorm(768), "RMSNorm": RMSNorm(768)}
    return {
        "norm": {name: backward_of(part, x) for name, part in norms.items()},
        "feed-forward": {name: backward_of(part, x, where) for name, part in mlps.items()},
        "attention, rotation": {name: backward_of(part, x, where)
                                for name, part in attention.items()},
    }


def one_token(n_kv_heads: int, kernel, n_keys: int = 4096):
    """Attention of one new token over a long cache: 16 heads of 64."""
    q, (k, v) = torch.randn(1, 16, 1, 64), torch.randn(2, 1, n_kv_heads, n_keys, 64)
    where = [Positions(torch.tensor([[n_keys - 1]]), True),
             Positions(torch.arange(n_keys)[None], True)]
    return partial(kernel, q, k, v, q_pos=where[0], k_pos=where[1], mask=Causal())


def measure_times(args, shared: dict) -> dict:
    rounds = 2 if args.quick else args.rounds
    figures = {"steps": paired(training_steps(shared), rounds, 2), "width": WIDTH,
               "layers": LAYERS, "rows": ROWS, "length": LENGTH}
    figures["parts"] = {what: paired(calls, rounds, 2) for what, calls in parts().items()}
    with torch.no_grad():
        figures["one token, 4096 keys, 16 heads"] = {
            kernel.__name__: paired({str(k): one_token(k, kernel) for k in (16, 8, 4, 2, 1)},
                                    rounds, 3) for kernel in (sdpa, naive_attention)}
    return figures


# Losses ---------------------------------------------------------------------------------------

def start(shared: dict) -> None:
    """A worker's first act."""
    global SHARED
    SHARED = shared
    torch.set_num_threads(1)


def one_run(name: str, budget: str, hidden_dim: int, steps: int, seed: int) -> dict:
    """Train one model and judge it."""
    set_seed(seed)
    model = build(name, hidden_dim, SHARED["vocab"])
    init_weights(model, WIDTH**-0.5)
    init_copying(model)
    config = TrainConfig(steps, RATE, betas=(0.9, 0.98), seed=seed)
    started = time.perf_counter()
    train(model, SHARED["data"], None, config, progress=False,
          schedule=warmup_cosine(steps, max(1, steps // 30), 0.02))
    return dict(name=name, budget=budget, seed=seed, steps=steps, parameters=count(model),
                hidden_dim=hidden_dim, seconds=round(time.perf_counter() - started, 1),
                loss=round(evaluate_loss(model, SHARED["held_out"]), 4))


def todo(args) -> list:
    """(name, budget, width, steps, seed); GPT-2's runs serve both budgets."""
    ratios = {name: found["ratio"] for name, found in
              load("architecture_times")["figures"]["steps"].items()}
    widths = {name: fitting_width(name) for name in VARIANTS}
    runs = []
    for seed in range(args.seeds):
        runs += [(name, "steps", widths[name], args.steps, seed) for name in VARIANTS]
        runs += [(name, "time", widths[name], round(args.steps / ratios[name]), seed)
                 for name in VARIANTS if name != BASELINE]
    return runs


def gather(found: list, args) -> dict:
    """The JSON: losses by budget, name and seed; steps and parameters of each."""
    found = sorted(found, key=lambda one: ([*VARIANTS].index(one["name"]), one["seed"]))
    losses, steps = {"steps": {}, "time": {}}, {"steps": {}, "time": {}}
    for one in found:
        for budget in ("steps", "time") if one["name"] == BASELINE else (one["budget"],):
            losses[budget].setdefault(one["name"], {})[str(one["seed"])] = one["loss"]
            steps[budget][one["name"]] = one["steps"]
    return {"held_out_nats_per_token": losses, "steps": steps,
            "parameters": {one["name"]: one["parameters"] for one in found},
            "hidden_dim": {one["name"]: one["hidden_dim"] for one in found},
            "width": WIDTH, "layers": LAYERS, "heads": HEADS, "rows": ROWS, "length": LENGTH}


def measure_losses(args, shared: dict) -> list:
    found, spawn = [], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, start, (shared,)) as pool:
        futures = [pool.submit(one_run, *run) for run in todo(args)]
        for future in tqdm(as_completed(futures), "runs", len(futures)):
            found.append(one := future.result())
            tqdm.write(f"{one['name']}, seed {one['seed']}, {one['steps']} steps: "
                       f"{one['loss']} nats a token, {one['seconds']} s")
            if not args.quick:
                record("architecture", gather(found, args))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", action="store_true", help="measure the step times instead")
    parser.add_argument("--rounds", type=int, default=15, help="of the times")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stories", type=int, default=8000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.steps, args.seeds, args.stories = 6, 1, 300
    shared = prepare(args.stories if not args.times else 300)
    if args.times or args.quick:
        times = measure_times(args, shared)
        print(times if args.quick else record("architecture_times", times))
    if not args.times:
        found = measure_losses(args, shared)
        if args.quick:
            print(gather(found, args)["held_out_nats_per_token"])


if __name__ == "__main__":
    main()
