"""What mixed precision is worth: speed, memory and loss in float32, bfloat16 and float16.

    python benchmarks/precision.py            # about ten minutes on one core
    python benchmarks/precision.py --quick    # a minute, writes nothing
    python benchmarks/precision.py --parts loss      # one part alone

Writes two files, precision.json (speed and memory) and precision_loss.json.

speed: whole training steps, in turns (float32, bfloat16, float16, and backwards), as ratios to
the float32 step of the same turn; and bare products of square matrices.
memory: bytes that a forward pass saves for the backward pass, each storage once and without
the weights, beside what weights, gradients and moments take.
loss: the same short run on the stories from the same seeds, in each precision, and with the
weights themselves in bfloat16.
"""
import argparse
import time
from statistics import median

import torch
from results_file import record
from tqdm import tqdm

from gptbook.core import GPTConfig, GPTModel, LossModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.precision import precision_for
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import TrainConfig, begin_run, evaluate_loss, take_step, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("float32", "bfloat16", "float16")
SHAPES = {  # name: sizes, rows of a batch
    "2 x 64": (GPTConfig(512, 64, 64, 2, 2), 8),
    "6 x 384": (GPTConfig(2048, 128, 384, 6, 6), 4),
}


def some_tokens(vocab_size: int, length: int, rows: int) -> TokenDataset:
    ids = torch.randint(vocab_size, (4 * rows * length,)).numpy()
    return TokenDataset(ids, length, rows)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# speed -------------------------------------------------------------------------------

def stepper(name: str, config: GPTConfig, rows: int):
    """A function that takes one whole step of a run of its own and returns its seconds."""
    set_seed(0)
    model, data = GPTModel(config).to(DEVICE), some_tokens(config.vocab_size, config.context_length, rows)
    precision = precision_for(name, DEVICE)
    run = begin_run(model, data, TrainConfig(1000), precision=precision)
    loss_model = LossModel(model).train()

    def step():
        take_step(run, loss_model, data, precision=precision)
        return run.history[-1]["seconds"]

    return step


def turns(actions: dict, rounds: int, slow: dict, label: str) -> dict:
    """Seconds of each action in each round; every second round runs backwards."""
    seconds = {name: [] for name in actions}
    for name, action in actions.items():
        action()  # warm up
    for i in tqdm(range(rounds), label):
        order = [*actions][:: 1 if i % 2 == 0 else -1]
        for name in order:
            if i < slow.get(name, rounds):
                seconds[name].append(action_time(actions[name]))
    return seconds


def action_time(action) -> float:
    wait()
    began = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - began


def summary(seconds: dict) -> dict:
    """Median seconds, and the median and the ends of the ratios float32 / other."""
    found = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["float32"], times)]
        found[name] = {"seconds": median(times), "speed": median(ratios),
                       "speed_ends": [min(ratios), max(ratios)], "rounds": len(times)}
    return found


def speed(args) -> dict:
    steps, products = {}, {}
    slow = {} if DEVICE.type == "cuda" else {"float16": 3}  # emulated: once is long enough
    for shape, (config, rows) in SHAPES.items():
        if args.quick and shape != "2 x 64":
            continue
        actions = {name: stepper(name, config, rows) for name in NAMES}
        steps[shape] = summary(turns(actions, args.rounds, slow, f"steps of {shape}"))
    for n in (64, 512) if args.quick else (64, 128, 256, 512):
        inputs = {name: torch.randn(n, n, device=DEVICE).to(getattr(torch, name)) for name in NAMES}
        actions = {name: (lambda a=a: a @ a) for name, a in inputs.items()}
        found = summary(turns(actions, 3 * args.rounds, {}, f"products of {n}"))
        for one in found.values():
            one["gigaflops"] = 2 * n**3 / one["seconds"] / 1e9
        products[n] = found
    return {"steps": steps, "products": products,
            "instructions": cpu_instructions()}


def cpu_instructions() -> dict:
    """Whether the processor says that it multiplies halves itself."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return {}
    return {name: any(flag.startswith(start) for flag in flags for start in starts)
            for name, starts in {"bfloat16": ("avx512_bf16", "amx_bf16"),
                                 "float16": ("avx512_fp16", "amx_fp16")}.items()}


# memory ------------------------------------------------------------------------------

def saved_bytes(model: GPTModel, input_ids, precision) -> dict:
    """Bytes saved for backward by element size, each storage once, weights not counted."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    shapes |= {shape[::-1] for shape in shapes}  # a linear saves its transpose
    kept, seen = [], {"activations": 0, "copies_of_weights": 0}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours:
            ours.add(storage.data_ptr())
            kept.append(x)  # alive, so that no address comes twice
            copy = x.dtype == precision_dtype(precision) and tuple(x.shape) in shapes
            seen["copies_of_weights" if copy else "activations"] += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), precision.autocast():
        LossModel(model)(input_ids, input_ids)
    return seen


def precision_dtype(precision):
    return getattr(precision, "dtype", None)  # float32 makes no copies


def memory(args) -> dict:
    found = {}
    config = GPTConfig(2048, 256, 384, 6, 6)
    set_seed(0)
    model = GPTModel(config).to(DEVICE)
    n = sum(p.numel() for p in model.parameters())
    for rows in tqdm((1,) if args.quick else (1, 4, 16), "memory"):
        ids = torch.randint(2048, (rows, 256), device=DEVICE)
        found[rows * 256] = {name: saved_bytes(model, ids, precision_for(name, DEVICE))
                             for name in ("float32", "bfloat16")}
    return {"saved_bytes": found, "parameters": n, "state_bytes": 16 * n,
            "layers": 6, "width": 384, "context_length": 256}


# loss --------------------------------------------------------------------------------


def loss(args) -> dict:
    corpus = stories(4_000, validation=200)
    tokenizer = train_bpe(corpus.text("train", 400_000), 512)
    data, held_out = (
        TokenDataset(tokenize(corpus, tokenizer, split), 96, 6, document_end=tokenizer.end_of_text)
        for split in ("train", "validation"))
    losses, skipped, tokens = {}, [], 0
    for seed in range(args.seeds):
        for name in (*NAMES, "bfloat16 weights"):
            set_seed(seed)
            model = GPTModel(GPTConfig(tokenizer.n_vocab, 96, 64, 2, 4))
            init_weights(model, 64**-0.5)
            model = model.to(DEVICE)
            precision = precision_for("float32", DEVICE)
            if name in NAMES:
                precision = precision_for(name, DEVICE)
            else:
                model = model.bfloat16()
            config = TrainConfig(args.steps, 4e-3, seed=seed)
            history = train(model, data, None, config, precision=precision, progress=False,
                            schedule=warmup_cosine(args.steps, args.steps // 20, 0.02))
            tokens = sum(row["tokens"] for row in history)
            seconds = sum(row["seconds"] for row in history)
            if name == "float16":
                skipped.append(sum(row.get("skipped", 0) for row in history))
            found = evaluate_loss(model.float(), held_out)  # all judged in float32
            losses.setdefault(name, []).append(found)
            print(f"seed {seed}, {name}: {found:.4f} nats a token, {seconds:.0f} s", flush=True)
    return {"held_out": losses, "skipped_float16": skipped, "steps": args.steps,
            "tokens": tokens, "layers": 2, "width": 64}


def rounded(x):
    """Five digits are enough for a figure."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [*map(rounded, x)]
    return float(f"{x:.5g}") if isinstance(x, float) else x


PARTS = {"memory": memory, "speed": speed, "loss": loss}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller, writes nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seeds, args.steps = 3, 1, 20
    torch.set_num_threads(1)
    figures = {part: rounded(PARTS[part](args)) for part in args.parts}
    found = {"precision_loss": figures.pop("loss", None), "precision": figures}
    for name, one in found.items():
        if one:
            print(name, one if args.quick else record(name, one))


if __name__ == "__main__":
    main()
