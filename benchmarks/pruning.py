"""What pruning costs: one number for each sparsity, before and after a short recovery.

    python benchmarks/pruning.py           # about eight minutes on one core
    python benchmarks/pruning.py --quick   # seconds, writes nothing

Prunes the stories model that travels with the package in many ways and measures the loss on
stories that it has not seen. Then some of the pruned models, and the dense one for comparison,
train for a few steps on new stories, masks in place; three seeds that decide the order of the
batches, the same for all. Finished runs are recorded at once.
"""
import argparse
from functools import partial
from statistics import mean

import torch
from results_file import record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.data import TokenDataset, tokenize
from gptbook.pruning import GradualPruning, prune, sparsity
from gptbook.runs import TrainConfig, use_kernel
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.structured_pruning import head_scores, neuron_scores, prune_heads, prune_neurons
from gptbook.training import evaluate_loss, train

AMOUNTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NEURONS = (0.1, 0.2, 0.35, 0.5)
HEADS = (1, 2, 3, 5, 8)  # of 16
THIRD, FIFTH = 1 / 3, 0.2


def smaller(model, share: float, batches: list) -> None:
    """Remove this share of all heads and of the neurons, by their effect on the loss."""
    heads, neurons = head_scores(model, batches), neuron_scores(model, batches)
    prune_heads(model, share, heads, scope="global")
    prune_neurons(model, share, neurons, scope="layer")


def ways(batches: list, steps: int) -> dict:
    """{name: (what is done to the model before it trains, callbacks)}."""
    masked = {f"{amount:.0%} of the weights": (partial(prune, amount=amount), ())
              for amount in (0.2, 0.5, 0.6, 0.7)}
    gradual = GradualPruning(0.7, 0, steps // 2, max(1, steps // 20))
    return {
        "dense": (lambda model: None, ()), **masked,
        "70% of the weights, gradually": (partial(prune, amount=0.0), (gradual,)),
        "2:4": (partial(prune, amount="2:4"), ()),
        "20% of heads and neurons": (lambda model: smaller(model, FIFTH, batches), ()),
        "33% of heads and neurons": (lambda model: smaller(model, THIRD, batches), ()),
    }


def loaded():
    model, tokenizer = load_demo()
    use_kernel(model, "naive_attention")
    return model, tokenizer


def at_once(held_out, batches: list, amounts, heads, neurons) -> dict:
    """The loss right after pruning, nothing trained."""
    def loss(change) -> float:
        change(model := loaded()[0])
        return round(evaluate_loss(model, held_out), 5)

    jobs = {("weights", scope, a): partial(prune, amount=a, scope=scope)
            for scope in ("global", "layer") for a in amounts}
    jobs[("weights", "2:4", 0.5)] = partial(prune, amount="2:4")
    for kind, take, score, shares in (
            ("heads", prune_heads, head_scores, [n / 16 for n in heads]),
            ("neurons", prune_neurons, neuron_scores, neurons)):
        for share in shares:
            jobs[kind, "by size", share] = partial(
                lambda model, take, share: take(model, share, scope="global"),
                take=take, share=share)
            jobs[kind, "by effect", share] = partial(
                lambda model, take, score, share: take(
                    model, share, score(model, batches), scope="global"),
                take=take, score=score, share=share)
    found = {}
    for (kind, how, share), job in tqdm(jobs.items(), "pruned, not trained"):
        found.setdefault(f"{kind}, {how}", {})[f"{share:g}"] = loss(job)
    return found


def recover(way, data, held_out, seed: int, steps: int, rate: float) -> tuple:
    """(nats before, nats after, share of zeros, parameters) of one run."""
    change, callbacks = way
    change(model := loaded()[0])
    before = evaluate_loss(model, held_out)
    config = TrainConfig(steps, rate, betas=(0.9, 0.98), seed=seed)
    train(model, data, None, config, schedule=warmup_cosine(steps, max(1, steps // 10), 0.02),
          callbacks=callbacks, progress=False)
    after = evaluate_loss(model, held_out)
    return (round(before, 5), round(after, 5), round(sparsity(model), 5),
            sum(p.numel() for p in model.parameters()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.steps, args.seeds, args.held_out = 3, 1, 8
    tokenizer = loaded()[1]
    new, unseen = stories(200 if args.quick else 4000, seed=2), stories(1, 977, args.held_out)
    data, held_out = (TokenDataset(tokenize(corpus, tokenizer, split), 192, args.rows,
                                   document_end=tokenizer.end_of_text)
                      for corpus, split in ((new, "train"), (unseen, "validation")))
    batches = [data.batch(99, step) for step in range(2 if args.quick else 16)]
    short = (AMOUNTS[::5], HEADS[:1], NEURONS[:1])
    figures = {
        "steps": args.steps, "learning_rate": args.rate, "rows": args.rows,
        "held_out_stories": args.held_out, "seeds": args.seeds,
        "at_once": at_once(held_out, batches, *(short if args.quick else (AMOUNTS, HEADS, NEURONS))),
        "recovered": {},
    }
    runs = [(seed, name) for seed in range(args.seeds) for name in ways(batches, args.steps)]
    for seed, name in tqdm(runs, "recovery"):
        way = ways(batches, args.steps)[name]
        before, after, zeros, size = recover(way, data, held_out, seed, args.steps, args.rate)
        kept = figures["recovered"].setdefault(
            name, {"before": before, "after": [], "sparsity": zeros, "parameters": size})
        kept["after"].append(after)
        tqdm.write(f"{name}, seed {seed}: {before:.4f} -> {after:.4f}, zeros {zeros:.3f}")
        if not args.quick:
            record("pruning", figures)
    for name, kept in figures["recovered"].items():
        print(f"{name}: {kept['before']:.4f} -> {mean(kept['after']):.4f} nats a token")


if __name__ == "__main__":
    main()
