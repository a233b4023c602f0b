"""Prune, recover, round, decode: what each step costs and gives, alone and in a chain.

    python benchmarks/together.py                # about five minutes on one core
    python benchmarks/together.py --speeds-only  # two minutes: tokens a second again, no training
    python benchmarks/together.py --quick        # seconds, writes nothing

The stories model that travels with the package loses a share of its heads and neurons, trains
for a few steps on new stories, and is rounded to 8 or to 4 bits; in one chain it trains with
the rounding in the loop. Each result is asked stories that it has not seen (with the cache in
32 and in 8 bits), is saved, and writes twenty stories for the critic. Three seeds decide the
order of the batches. Then speeds, all forms in turn, on this model's shape and on that of GPT-2
124M with random weights: speed does not depend on the values. Finished runs are recorded at
once, and a later call with --speeds-only keeps the losses.
"""
import argparse
import copy
import gc
import math
from statistics import fmean, median
from time import perf_counter

import torch
from results_file import RESULTS, load, record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.critic import check_story
from gptbook.data import TokenDataset, tokenize
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.qat import convert, prepare_qat
from gptbook.quantization import quantize
from gptbook.quantized_cache import seeing_rounded
from gptbook.runs import TrainConfig, use_kernel
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories, story_bits
from gptbook.structured_pruning import head_scores, neuron_scores, prune_heads, prune_neurons
from gptbook.together import file_bytes, write_greedily
from gptbook.training import evaluate_loss, train

FORMS = ("32 bits", "int8", "int4")
SHARES = {"a third": 1 / 3, "half": 1 / 2}
GREEDY = 24  # tokens of a timed text


# The steps ---------------------------------------------------------------------------
def loaded():
    """The demo, with the attention that trains fastest at this size."""
    model, tokenizer = load_demo()
    use_kernel(model, "naive_attention")
    return model, tokenizer


def smaller(model, share: float, batches: list):
    """Without this share of all heads and of each layer's neurons, by their effect."""
    heads, neurons = head_scores(model, batches), neuron_scores(model, batches)
    prune_heads(model, share, heads, scope="global")
    prune_neurons(model, share, neurons, scope="layer")
    return model


def recovered(model, data, args, seed: int):
    """The model after a short training on new stories."""
    config = TrainConfig(args.steps, args.rate, betas=(0.9, 0.98), seed=seed)
    train(model, data, None, config, progress=False,
          schedule=warmup_cosine(args.steps, max(1, args.steps // 10), 0.02))
    return model


def rounded(model, form: str):
    """A copy in this form."""
    other = copy.deepcopy(model).eval()
    if form != "32 bits":
        quantize(other, form)
    return other


def on_the_grid(model, form: str):
    """The model with its weights rounded, and in floats again: rounding first."""
    small = rounded(model, form)
    floats, known = copy.deepcopy(model), dict(small.named_modules())
    with torch.no_grad():
        for name, module in floats.named_modules():
            if hasattr(known[name], "dequantize"):
                module.weight.copy_(known[name].dequantize())
    return floats


# What is measured --------------------------------------------------------------------
def with_small_cache(model, held_out) -> float:
    """The loss when attention reads what a cache in 8 bits would give back."""
    kernels = {block.attn: block.attn.kernel for block in model.blocks}
    for attn, kernel in kernels.items():
        attn.kernel = seeing_rounded(kernel)
    loss = evaluate_loss(model, held_out)
    for attn, kernel in kernels.items():
        attn.kernel = kernel
    return loss


def cache_bytes(model) -> int:
    """Bytes of keys and values a token, in 32 bits."""
    return sum(4 * (b.attn.W_key.out_features + b.attn.W_value.out_features)
               for b in model.blocks)


def judged(model, tokenizer, n: int) -> tuple:
    """How many of n stories the critic passes, and the first of them."""
    start = [[tokenizer.end_of_text]] * n
    rows = generate_text(Decoder(model, n), start, 190, 0.7, seed=5,
                         end_of_text=tokenizer.end_of_text)
    texts = [tokenizer.decode([i for i in row if i != tokenizer.end_of_text]) for row in rows]
    return sum(not check_story(text) for text in texts), texts[0]


class Table:
    """The chains that were measured, each stored as soon as it is."""

    def __init__(self, held_out, tokenizer, figures, args):
        self.held_out, self.tokenizer, self.args = held_out, tokenizer, args
        self.figures, self.chains = figures, figures["chains"]

    def has(self, steps: list, seed: int = 0) -> bool:
        """Whether an earlier call has measured this."""
        return len(self.chains.get(", ".join(steps), {"nats": []})["nats"]) > seed

    def add(self, steps: list, model, seed: int = 0):
        """Measure one more seed of a chain."""
        if self.has(steps, seed):
            return
        nats = round(evaluate_loss(model, self.held_out), 5)
        name = ", ".join(steps)
        chain = self.chains.setdefault(name, dict(steps=steps, nats=[]))
        chain["nats"].append(nats)
        tqdm.write(f"{name}: {nats:.4f}")
        if len(chain["nats"]) == 1:
            passed, text = judged(model, self.tokenizer, self.args.texts)
            chain |= dict(
                megabytes=round(file_bytes(model, self.tokenizer) / 1e6, 3),
                cache_bytes=cache_bytes(model), passed=passed, text=text,
                nats_with_int8_cache=round(with_small_cache(model, self.held_out), 5))
        self.store()

    def store(self):
        if not self.args.quick:
            record("together", self.figures)


# Losses ------------------------------------------------------------------------------
def untrained(table, batches):
    """Chains without a training step, and rounding before pruning."""
    whole = loaded()[0]
    third = smaller(loaded()[0], SHARES["a third"], batches)
    for form in FORMS:
        table.add(["whole", form], rounded(whole, form))
        table.add(["a third removed", form], rounded(third, form))
    for form in FORMS[1:]:
        other = smaller(on_the_grid(whole, form), SHARES["a third"], batches)
        table.add([f"{form} first", "a third removed", form], rounded(other, form))


def trained(table, data, batches, args):
    """The chains that recover, seed by seed."""
    for seed in range(args.seeds):
        for name, share in SHARES.items():
            steps = [f"{name} removed", "recovered"]
            if table.has([*steps, FORMS[-1]], seed):
                continue
            model = recovered(smaller(loaded()[0], share, batches), data, args, seed)
            for form in FORMS:
                table.add([*steps, form], rounded(model, form), seed)
        steps = ["a third removed", "recovered in 4 bits", "int4"]
        if not table.has(steps, seed):
            model = smaller(loaded()[0], SHARES["a third"], batches)
            prepare_qat(model, "int4")
            recovered(model, data, args, seed).eval()
            convert(model)
            table.add(steps, model, seed)


def losses(args, figures):
    tokenizer = loaded()[1]
    new, unseen = stories(200 if args.quick else 4000, seed=2), stories(1, 977, args.held_out)
    data, held_out = (TokenDataset(tokenize(corpus, tokenizer, split), 192, args.rows,
                                   document_end=tokenizer.end_of_text)
                      for corpus, split in ((new, "train"), (unseen, "validation")))
    texts = list(unseen.documents("validation"))
    figures |= {
        "steps": args.steps, "learning_rate": args.rate, "rows": args.rows,
        "seeds": args.seeds, "stories_judged": args.texts,
        "chains": figures.get("chains", {}) if args.resume else {},
        "held_out": {
            "stories": len(texts), "words": sum(len(text.split()) for text in texts),
            "tokens": sum((y != -100).sum().item() for _, y in held_out.windows()),
            "exact_bits": round(sum(map(story_bits, texts)), 3)}}
    batches = [data.batch(99, step) for step in range(2 if args.quick else 16)]
    table = Table(held_out, tokenizer, figures, args)
    untrained(table, batches)
    trained(table, data, batches, args)


# Speeds ------------------------------------------------------------------------------
def shapes(quick: bool) -> dict:
    """{shape: a function that makes the model}; values do not matter here."""
    def gpt2():
        set_seed(0)
        return GPTModel(GPTConfig(n_layers=1) if quick else GPTConfig())

    return {"stories": lambda: loaded()[0], "gpt2": gpt2}


def decoders(make, batch: int) -> dict:
    """{form: a decoder}, with and without a third and half of heads and neurons."""
    found = {}
    for name, share in {"whole": 0.0, **SHARES}.items():
        model = make().eval()
        if share:
            prune_heads(model, share, scope="layer")
            prune_neurons(model, share, scope="layer")
        for form in FORMS:
            key = f"{name}{' removed' if share else ''}, {form}"
            found[key] = Decoder(rounded(model, form), batch, 64)
    return found


def timed(make, batch: int, rounds: int) -> dict:
    """Tokens a second and times as fast as the whole in 32 bits, forms in turn."""
    forms, times = decoders(make, batch), {}
    prompts = [list(range(1, 9))] * batch
    for turn in tqdm(range(rounds + 1), f"{batch} at once", leave=False):
        for name, decoder in forms.items():
            start = perf_counter()
            write_greedily(decoder, prompts, GREEDY)
            if turn:  # the first warms up
                times.setdefault(name, []).append(perf_counter() - start)
    base = times["whole, 32 bits"]
    return {name: {"tokens_per_second": round(batch * GREEDY / min(seconds), 2),
                   "times_as_fast": round(median(a / b for a, b in zip(base, seconds)), 3)}
            for name, seconds in times.items()}


def weight_megabytes(make) -> float:
    """What one token reads of the whole model in 32 bits."""
    from gptbook.roofline import token_cost
    return round(token_cost(make(), 0).weight_bytes / 1e6, 1)


def speeds(args, figures):
    found = figures.setdefault("speeds", {})
    for shape, make in tqdm(shapes(args.quick).items(), "speeds"):
        found[shape] = {"weight_megabytes": weight_megabytes(make)}
        rounds = 2 if args.quick else args.rounds * (3 if shape == "stories" else 1)
        for batch, name in ((1, "one"), (8, "eight")):
            found[shape][name] = timed(make, batch, rounds)
            gc.collect()
            if not args.quick:
                record("together", figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--speeds-only", action="store_true")
    parser.add_argument("--losses-only", action="store_true")
    parser.add_argument("--resume", action="store_true",
                        help="keep the losses that are stored, measure those that are missing")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.steps, args.seeds, args.held_out, args.texts = 3, 1, 8, 3
    there = (RESULTS / "together.json").exists()
    figures = load("together")["figures"] if there and not args.quick else {}
    figures["note"] = "losses: python benchmarks/together.py; speeds: --speeds-only"
    if not args.speeds_only:
        losses(args, figures)
    if not args.losses_only:
        speeds(args, figures)
    for name, chain in figures.get("chains", {}).items():
        print(f"{name}: {math.exp(fmean(chain['nats'])):.4f}, {chain['megabytes']:.2f} MB, "
              f"{chain['passed']} of {figures['stories_judged']} stories pass")
    for shape, found in figures.get("speeds", {}).items():
        for name, speed in found["one"].items():
            print(shape, name, speed, found["eight"][name])


if __name__ == "__main__":
    main()
