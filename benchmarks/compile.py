"""What torch.compile gives a training step, and what it takes before the first one.

    python benchmarks/compile.py small      # the default stories shape, rows of any length
    python benchmarks/compile.py medium     # 6 layers of 384, rows of 256 tokens
    python benchmarks/compile.py resume     # is a resumed run the same to the bit?

Each about five minutes on one core. A step is one turn of `train`'s loop: batch, forward,
backward, clip, AdamW. Eager and compiled steps take turns on the same batches, and a ratio is
the median over the turns of two times measured one after the other. Compile seconds are what
the first steps took beyond what the same batches took later; each is measured in a process of
its own, first with an empty cache ("cold"), then again with the cache that it left ("warm").
Before it, the process compiled a function of one line, so that imports and what PyTorch finds
out once on each machine are not counted; that is "probe". `--quick` tries it with a tiny model
and writes nothing.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from results_file import record
from tqdm import tqdm

from gptbook.compilation import compiled, why_not_compile
from gptbook.core import GPTConfig, GPTModel, LossModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.precision import precision_for
from gptbook.runs import TrainConfig, use_kernel
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import begin_run, take_step, train

SHAPES = {  # sizes, rows of a batch, whether rows are documents of any length
    "tiny": (dict(vocab_size=400, context_length=64, emb_dim=32, n_layers=1, n_heads=2), 4, True),
    "small": (dict(vocab_size=2048, context_length=192, emb_dim=192, n_layers=3, n_heads=4),
              5, True),
    "medium": (dict(vocab_size=4096, context_length=256, emb_dim=384, n_layers=6, n_heads=6),
               8, False),
}
ROUNDS = {"tiny": 3, "small": 60, "medium": 9}
ARMS = {  # name: kernel, precision, how it is compiled
    "small": ["sdpa/float32/eager", "naive_attention/float32/eager", "sdpa/float32/dynamic",
              "naive_attention/float32/dynamic", "naive_attention/float32/blocks"],
    "medium": ["sdpa/float32/eager", "naive_attention/float32/eager", "sdpa/float32/whole",
               "naive_attention/float32/whole", "sdpa/float32/blocks"],
}
ARMS["tiny"] = ARMS["small"]


def dataset(shape: str) -> TokenDataset:
    sizes, rows, ragged = SHAPES[shape]
    if not ragged:
        ids = np.random.default_rng(0).integers(0, sizes["vocab_size"], 100_000)
        return TokenDataset(ids, sizes["context_length"], rows)
    corpus = stories(1000, validation=100)
    tokenizer = train_bpe(corpus.text("train", 300_000), sizes["vocab_size"])
    return TokenDataset(tokenize(corpus, tokenizer, "train"), sizes["context_length"], rows,
                        document_end=tokenizer.end_of_text)


def by_block(model):
    """Compile the blocks, which share one graph, and leave the rest as it is."""
    for block in model.blocks:
        block.compile(dynamic=True)  # not isolated: they share the code
    return LossModel(model)


HOW = {"eager": LossModel, "whole": compiled(), "dynamic": compiled(dynamic=True),
       "blocks": by_block}


def stepper(shape: str, arm: str, data: TokenDataset):
    """A function that takes the next step and returns its seconds, loss included."""
    kernel, precision, how = arm.split("/")
    set_seed(0)
    model = GPTModel(GPTConfig(**SHAPES[shape][0]))
    init_weights(model, 0.05)
    use_kernel(model, kernel)
    parts = precision_for(precision, torch.device("cpu"))
    run = begin_run(model, data, TrainConfig(10**6), precision=parts)
    loss_model = HOW[how](model).train()

    def step(at: int) -> tuple[float, float]:
        run.step = at
        take_step(run, loss_model, data, precision=parts)
        return run.history[-1]["seconds"], run.history[-1]["loss"]

    return step


def in_turns(shape: str) -> dict:
    """Seconds of a step for each arm, and the ratios to the eager step of its kernel."""
    data, steps = dataset(shape), {}
    for arm in ARMS[shape]:
        steps[arm] = stepper(shape, arm, data)
        began = time.perf_counter()
        for at in range(4):  # all shapes are seen, all kernels are there
            steps[arm](at)
        print(f"{arm}: ready after {time.perf_counter() - began:.1f} s", flush=True)
    turns = []
    for at in tqdm(range(4, 4 + ROUNDS[shape]), "turns", delay=2):
        order = ARMS[shape] if at % 2 else ARMS[shape][::-1]
        turns.append({arm: steps[arm](at) for arm in order})
    seconds = {arm: [turn[arm][0] for turn in turns] for arm in ARMS[shape]}
    eager = min((arm for arm in seconds if arm.endswith("eager")),
                key=lambda arm: statistics.median(seconds[arm]))
    speedups = {arm: sorted(a / b for a, b in zip(seconds[eager], times))
                for arm, times in seconds.items()}
    differ = max(abs(turn[arm][1] - turn[ARMS[shape][0]][1]) / turn[arm][1]
                 for turn in turns for arm in turn)
    n = len(turns)
    return {
        "fastest_eager": eager, "turns": n,
        "seconds_a_step": {arm: round(statistics.median(t), 4) for arm, t in seconds.items()},
        "speedup": {arm: round(statistics.median(s), 3) for arm, s in speedups.items()},
        "speedup_quartiles": {arm: [round(s[n // 4], 3), round(s[-1 - n // 4], 3)]
                              for arm, s in speedups.items()},
        "largest_difference_of_losses": differ,
    }


def first_steps(shape: str, arm: str) -> None:
    """In a process of its own: the seconds of the probe and of the compilation, printed."""
    torch.set_num_threads(1)
    data = dataset(shape)
    began = time.perf_counter()
    assert why_not_compile("cpu") is None
    probe = time.perf_counter() - began
    step = stepper(shape, arm, data)
    first = [step(at)[0] for at in range(3)]
    again = [step(at)[0] for at in range(3)]
    print(json.dumps({"probe": round(probe, 1), "compile": round(sum(first) - sum(again), 1)}))


def compile_seconds(shape: str, arm: str) -> dict:
    """`first_steps` with an empty cache, and with the one that it left."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            out = subprocess.run(
                [sys.executable, __file__, shape, "--first-steps", arm], check=True,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
                stdout=subprocess.PIPE, text=True).stdout
            found[state] = json.loads(out.strip().splitlines()[-1])
            print(arm, state, found[state], flush=True)
    return found


def results_after(data: TokenDataset, dynamic: bool | None, stop_at: int | None) -> tuple:
    """Losses and weights of six compiled steps, stopped and resumed on the way or not."""
    with tempfile.TemporaryDirectory() as out:
        for resume in (False, True) if stop_at else (False,):
            torch._dynamo.reset()  # a new process would know nothing either
            set_seed(0)
            model = GPTModel(GPTConfig(**{**SHAPES["small"][0], "n_layers": 1}))
            init_weights(model, 0.07)

            def stop(run):
                run.stopping = run.step == stop_at

            history = train(
                model, data, None, TrainConfig(6, 4e-3), out=out, callbacks=(stop,),
                loss_model=compiled(dynamic=dynamic), resume=resume, progress=False)
    losses = torch.tensor(history.column("loss")[1], dtype=torch.float64)
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def resumed() -> dict:
    """The largest differences that a stop makes to the losses and to the weights."""
    data, found = dataset("small"), {}
    for dynamic in (None, True):
        whole, parts = (results_after(data, dynamic, at) for at in (None, 3))
        assert len(whole[0]) == len(parts[0]) == 6
        found[f"dynamic={dynamic}"] = {
            what: (a - b).abs().max().item()
            for what, a, b in zip(("losses", "weights"), whole, parts)}
        print(found, flush=True)
    return {"largest_difference": found, "steps": 6, "stopped_after": 3,
            "widths": [data.batch(0, step)[0].shape[1] for step in range(6)]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=[*SHAPES, "resume"], default="small")
    parser.add_argument("--quick", action="store_true", help="a tiny model, not stored")
    parser.add_argument("--first-steps", metavar="ARM", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_steps:
        return first_steps(args.shape, args.first_steps)
    shape = "tiny" if args.quick else args.shape
    torch.set_num_threads(1)
    if shape == "resume":
        return print(record("compile_resume", resumed()))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        figures = in_turns(shape)
    compiled_arms = [arm for arm in ARMS[shape] if not arm.endswith(("eager", "blocks"))]
    best = max(compiled_arms, key=figures["speedup"].get)
    blocks = next(arm for arm in ARMS[shape] if arm.endswith("blocks"))
    figures["best"] = best
    figures["compile_seconds"] = {arm: compile_seconds(shape, arm) for arm in (best, blocks)}
    sizes, rows, ragged = SHAPES[shape]
    figures |= {"sizes": sizes, "rows": rows, "ragged": ragged}
    print(json.dumps(figures, indent=1))
    if not args.quick and shape != "tiny":
        print(record(f"compile_{shape}", figures))


if __name__ == "__main__":
    main()
