"""What the loop of `train` costs beside the barest loop round the same model, paired.

    python benchmarks/loop_overhead.py             6 layers of width 384, context 256
    python benchmarks/loop_overhead.py --quick     a tiny model, not stored

The bare loop is forward, backward, AdamW and clear, nothing else: no clipping, no look at
the loss, no history. The loops take turns step by step; the figure is the median of the
turns' differences, in percent of the bare step, with the quartiles. What is switched on:
clipping; a log; a full state every 50 steps.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from gptbook.core import GPTConfig, GPTModel, LossModel, set_seed
from gptbook.data import TokenDataset
from gptbook.runs import Progress, TrainConfig, keep, stop_if_hopeless
from gptbook.training import begin_run, make_optimizer, take_step
from results_file import record


def bare(config, data):
    set_seed(0)
    model = GPTModel(config)
    loss_model, adamw = LossModel(model).train(), make_optimizer(model, TrainConfig())
    steps = iter(range(10**9))

    def step():
        loss_model(*data.batch(0, next(steps))).backward()
        adamw.step()
        adamw.zero_grad()

    return step


def loop(config, data, out=None, callbacks=(), **settings):
    """One turn of the loop in `train`."""
    set_seed(0)
    model = GPTModel(config)
    settings = TrainConfig(10**6, steps_per_epoch=10**6, save_every=50, **settings)
    run = begin_run(model, data, settings, out=out)
    loss_model, show = LossModel(model).train(), Progress(run, shown=False)

    def step():
        take_step(run, loss_model, data)
        for callback in (show, *callbacks):
            callback(run)
        keep(run)
        stop_if_hopeless(run, data)

    return step


def timed(step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.
                                     RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    width, layers, length = (64, 2, 64) if args.quick else (384, 6, 256)
    config = GPTConfig(4096, length, width, layers, n_heads=width // 64)
    ids = torch.randint(4096, (50_000,), generator=torch.manual_seed(0)).numpy()
    data = TokenDataset(ids, length, 8)
    folder = tempfile.TemporaryDirectory()
    loops = {
        "nothing optional": loop(config, data, clip_norm=None),
        "clipping": loop(config, data),
        "clipping, a log, a full state every 50 steps": loop(
            config, data, out=Path(folder.name)),
    }
    plain = bare(config, data)
    for step in (plain, *loops.values()):
        step(), step()
    turns = []
    for _ in tqdm(range(4 if args.quick else args.rounds), delay=2):
        before = timed(plain)
        for name, step in loops.items():
            one = timed(step)
            after = timed(plain)
            turns.append((name, 100 * (one / ((before + after) / 2) - 1)))
            before = after
    figures = {}
    for name in loops:
        x = [percent for which, percent in turns if which == name]
        low, median, high = statistics.quantiles(x, n=4)
        figures[name] = dict(median=round(median, 2), quartiles=[round(low, 2), round(high, 2)])
        print(name, figures[name])
    if not args.quick:
        record("loop_overhead", dict(percent=figures, rounds=args.rounds,
                                     shape="6 x 384, 8 x 256 tokens"))


if __name__ == "__main__":
    main()
