"""Whether an average of the weights replaces the decay of the learning rate.

    python benchmarks/averages.py            # about five minutes on one core
    python benchmarks/averages.py --add --rates 2e-3    # one more rate beside those stored
    python benchmarks/averages.py --quick    # a look, writes nothing

Trains one small model on the stories at several rates: with the rate constant after its climb,
with a cosine decay, and with a cosine over half as many steps. Beside each run stand averages of
its weights, validated as it goes on. Three seeds; the runs of a seed share their first weights
and their batches. The cost is the time of one average beside that of its step, step by step.
"""
import argparse
import time
from statistics import median

import torch
from results_file import load, record

from gptbook.averages import WeightAverage
from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.presets import PRESETS
from gptbook.runs import TrainConfig
from gptbook.schedules import warmup, warmup_cosine
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import evaluate_loss, train

TINY = PRESETS["tiny"]
CONTEXT, BATCH = 64, 4
DECAYS = {  # how the average begins; all are to remember about a thousand steps in the end
    "ramped": 0.999,
    "corrected as in Adam": lambda n: (0.999 - 0.999**n) / (1 - 0.999**n),
    "from the first weights": lambda n: 0.999,
}


def make_data():
    """(training, held-out) windows, and the size of the vocabulary."""
    corpus = stories(1500, validation=40)
    tokenizer = train_bpe(corpus.text("train", 300_000), 512)
    ids = {split: tokenize(corpus, tokenizer, split) for split in ("train", "validation")}
    end = tokenizer.end_of_text
    return (TokenDataset(ids["train"], CONTEXT, BATCH, document_end=end),
            TokenDataset(ids["validation"], CONTEXT, 32, document_end=end), tokenizer.n_vocab)


def climb_of(steps):
    return int(TINY.warmup * steps)


def fall(steps):
    return warmup_cosine(steps, climb_of(steps), TINY.floor)


def one_run(data, held_out, vocab_size, schedule, rate, steps, seed, every, decays):
    """{name: {step: held-out loss}} of the last weights and of each average; cost ratios."""
    set_seed(seed)
    model = GPTModel(GPTConfig(vocab_size, CONTEXT, 48, n_layers=2, n_heads=2))
    init_weights(model, TINY.init_std)
    averages = {name: WeightAverage(model, decay) for name, decay in decays.items()}
    losses, cost = {name: {} for name in ("last weights", *averages)}, []

    def timed(run):
        for average in averages.values():
            started = time.perf_counter()
            average(run)
            cost.append((time.perf_counter() - started) / run.history[-1]["seconds"])

    def look(run):
        if run.at(every):
            losses["last weights"][run.step] = evaluate_loss(model, held_out)
            for name, average in averages.items():
                with average.applied(model):
                    losses[name][run.step] = evaluate_loss(model, held_out)

    config = TrainConfig(steps, rate, betas=TINY.training.betas, seed=seed)
    train(model, data, None, config, schedule=schedule, callbacks=(timed, look), progress=False)
    return losses, cost


def note(kept, name, curves):
    """Add the losses of one seed: {schedule: {weights: {step: [a loss a seed]}}}."""
    for weights, curve in curves.items():
        for step, loss in curve.items():
            kept.setdefault(name, {}).setdefault(weights, {}).setdefault(step, []).append(
                round(loss, 4))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--add", action="store_true", help="keep the rates that are stored")
    parser.add_argument("--quick", action="store_true", help="80 steps, one seed, no file")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.every = 80, 1, 20
    torch.set_num_threads(1)
    data, held_out, vocab_size = make_data()
    ramped, losses, costs = {"ramped": DECAYS["ramped"]}, {}, []
    for seed in range(args.seeds):
        for rate in args.rates:
            kept = losses.setdefault(f"{rate:g}", {})
            plans = {"constant": (args.steps, warmup(climb_of(args.steps)), DECAYS),
                     "cosine": (args.steps, fall(args.steps), ramped),
                     "half as long": (args.steps // 2, fall(args.steps // 2), ramped)}
            for name, (steps, schedule, decays) in plans.items():
                curves, cost = one_run(data, held_out, vocab_size, schedule, rate, steps,
                                       seed, args.every, decays)
                note(kept, name, curves)
                costs += cost
                print(f"seed {seed}, rate {rate:g}, {name}: " + ", ".join(
                    f"{weights} {curve[steps]:.3f}" for weights, curve in curves.items()),
                    flush=True)
    cost = round(median(costs), 4)
    if args.add:  # the runs do not depend on each other, so they may be made one by one
        stored = load("averages")["figures"]
        if (stored["steps"], stored["seeds"]) != (args.steps, args.seeds):
            raise SystemExit("the stored runs have other steps or seeds: run without --add")
        losses, cost = {**stored["losses"], **losses}, stored["cost_share_of_a_step"]
    losses = dict(sorted(losses.items(), key=lambda item: float(item[0])))
    figures = {
        "losses": losses, "steps": args.steps, "seeds": args.seeds,
        "rates": [float(rate) for rate in losses],
        "tokens_per_step": CONTEXT * BATCH, "held_out_tokens": len(held_out.ids),
        "cost_share_of_a_step": cost}
    if args.quick:
        print("cost", cost, "of a step; nothing was written")
    else:
        print(record("averages", figures))


if __name__ == "__main__":
    main()
