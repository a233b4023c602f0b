"""What it costs to compute a batch in pieces, and when a bigger batch pays.

    python benchmarks/accumulation.py             # seconds and memory, about four minutes
    python benchmarks/accumulation.py --curves    # the same run in pieces, about five minutes
    python benchmarks/accumulation.py --batches   # batch sizes, noise scale, about seven minutes

The first measures one step of 16 rows, whole and in pieces: seconds beside the whole step
next to it, bytes saved for the backward pass, and the peak of a process of its own. The second
trains the same small model whole, in pieces, and with the mean of the pieces' means. The third
trains it on the same tokens in batches of 2, 8 and 32 shorter rows, each at the best of four
learning rates (found with a seed that is not judged), and measures the noise scale of the
gradient on the way. --quick tries a part with few steps and writes nothing.
"""
import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from results_file import record
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from gptbook.accumulation import Accumulate, accumulate_gradients, cut_batch
from gptbook.core import GPTConfig, GPTModel, LossModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import Precision, TrainConfig, compute_gradients, evaluate_loss, train

ROWS, CONTEXT, SHORT = 16, 192, 96
PIECES = (8, 4, 2, 1)
WIDE = dict(emb_dim=192, n_layers=3, n_heads=4)    # of the costs
SMALL = dict(emb_dim=64, n_layers=2, n_heads=2)    # of the training runs


def texts(vocab_size: int, count: int = 3000) -> tuple:
    """Ids of stories, for training and held out, and the tokenizer."""
    corpus = stories(count, validation=100)
    tokenizer = train_bpe(corpus.text("train", 1_000_000), vocab_size)
    return (*(tokenize(corpus, tokenizer, split) for split in ("train", "validation")),
            tokenizer)


def new_model(vocab_size: int, seed: int, sizes: dict) -> GPTModel:
    set_seed(seed)
    model = GPTModel(GPTConfig(vocab_size, CONTEXT, **sizes))
    init_weights(model, 0.07)
    return model


# Costs -------------------------------------------------------------------------------
def saved_bytes(loss_model, gradients, batch) -> int:
    """The most that a step keeps for its backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in loss_model.parameters()}
    kept, most = {}, [0]

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            most[0] = max(most[0], sum(kept.values()))
        return x

    class Clearing(Precision):  # after each backward pass nothing is kept
        def backward(self, loss):
            loss.backward()
            kept.clear()

    with saved_tensors_hooks(pack, lambda x: x):
        gradients(loss_model, *batch, Clearing())
    return most[0]


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(loss_model, batches: list, ways: dict, rounds: int) -> dict:
    """Seconds of each way for all batches, beside those of the whole step next to it."""
    ratios, whole = {name: [] for name in ways}, []
    for batch in batches:  # warm up
        compute_gradients(loss_model, *batch)

    def run(way):
        return seconds(lambda: [way(loss_model, *batch) for batch in batches])

    for _ in tqdm(range(rounds), "rounds"):
        for name, way in ways.items():
            before, spent, after = run(compute_gradients), run(way), run(compute_gradients)
            ratios[name].append(2 * spent / (before + after))
            whole += [before, after]
    loss_model.zero_grad()
    return {"whole_seconds": round(min(whole) / len(batches), 4),
            "ratio": {name: round(median(r), 4) for name, r in ratios.items()},
            "ratio_lowest": {name: round(min(r), 4) for name, r in ratios.items()},
            "ratio_highest": {name: round(max(r), 4) for name, r in ratios.items()}}


def memory(key: str) -> float:  # MB
    """A line of this process's own account, such as VmRSS or VmHWM, its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1000


def child(rows: int) -> None:
    """One step in a process of its own: prints how much its peak exceeds its start."""
    torch.set_num_threads(1)
    model = LossModel(new_model(2048, 0, WIDE))
    ids = torch.randint(2048, (ROWS, CONTEXT + 1))
    compute_gradients(model, ids[:1, :9], ids[:1, 1:10])  # the gradients are there
    start = memory("VmRSS")
    Accumulate(rows)(model, ids[:, :-1], ids[:, 1:])
    print(json.dumps(memory("VmHWM") - start))


def peak(rows: int) -> float:
    command = [sys.executable, __file__, "--child", str(rows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def costs(quick: bool) -> dict:
    train_ids, _, tokenizer = texts(2048)
    loss_model = LossModel(new_model(tokenizer.n_vocab, 0, WIDE))
    ragged = TokenDataset(train_ids, CONTEXT, ROWS, document_end=tokenizer.end_of_text)
    even = TokenDataset(train_ids, CONTEXT, ROWS)
    ways = {str(rows): Accumulate(rows) for rows in PIECES}
    untrimmed = {f"{rows}, untrimmed": Accumulate(rows, trim=False) for rows in PIECES}
    rounds, count = (1, 1) if quick else (7, 2)
    figures = {"rows": ROWS, "context": CONTEXT, **WIDE, "vocab_size": tokenizer.n_vocab}
    for name, data, all_ways in (("even", even, ways), ("ragged", ragged, ways | untrimmed)):
        batches = [data.batch(0, step) for step in range(count)]
        figures[name] = compare(loss_model, batches, all_ways, rounds)
        figures[name]["positions"] = {
            str(rows): sum(x.numel() for batch in batches for x, _ in cut_batch(*batch, rows))
            for rows in (ROWS, *PIECES)}
        print(name, figures[name], flush=True)
    batch = even.batch(0, 0)
    figures["saved_bytes"] = {rows: saved_bytes(loss_model, Accumulate(rows), batch)
                              for rows in (ROWS, *PIECES)}
    figures["peak_mb"] = {rows: round(median(peak(rows) for _ in range(1 if quick else 3)), 1)
                          for rows in (ROWS, *PIECES)}
    return figures


# Training ----------------------------------------------------------------------------
def mean_of_means(loss_model, input_ids, targets, precision):
    """The usual mistake: each row counts the same, however few tokens it asks."""
    found = [accumulate_gradients(loss_model, [piece], precision, (piece[1] != -100).sum().item()
                                  * len(targets)) for piece in cut_batch(input_ids, targets, 1)]
    return tuple(map(sum, zip(*found)))


def fit(data, vocab_size: int, seed: int, steps: int, rate: float, **options) -> tuple:
    """(model, history) of one short run."""
    model = new_model(vocab_size, seed, SMALL)
    config = TrainConfig(steps, rate, betas=(0.9, 0.98), seed=seed)
    history = train(model, data, None, config, progress=False,
                    schedule=warmup_cosine(steps, max(1, steps // 30), 0.02), **options)
    return model, history


def curves(quick: bool) -> dict:
    ids, held_out, tokenizer = texts(512)
    make = partial(TokenDataset, document_end=tokenizer.end_of_text)
    data, held_out = make(ids, CONTEXT, ROWS), make(held_out, CONTEXT, ROWS)
    ways = {"whole": compute_gradients, "4 rows": Accumulate(4), "1 row": Accumulate(1),
            "mean of means": mean_of_means}
    steps, seeds = (4, 2) if quick else (250, 3)
    losses, final = {name: [] for name in ways}, {name: [] for name in ways}
    for seed in range(seeds):
        for name, way in ways.items():
            model, history = fit(data, tokenizer.n_vocab, seed, steps, 4e-3, gradients=way)
            losses[name].append([round(x, 7) for x in history.column("loss")[1]])
            final[name].append(round(evaluate_loss(model, held_out), 7))
            print(seed, name, final[name][-1], flush=True)
    apart = {name: [[round(abs(a - b), 7) for a, b in zip(*pair)]
                    for pair in zip(losses[name], losses["whole"])]
             for name in ways if name != "whole"}
    return {"steps": steps, "rows": ROWS, **SMALL, "held_out": final, "apart": apart}


def noise_scale(run, data, rows: int) -> list:
    """(trace of the covariance, squared norm) of one row's gradient, from many rows."""
    batches = [data.batch(10_000, step) for step in range(rows // data.batch_size)]
    pieces = [piece for batch in batches for piece in cut_batch(*batch, 1)]
    tokens = sum((targets != -100).sum().item() for _, targets in pieces) / len(pieces)
    loss_model, mean, squares = LossModel(run.model), 0.0, 0.0
    for piece in pieces:
        run.model.zero_grad()
        accumulate_gradients(loss_model, [piece], tokens=tokens)
        row = torch.cat([p.grad.flatten() for p in run.model.parameters()]).double()
        mean, squares = mean + row / len(pieces), squares + row.square().sum().item()
    run.model.zero_grad()
    long = mean.square().sum().item()
    trace = (squares - len(pieces) * long) / (len(pieces) - 1)
    return [trace, long - trace / len(pieces)]


def batches(quick: bool) -> dict:
    ids, held_out, tokenizer = texts(512)
    make = partial(TokenDataset, document_end=tokenizer.end_of_text)
    held_out, n = make(held_out, SHORT, ROWS), tokenizer.n_vocab
    budget, seeds, rates = (128, 1, (4e-3,)) if quick else (1920, 3, (2e-3, 4e-3, 8e-3, 16e-3))
    rows_of_noise, looks = (32, (1, 2)) if quick else (192, (1, 20, 50, 100, 200))
    found = {}
    for size in (2, 8, 32):
        run = partial(fit, make(ids, SHORT, size), n, steps=budget // size)
        tried = {rate: evaluate_loss(run(seed=99, rate=rate)[0], held_out) for rate in rates}
        best = min(tried, key=tried.get)
        judged = [evaluate_loss(run(seed=seed, rate=best)[0], held_out) for seed in range(seeds)]
        found[size] = {"steps": budget // size, "rate": best, "tried": tried, "held_out": judged}
        print(size, found[size], flush=True)
    noise, data = {step: [] for step in looks}, make(ids, SHORT, 8)
    for seed in range(seeds):
        def look(run):
            if run.step in looks:
                noise[run.step].append(noise_scale(run, data, rows_of_noise))
        fit(data, n, seed, max(looks), 4e-3, callbacks=(look,))
        print("noise", seed, {step: x[-1][0] / x[-1][1] for step, x in noise.items()}, flush=True)
    return {"rows_in_all": budget, "context": SHORT, "batches": found, **SMALL, "noise": noise,
            "noise_rows": rows_of_noise}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--curves", action="store_true", help="train in pieces")
    parser.add_argument("--batches", action="store_true", help="compare batch sizes")
    parser.add_argument("--quick", action="store_true", help="few steps; writes nothing")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    torch.set_num_threads(1)
    part, name = ((curves, "accumulation_curves") if args.curves else
                  (batches, "accumulation_batches") if args.batches else (costs, "accumulation"))
    figures = part(args.quick)
    print(json.dumps(figures)[:3000] if args.quick else record(name, figures))


if __name__ == "__main__":
    main()
