"""What a climb and a fall are worth, at a moderate and at a bold peak; and four whole curves.

    python benchmarks/warmup.py            # a few minutes on one core
    python benchmarks/warmup.py --quick    # half a minute, writes nothing

Trains the recipe of the preset `small` at a third of its width on the stories, three seeds.
Runs of one seed share their first weights and their batches, so that they can be compared pair
by pair. A cosine with a climb and without one, at the preset's own peak and at five times
that; and at the bold peak the climb alone, a plateau with a late fall, and one cycle, with
beta_1 as it is and cycled as OneCycleLR does it.
"""
import argparse
import math
from dataclasses import replace

import torch
from results_file import record
from tqdm import tqdm

from gptbook.core import GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.initial_weights import init_copying
from gptbook.presets import PRESETS
from gptbook.schedules import (cosine, one_cycle, warmup, warmup_cosine,
                               warmup_stable_decay)
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import evaluate_loss, train

CLIMB = 0.3  # share of one cycle in which the rate climbs


def cycle_momentum(run):
    """Set beta_1 of the next update to what OneCycleLR would: 0.95, 0.85, 0.95."""
    end, last = CLIMB * run.config.steps - 1, run.config.steps - 1
    s = min(run.step, last)
    a, b, t = (0.95, 0.85, s / end) if s <= end else (0.85, 0.95, (s - end) / (last - end))
    for group in run.optimizer.param_groups:
        group["betas"] = (b + (a - b) * (1 + math.cos(math.pi * t)) / 2, group["betas"][1])


def arms(steps: int, peak: float, bold: float, preset) -> dict:
    """{name: (schedule, peak, callbacks)}."""
    climb = max(1, int(preset.warmup * steps))
    both, fall = warmup_cosine(steps, climb, preset.floor), cosine(steps, preset.floor)
    late = warmup_stable_decay(steps, climb, max(1, steps // 5), preset.floor)
    cycle = one_cycle(steps, CLIMB)
    return {"climb, moderate": (both, peak, ()), "no climb, moderate": (fall, peak, ()),
            "climb, bold": (both, bold, ()), "no climb, bold": (fall, bold, ()),
            "no fall, bold": (warmup(climb), bold, ()),
            "late fall, bold": (late, bold, ()), "one cycle, bold": (cycle, bold, ()),
            "one cycle, momentum too": (cycle, bold, (cycle_momentum,))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bold", type=float, default=5.0, help="times the preset's peak")
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 30, 1
    torch.set_num_threads(1)
    preset = PRESETS["small"]
    sizes = replace(preset, sizes={**preset.sizes, "emb_dim": args.width})
    corpus = stories(2000, validation=60)
    tokenizer = train_bpe(corpus.documents("train"), 1024)
    data, held_out = (
        TokenDataset(tokenize(corpus, tokenizer, split), preset.sizes["context_length"],
                     preset.batch_size, document_end=tokenizer.end_of_text)
        for split in ("train", "validation"))
    peak = preset.training.learning_rate
    runs = arms(args.steps, peak, args.bold * peak, preset)
    losses, curves = {name: [] for name in runs}, {name: [] for name in runs}
    todo = [(seed, name) for seed in range(args.seeds) for name in runs]
    for seed, name in tqdm(todo, "runs"):
        schedule, rate, callbacks = runs[name]
        set_seed(seed)
        model = GPTModel(sizes.model_config(tokenizer.n_vocab))
        init_weights(model, args.width**-0.5)  # the preset's 0.07 is 192 ** -0.5
        init_copying(model)
        config = replace(preset.training, steps=args.steps, learning_rate=rate, seed=seed)
        history = train(model, data, None, config, schedule=schedule, callbacks=callbacks,
                        progress=False)
        losses[name].append(round(evaluate_loss(model, held_out), 4))
        curves[name].append([round(row["loss"], 3) for row in history if "loss" in row])
        tqdm.write(f"{name}, seed {seed}: {losses[name][-1]}")
    figures = {"held_out_nats_per_token": losses, "training_loss_first_seed": {
        name: seeds[0] for name, seeds in curves.items()}, "steps": args.steps,
        "width": args.width, "warmup_steps": max(1, int(preset.warmup * args.steps)),
        "peaks": {"moderate": peak, "bold": args.bold * peak}}
    print(figures["held_out_nats_per_token"] if args.quick else record("warmup", figures))


if __name__ == "__main__":
    main()
