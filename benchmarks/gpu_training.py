"""Chapter 1 on a GPU: every claim of its tables, measured on one card in a few minutes.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/gpu_training.py --nanogpt nanoGPT
    python benchmarks/gpu_training.py --parts loop resume
    python benchmarks/gpu_training.py --quick --device cpu     tiny shapes, not stored

Peers take turns step by step (A B C A B C), each step waits for the card, and a ratio is the
median over the turns of two times measured one after the other. Memory is the peak of the
allocator above what was there before the model. Figures are stored after each part, so a run
that is cut off keeps what it has; a part that fails stores its error.
"""
import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import nn

import training_throughput as peers
from gptbook.accumulation import Accumulate
from gptbook.compilation import compiled
from gptbook.core import GPTConfig, GPTModel, LossModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.less_memory import ChunkedLoss, checkpoint_activations
from gptbook.precision import precision_for
from gptbook.runs import TrainConfig, use_kernel
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.throughput import flops_per_token, matmul_peak, use_one_product
from gptbook.tokenizer import train_bpe
from gptbook.training import (
    begin_run, compute_gradients, evaluate_loss, make_optimizer, take_step, train)
from results_file import RESULTS, record

SHAPES = {  # sizes, rows
    "3x192": (dict(vocab_size=2048, context_length=192, emb_dim=192, n_layers=3, n_heads=4), 5),
    "6x384": (dict(vocab_size=4096, context_length=256, emb_dim=384, n_layers=6, n_heads=6), 64),
    "124M": (dict(vocab_size=50257, context_length=1024, emb_dim=768, n_layers=12, n_heads=12),
             16),
}
TINY = (dict(vocab_size=64, context_length=16, emb_dim=16, n_layers=1, n_heads=2), 2)
NAMES = ("float32", "bfloat16", "float16")
WHERE = {"device": "cuda"}  # set by --device


def device() -> torch.device:
    return torch.device(WHERE["device"])


def wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def fresh() -> None:
    """Forget what earlier parts left on the card."""
    gc.collect()
    torch._dynamo.reset()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def timed(step) -> float:
    wait()
    started = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started


def in_turns(steps: dict, rounds: int, first: str) -> dict:
    """Seconds of each, and the ratios to `first` of the same turn, with quartiles."""
    for step in steps.values():
        step(), step(), step()
    turns = [{name: timed(step) for name, step in steps.items()} for _ in range(rounds)]
    found = {}
    for name in steps:
        ratios = sorted(turn[name] / turn[first] for turn in turns)
        found[name] = {
            "ms": round(1000 * statistics.median(turn[name] for turn in turns), 3),
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(ratios[rounds // 4], 4), round(ratios[-1 - rounds // 4], 4)]}
    return found


def random_rows(sizes: dict, rows: int) -> TokenDataset:
    ids = np.random.default_rng(0).integers(0, sizes["vocab_size"], 400_000)
    return TokenDataset(ids, sizes["context_length"], rows)


def new_model(sizes: dict, one_product=False) -> GPTModel:
    set_seed(0)
    model = GPTModel(GPTConfig(**sizes)).to(device())
    if one_product:
        use_one_product(model)
    return model


def ours(sizes, rows, precision="float32", loss=LossModel, one_product=False, again=False,
         **settings):
    """One turn of the loop of `train`."""
    model, data = new_model(sizes, one_product), random_rows(sizes, rows)
    if again:
        checkpoint_activations(model)
    parts = precision_for(precision, device())
    run = begin_run(model, data, TrainConfig(10**6, **settings), precision=parts)
    loss_model = loss(model).train()
    return lambda: take_step(run, loss_model, data, precision=parts)


def peer(name, sizes, rows, precision, compile_it, path):
    """One turn of the loop of a peer; both have fused AdamW."""
    return peers.MAKE[name](sizes, rows, precision, compile_it, dict(path=path))


# The parts ---------------------------------------------------------------------------
def roof(args) -> dict:
    """Operations a second of large products, as a share of which a step is judged."""
    size = 256 if args.quick else 8192
    found = {name: matmul_peak(device(), getattr(torch, name), size) / 1e12
             for name in NAMES}
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = matmul_peak(device(), torch.float32, size) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    return {name: round(value, 1) for name, value in found.items()}


def precision(args) -> dict:
    """Whole steps in each precision, in turns; and the peak of memory of each."""
    steps, memory = {}, {}
    for shape, (sizes, rows) in args.shapes.items():
        for what in (steps, memory):
            what[shape] = {}
        found = in_turns({name: ours(sizes, rows, name) for name in NAMES}, args.rounds, "float32")
        steps[shape] = found
        fresh()
        for name in NAMES[:2]:
            for n in (rows, max(1, rows // 8)):
                memory[shape][f"{name}, {n} rows"] = peak_mb(lambda: ours(sizes, n, name))
    return {"steps": steps, "peak_mb": memory}


def peak_mb(make) -> float:
    """The peak of two steps, in MB, above what was allocated before."""
    fresh()
    if device().type != "cuda":
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    step(), step()
    wait()
    found = (torch.cuda.max_memory_allocated() - before) / 1e6
    del step
    return round(found, 1)


def fit(name: str, seed: int, steps: int, where: str) -> float:
    """Held-out loss of a short run on the stories, in a process of its own."""
    WHERE["device"] = where
    torch.set_num_threads(1)
    corpus = stories(4_000, validation=200)
    tokenizer = train_bpe(corpus.text("train", 400_000), 512)
    data, held_out = (
        TokenDataset(tokenize(corpus, tokenizer, split), 96, 6, document_end=tokenizer.end_of_text)
        for split in ("train", "validation"))
    set_seed(seed)
    model = GPTModel(GPTConfig(tokenizer.n_vocab, 96, 64, 2, 4))
    init_weights(model, 64**-0.5)
    model = model.to(device())
    parts = precision_for(name if name in NAMES else "float32", device())
    if name not in NAMES:
        model = model.bfloat16()
    train(model, data, None, TrainConfig(steps, 4e-3, seed=seed), precision=parts,
          progress=False, schedule=warmup_cosine(steps, max(1, steps // 20), 0.02))
    return evaluate_loss(model.float(), held_out)


def accuracy(args) -> dict:
    """The same short runs in each precision, all at once, one process each."""
    names, seeds = (*NAMES, "bfloat16 weights"), 1 if args.quick else 3
    todo = [(name, seed) for name in names for seed in range(seeds)]
    steps = 5 if args.quick else 400
    with ProcessPoolExecutor(2 if args.quick else 12, get_context("spawn")) as pool:
        losses = [*pool.map(fit, *zip(*todo), [steps] * len(todo), [WHERE["device"]] * len(todo))]
    found = {name: [] for name in names}
    for (name, _), loss in zip(todo, losses):
        found[name].append(round(loss, 5))
    return {"held_out": found, "steps": steps}


def accumulation(args) -> dict:
    """One batch whole and in pieces: gradients, seconds, memory."""
    sizes, rows = args.largest
    model = LossModel(new_model(sizes)).train()
    x, y = (t.to(device()) for t in random_rows(sizes, rows).batch(0, 0))
    y[: rows // 2, 3:] = -100  # ragged
    grads, apart = {}, {}
    ways = {"whole": compute_gradients, **{str(n): Accumulate(n) for n in (rows // 2, 1) if n}}
    for name, way in ways.items():
        model.zero_grad()
        way(model, x, y, precision_for("float32", device()))
        grads[name] = [p.grad.clone() for p in model.parameters()]
        pairs = [*zip(grads[name], grads["whole"])]
        apart[name] = (sum((a - b).square().sum() for a, b in pairs)
                       / sum(b.square().sum() for _, b in pairs)).sqrt().item()
    del grads
    model.zero_grad()
    bf16 = precision_for("bfloat16", device())

    def step(way):
        return lambda: (way(model, x, y, bf16), model.zero_grad())

    seconds = in_turns({n: step(way) for n, way in ways.items()}, args.rounds, "whole")
    memory = {n: peak_mb(lambda: step(way)) for n, way in ways.items()}
    return {"rows": rows, "relative_difference": apart, "steps_bfloat16": seconds,
            "peak_mb_bfloat16": memory}


def less_memory(args) -> dict:
    """Cures for a full card: peak and time of whole steps, in bfloat16."""
    sizes, rows = args.largest
    ways = {"plain": {}, "chunked": dict(loss=ChunkedLoss), "checkpointed": dict(again=True),
            "both": dict(loss=ChunkedLoss, again=True)}
    found = {}
    for name in NAMES[1:2]:
        memory = {way: peak_mb(lambda: ours(sizes, rows, name, **how))
                  for way, how in ways.items()}
        times = in_turns({way: ours(sizes, rows, name, **how) for way, how in ways.items()},
                         args.rounds, "plain")
        found[name] = {"peak_mb": memory, "steps": times}
        fresh()
    return found


def throughput(args) -> dict:
    """Beside nanoGPT and transformers: eager in both precisions, compiled in bfloat16."""
    found = {}
    cases = [(shape, name, how) for how in ("eager", "compiled") for shape in args.shapes
             if shape != "3x192" for name in NAMES[:2]
             if how == "eager" or (name == "bfloat16" and not args.quick)]
    for shape, name, how in cases:
        sizes, rows = args.shapes[shape]
        fresh()
        loss, wanted = (compiled(), "compiled") if how == "compiled" else (LossModel, "eager")
        steps = {"gptbook": ours(sizes, rows, name, loss, one_product=True)}
        if wanted == "eager":
            steps |= {"gptbook, three products": ours(sizes, rows, name),
                      "gptbook, chunked": ours(sizes, rows, name, ChunkedLoss, True),
                      "transformers": peer(
                          "transformers", sizes, rows, name, False, None)}
        if args.nanogpt:
            steps["nanoGPT"] = peer(
                "nanoGPT", sizes, rows, name, how == "compiled", args.nanogpt)
        case = in_turns(steps, args.rounds, "gptbook")
        tokens = rows * sizes["context_length"]
        for one in case.values():
            one["tokens_per_s"] = round(1000 * tokens / one["ms"])
        with torch.device("meta"):
            case["flops_per_token"] = flops_per_token(
                GPTModel(GPTConfig(**sizes)), sizes["context_length"])
        found[f"{shape}/{name}/{how}"] = case
        print(shape, name, how, {k: v for k, v in case.items()}, flush=True)
        args.store("throughput", found)
    memory = {}
    sizes, rows = args.largest
    rows = min(rows, 4)
    sizes = {**sizes, "context_length": min(512, sizes["context_length"])}
    kinds = {"gptbook": lambda: ours(sizes, rows, loss=ChunkedLoss, one_product=True)}
    for other in ("transformers", *(["nanoGPT"] if args.nanogpt else [])):
        kinds[other] = lambda other=other: peer(
            other, sizes, rows, "float32", False, args.nanogpt)
    for name, make in kinds.items():
        memory[name] = peak_mb(make)
    return {**found, "peak_mb_4x512_float32": memory}


def compile_gain(args) -> dict:
    """Compiled and eager steps of our own loop, and the seconds before the first."""
    found = {}
    for shape, (sizes, rows) in args.shapes.items():
        if shape == "3x192":  # its rows have any length
            continue
        fresh()
        steps, first = {}, 0.0
        for how, loss in (("eager", LossModel), ("compiled", compiled())):
            steps[how] = ours(sizes, rows, "bfloat16", loss, one_product=True)
            first = timed(steps[how])
        case = in_turns(steps, args.rounds, "compiled")
        found[shape] = {**case, "first_step_s": round(first, 1)}
        args.store("compile", found)
    return found


def loop(args) -> dict:
    """The loop of `train` beside the barest one, in percent of a step."""
    found = {}
    for shape, (sizes, rows) in args.shapes.items():
        model, data = new_model(sizes), random_rows(sizes, rows)
        adamw, loss_model, at = make_optimizer(model, TrainConfig()), LossModel(model), iter(
            range(10**9))

        def bare():
            loss_model(*(t.to(device()) for t in data.batch(0, next(at)))).backward()
            adamw.step()
            adamw.zero_grad()

        steps = {"bare": bare, "nothing optional": ours(sizes, rows, clip_norm=None),
                 "clipping": ours(sizes, rows)}
        found[shape] = in_turns(steps, (1 if shape == "124M" else 3) * args.rounds, "bare")
        fresh()
    return found


def resume(args) -> dict:
    """Is a run that was stopped and resumed the same to the bit? On a GPU, too?"""
    sizes, rows = (TINY if args.quick else SHAPES["3x192"])
    data, found = random_rows(sizes, rows), {}
    for name in NAMES:
        ends = []
        for parts in ((8,), (8,), (3, 8)):  # twice whole, then in two parts
            with tempfile.TemporaryDirectory() as out:
                for i, end in enumerate(parts):
                    model = new_model({**sizes, "drop_rate": 0.1})

                    def stop(run, end=end):
                        run.stopping = run.step == end

                    train(model, data, None, TrainConfig(8, 1e-3), out=out, resume=i > 0,
                          precision=precision_for(name, device()), callbacks=(stop,),
                          progress=False)
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        found[name] = {"two_runs": bool(torch.equal(ends[0], ends[1])),
                       "resumed": bool(torch.equal(ends[0], ends[2])),
                       "apart": (ends[0] - ends[2]).abs().max().item()}
    return found


def attention(args) -> dict:
    """Naive and fused attention, forward and backward, against the length."""
    found = {}
    for length in (64,) if args.quick else (128, 512, 2048):
        sizes = {**args.largest[0], "context_length": length, "vocab_size": 512}
        rows = max(1, (128 if args.quick else 16_384) // length)
        steps = {}
        for kernel in ("sdpa", "naive_attention"):
            model = new_model(sizes)
            use_kernel(model, kernel)
            data, parts = random_rows(sizes, rows), precision_for("bfloat16", device())
            run = begin_run(model, data, TrainConfig(10**6), precision=parts)
            loss_model = LossModel(model)
            steps[kernel] = lambda r=run, m=loss_model, d=data, p=parts: take_step(
                r, m, d, precision=p)
        found[length] = in_turns(steps, args.rounds, "sdpa")
        fresh()
    return found


PARTS = {"roof": roof, "resume": resume, "accuracy": accuracy, "precision": precision,
         "loop": loop, "accumulation": accumulation, "less_memory": less_memory,
         "attention": attention, "compile": compile_gain, "throughput": throughput}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.
                                     RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a checkout of it")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, not stored")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return print("no CUDA device here: nothing was measured")
    WHERE["device"], peers.DEVICE = args.device, torch.device(args.device)
    if args.nanogpt:
        args.nanogpt = str(Path(args.nanogpt).resolve())
    args.shapes = {"tiny": TINY} if args.quick else SHAPES
    args.largest = TINY if args.quick else SHAPES["124M"]
    if args.quick:
        args.rounds = 4
    stored = RESULTS / "gpu_training.json"
    figures = json.loads(stored.read_text())["figures"] if stored.exists() else {}

    def store(part, found):
        figures[part] = found
        if not args.quick:
            record("gpu_training", figures)

    args.store = store
    for part in args.parts:
        started = time.perf_counter()
        try:
            found = PARTS[part](args)
        except Exception as error:  # the others go on
            traceback.print_exc()
            found = {**figures.get(part, {}), "error": f"{type(error).__name__}: {error}"[:300]}
        store(part, found)
        print(f"== {part}: {time.perf_counter() - started:.0f} s\n{json.dumps(found)[:1500]}",
              flush=True)
        fresh()


if __name__ == "__main__":
    main()
