"""What training with the rounding in place wins back: equal extra steps, three seeds.

    python benchmarks/qat.py            # about five minutes on one thread of a quiet machine
    python benchmarks/qat.py --quick    # half a minute, writes nothing

The stories model that travels with the package is trained for some more steps on stories that it
has not seen. Once as it is, and rounded afterwards; and once for each grid prepared with it,
and converted afterwards. Runs of one seed share their batches and rates, so that they can be
compared pair by pair. The loss is that of whole held-out stories, in nats a token; "before" is
that of the model without the extra steps. Each finished run is written at once.
"""
import argparse
import copy
from statistics import fmean

import torch
from results_file import record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.core import set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.qat import convert, prepare_qat
from gptbook.quantization import quantize
from gptbook.runs import TrainConfig
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.training import evaluate_loss, train

GRIDS = {  # in groups of 32 but for int8, which has a scale for each row
    "int8": dict(scheme="int8"),
    "int4": dict(scheme="int4"),
    "3 bits": dict(scheme="int4", bits=3),
    "2 bits": dict(scheme="int4", bits=2),
}


def rounded_loss(model, grid: dict, held_out) -> float:
    """The loss of a copy, quantized after training. `bits` have no stored form."""
    model = copy.deepcopy(model)
    if "bits" in grid:
        prepare_qat(model, **grid)
    else:
        quantize(model, **grid)
    return evaluate_loss(model.eval(), held_out)


def trained(model, grid, data, seed: int, steps: int, rate: float):
    """A copy after the extra steps, and its training loss in tenths of them."""
    model = copy.deepcopy(model)
    if grid:
        prepare_qat(model, **grid)
    set_seed(seed)
    config = TrainConfig(steps, rate, betas=(0.9, 0.98), seed=seed)
    history = train(model, data, None, config, progress=False,
                    schedule=warmup_cosine(steps, max(1, steps // 10), 0.0))
    losses, n = history.column("loss")[1], max(1, steps // 10)
    return model, [round(fmean(losses[i:i + n]), 4) for i in range(0, len(losses), n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 10, 1
    torch.set_num_threads(1)
    model, tokenizer = load_demo()
    corpus = stories(2000, seed=1, validation=60)  # the model was trained on seed 0
    data, held_out = (
        TokenDataset(tokenize(corpus, tokenizer, split), 192, rows,
                     document_end=tokenizer.end_of_text)
        for split, rows in (("train", args.rows), ("validation", 8)))
    float_loss = evaluate_loss(model, held_out)
    before = {name: rounded_loss(model, grid, held_out) for name, grid in GRIDS.items()}
    print("float", round(float_loss, 5), {n: round(x - float_loss, 5) for n, x in before.items()})
    fine_tuned, after, aware, curves = [], {}, {}, {}
    todo = [(seed, name) for seed in range(args.seeds) for name in (None, *GRIDS)]
    for seed, name in tqdm(todo, "runs"):
        grid = GRIDS.get(name)
        tuned, curve = trained(model, grid, data, seed, args.steps, args.rate)
        curves.setdefault(name or "float", []).append(curve)
        if grid is None:
            fine_tuned.append(evaluate_loss(tuned, held_out))
            for other, its in GRIDS.items():
                after.setdefault(other, []).append(rounded_loss(tuned, its, held_out))
        else:
            loss = evaluate_loss(tuned.eval(), held_out)
            if "bits" not in grid:
                convert(tuned)
                assert evaluate_loss(tuned.eval(), held_out) == loss, "converted = prepared"
            aware.setdefault(name, []).append(loss)
        if not args.quick:
            record("qat", {
                "loss_before": {"float": float_loss, **before}, "fine_tuned": fine_tuned,
                "fine_tuned_then_rounded": after, "aware_then_converted": aware,
                "training_loss_in_tenths": curves, "steps": args.steps, "rate": args.rate,
                "tokens_a_step": args.rows * 192,
                "held_out_stories": 60, "parameters": sum(p.numel() for p in model.parameters())})
    for name in GRIDS:
        for tuned, ptq, qat in zip(fine_tuned, after[name], aware[name]):
            print(f"{name}: {ptq - tuned:+.5f} rounded, {qat - tuned:+.5f} aware, "
                  f"fine-tuned {tuned - float_loss:+.5f}")


if __name__ == "__main__":
    main()
