"""Training speed and memory beside nanoGPT's loop and transformers' GPT-2, paired.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/training_throughput.py --nanogpt nanoGPT
    python benchmarks/training_throughput.py --quick          small shape, two peers, not stored

Every peer gets the same batches, sizes, precision and optimiser settings, without dropout.
A step is what its own loop does: forward, backward, clip, AdamW, clear. The peers take
turns step by step (A B C A B C), and a ratio is the median over the turns of two times that
were measured one after the other. Memory is the peak of a fresh process for each peer, less
that of a process that has imported the same packages.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from gptbook.compilation import compiled
from gptbook.core import GPTConfig, GPTModel, LossModel, set_seed
from gptbook.data import TokenDataset
from gptbook.less_memory import ChunkedLoss
from gptbook.precision import precision_for
from gptbook.runs import KERNELS, TrainConfig, use_kernel
from gptbook.throughput import use_one_product
from gptbook.training import begin_run, take_step
from results_file import RESULTS, record

DEVICE = torch.device("cpu")  # gpu_training.py sets another
SHAPES = {  # vocabulary, context, width, layers, heads; rows of a timed batch
    "6x384": (dict(vocab_size=4096, context_length=256, emb_dim=384, n_layers=6, n_heads=6), 8),
    "124M": (dict(vocab_size=50257, context_length=512, emb_dim=768, n_layers=12, n_heads=12), 1),
}


def batches(sizes: dict, rows: int) -> TokenDataset:
    ids = np.random.default_rng(0).integers(0, sizes["vocab_size"], 100_000)
    return TokenDataset(ids, sizes["context_length"], rows)


def gptbook_step(sizes, rows, precision, compile_it, options):
    """One turn of the loop of `train`, with the kernel and the loss that are named."""
    set_seed(0)
    model = GPTModel(GPTConfig(**sizes))
    use_kernel(model, options.get("kernel", "sdpa"))
    if options.get("one_product", True):
        use_one_product(model)
    loss = {"plain": LossModel, "chunked": ChunkedLoss}[options.get("loss", "chunked")]
    data, parts = batches(sizes, rows), precision_for(precision, DEVICE)
    run = begin_run(model, data, TrainConfig(10**6), precision=parts)
    loss_model = (compiled(loss) if compile_it else loss)(model).train()
    return lambda: take_step(run, loss_model, data, precision=parts)


def bare_loop(model, loss_of, optimizer, sizes, rows, precision, compile_it):
    """nanoGPT's loop: autocast, backward, clip, step, clear, with a log of the loss."""
    data, parts = batches(sizes, rows), precision_for(precision, DEVICE)
    model.to(DEVICE).train()
    called, device = torch.compile(model) if compile_it else model, DEVICE
    steps = iter(range(10**9))

    def step():
        x, y = (t.to(device) for t in data.batch(0, next(steps)))
        with parts.autocast():
            loss = loss_of(called, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def nanogpt_step(sizes, rows, precision, compile_it, options):
    sys.path.insert(0, options["path"])
    from model import GPT
    from model import GPTConfig as Config

    model = GPT(Config(  # moved before its optimiser is made
        block_size=sizes["context_length"], vocab_size=sizes["vocab_size"], dropout=0.0,
        n_layer=sizes["n_layers"], n_head=sizes["n_heads"], n_embd=sizes["emb_dim"])).to(DEVICE)
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE.type)
    return bare_loop(model, lambda m, x, y: m(x, y)[1], adamw, sizes, rows, precision,
                     compile_it)


def transformers_step(sizes, rows, precision, compile_it, options):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=sizes["vocab_size"], n_positions=sizes["context_length"],
        n_embd=sizes["emb_dim"], n_layer=sizes["n_layers"], n_head=sizes["n_heads"],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)).to(DEVICE)
    adamw = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1,
                              fused=True)  # what its Trainer takes

    def loss_of(m, x, y):
        logits = m(x).logits  # our targets are shifted already
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    return bare_loop(model, loss_of, adamw, sizes, rows, precision, compile_it)


MAKE = {"gptbook": gptbook_step, "nanoGPT": nanogpt_step, "transformers": transformers_step}


def best_options(sizes, rows, precision) -> dict:
    """Kernel and projections that are fastest here, by the clock, as for a real run."""
    ways = [dict(kernel=kernel, one_product=one) for kernel in KERNELS for one in (True, False)]
    steps = [gptbook_step(sizes, rows, precision, False, way) for way in ways]
    for step in steps:
        step()
    turns = [[timed(step) for step in steps] for _ in range(4)]
    best = [min(times) for times in zip(*turns)]
    return ways[best.index(min(best))]


def timed(step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def compare(shape, precision, compile_it, options, rounds) -> dict:
    """Seconds of a step for each peer, in turns, and the median ratio to ours."""
    sizes, rows = SHAPES[shape]
    options["gptbook"] |= best_options(sizes, rows, precision)
    steps = {name: MAKE[name](sizes, rows, precision, compile_it, its)
             for name, its in options.items()
             if not (compile_it and name == "transformers")}
    for step in steps.values():
        step(), step()
    turns = [{name: timed(step) for name, step in steps.items()} for _ in tqdm(
        range(rounds), f"{shape} {precision}{' compiled' * compile_it}", delay=2)]
    tokens = rows * sizes["context_length"]
    return {
        "ours": options["gptbook"],
        "tokens_per_s": {n: round(tokens / statistics.median(t[n] for t in turns), 1)
                         for n in steps},
        "ratio": {n: round(statistics.median(t[n] / t["gptbook"] for t in turns), 3)
                  for n in steps if n != "gptbook"},
        "ratios": {n: [round(t[n] / t["gptbook"], 3) for t in turns]
                   for n in steps if n != "gptbook"},
    }


def measure_memory(shape, rows, name, options) -> float:  # GB
    """The peak of a fresh process that takes two steps, less that of one that takes none."""
    peaks = []
    for steps in (2, 0):
        job = json.dumps([shape, rows, name, options, steps])
        out = subprocess.run([sys.executable, __file__, "--memory-of", job], check=True,
                             capture_output=True, text=True).stdout
        peaks.append(float(out.strip().splitlines()[-1]))
    return round((peaks[0] - peaks[1]) / 1e9, 3)


def memory_of(shape, rows, name, options, steps) -> None:
    if steps:
        step = MAKE[name](SHAPES[shape][0], rows, "float32", False, options)
        for _ in range(steps):
            step()
    status = Path("/proc/self/status").read_text()  # ru_maxrss inherits the parent's peak
    print(1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.
                                     RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a checkout of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="only these, as 6x384/float32/eager")
    parser.add_argument("--memory", action="store_true", help="measure it again")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return memory_of(*json.loads(args.memory_of))
    options = {"gptbook": {}, "transformers": {}}
    if args.nanogpt:
        options["nanoGPT"] = dict(path=str(Path(args.nanogpt).resolve()))
    cases = [f"{shape}/{precision}/{how}" for shape in SHAPES
             for how in ("eager", "compiled") for precision in ("float32", "bfloat16")]
    cases = ["6x384/float32/eager"] if args.quick else (
        cases if args.cases is None else args.cases)
    figures = {"speed": {}, "memory_GB": {}}
    stored = RESULTS / "training_throughput.json"
    if args.cases is not None and stored.exists():  # the others stay
        figures = json.loads(stored.read_text())["figures"]
    for case in cases:
        shape, precision, how = case.split("/")
        made = compare(shape, precision, how == "compiled", {**options, "gptbook": {}},
                       2 if args.quick else args.rounds)
        print(case, json.dumps(made), flush=True)
        figures["speed"][case] = made
        if not args.quick:
            record("training_throughput", figures)
    if args.memory or (args.cases is None and not args.quick):
        figures["memory_GB"] = {name: measure_memory("124M", 4, name, its)
                                for name, its in options.items()}
        print(figures["memory_GB"])
        record("training_throughput", figures)


if __name__ == "__main__":
    main()
