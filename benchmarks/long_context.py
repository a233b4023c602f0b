"""What a model does past the length that it was trained at, and what helps.

    python benchmarks/long_context.py --jobs 16   # a minute or two on 16 fast cores
    python benchmarks/long_context.py --quick     # under a minute, writes nothing

Trains the same small model on packed stories in rows of 64 tokens, with learned positions, with
none, with RoPE and with ALiBi (and with ALiBi broken in two ways), three seeds; and with RoPE on
as many tokens in rows of 256, for what there is to be won. Runs of one seed share their data.
Then it reads held-out packed stories in rows of 64, 128, 256 and 512 tokens: as it is; with a
window, so that no key is further away than in training; the learned table cut, extended by
random rows and stretched; the rotations scaled, without and with a few more steps of training in
rows of 256. Finished runs are recorded at once.
"""
import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from results_file import record
from tqdm import tqdm

from gptbook.architecture import NoPositions, Rotary
from gptbook.core import (Causal, GPTConfig, GPTModel, LearnedPositions, MultiHeadAttention,
                          init_weights, set_seed)
from gptbook.data import TokenDataset, tokenize
from gptbook.initial_weights import init_copying
from gptbook.long_context import ALiBi, loss_by_position, rope_scaling
from gptbook.runs import TrainConfig
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import train

TRAINED = 64                            # tokens in a row of training
LENGTHS = (64, 128, 256, 512)           # tokens in a row of reading
FACTORS = (2, 4, 8)                     # these over that
FURTHER = 256                           # tokens in a row of the further training
LONG = f"rope, trained at {FURTHER}"
KINDS = ("rope", LONG, "alibi", "none", "learned", "alibi, wrong sign", "alibi, one slope")
SCALINGS = ("linear", "ntk", "dynamic", "yarn", "llama3")
TRAINED_FURTHER = ("unscaled", "linear", "ntk", "yarn")


@dataclass(frozen=True)
class Window:
    """A token sees itself and the `size - 1` before it."""

    size: int

    def __call__(self, q_pos, k_pos):
        return (q_pos >= k_pos) & (q_pos - k_pos < self.size)


def bias_of(kind: str, n_heads: int):
    """ALiBi, whole or broken; None for the other kinds."""
    if not kind.startswith("alibi"):
        return None
    bias = ALiBi(n_heads)
    if kind == "alibi, wrong sign":
        bias.slopes = -bias.slopes
    if kind == "alibi, one slope":
        bias.slopes = bias.slopes.log().mean().exp().expand(n_heads)
    return bias


def build(kind: str, args, vocab_size: int, *, scaling=None, mask=Causal(), length=TRAINED):
    """A model of one kind of positions; its weights fit all masks and scalings."""
    config = GPTConfig(vocab_size, length, args.width, args.layers, args.heads)
    rotary = partial(Rotary, base=args.base, scaling=scaling) if kind.startswith("rope") else None

    def attention(config, layer):
        bias = bias_of(kind, config.n_heads)
        return MultiHeadAttention(config, layer, mask=mask, bias=bias, rotary=rotary)

    where = LearnedPositions if kind == "learned" else NoPositions
    return GPTModel(config, attention=attention, position_embedding=where)


def like(model, kind: str, args, **parts):
    """The same weights in other surroundings."""
    other = build(kind, args, model.config.vocab_size, **parts)
    other.load_state_dict(model.state_dict())
    return other


def scaling_of(name: str, factor: int, args):
    """What transformers' config would say, read by `rope_scaling`."""
    said = {"rope_type": name, "factor": float(factor)}
    if name == "unscaled":
        return None
    if name in ("dynamic", "yarn", "llama3"):
        said["original_max_position_embeddings"] = TRAINED
    if name == "llama3":
        said.update(low_freq_factor=1.0, high_freq_factor=4.0)
    aim = GPTConfig(8, TRAINED * factor, args.width, 1, args.heads)
    return rope_scaling(said, aim, args.base)


def other_table(model, args, length: int, how: str):
    """A model whose learned table has `length` rows: random ones added, or stretched."""
    table = model.position_embedding.table.weight.detach()
    if how == "random rows":
        more = torch.randn(length - len(table), table.shape[1]) * table.std()
        table = torch.cat((table, more))
    else:
        at = torch.arange(length) * len(table) / length
        low, share = at.long(), (at % 1)[:, None]
        high = (low + 1).clamp(max=len(table) - 1)
        table = table[low] * (1 - share) + table[high] * share
    other = build("learned", args, model.config.vocab_size, length=length)
    other.load_state_dict({**model.state_dict(), "position_embedding.table.weight": table})
    return other


def read(model, ids, length: int) -> list:
    """Nats a token at each place of rows of so many tokens; all lengths read one text."""
    whole = (len(ids) - 1) // max(LENGTHS) * max(LENGTHS)
    data = TokenDataset(ids[:whole + 1], length, 4096 // length)
    return loss_by_position(model, data.windows()).tolist()


def summary(curves: dict) -> dict:
    """{length: mean}, and the curve of the longest in buckets of 16 tokens."""
    pieces = np.split(np.array(curves[max(curves)]), max(curves) // 16)
    return {"mean": {str(n): round(float(np.mean(c)), 4) for n, c in curves.items()},
            "buckets": [round(float(piece.mean()), 4) for piece in pieces]}


def read_learned(model, args, ids) -> dict:
    cut = {n: read(model, ids, TRAINED) * (n // TRAINED) for n in LENGTHS}
    found = {"learned, cut": summary(cut)}
    for how in ("random rows", "stretched"):
        set_seed(1)
        curves = {n: read(other_table(model, args, n, how), ids, n) for n in LENGTHS[1:]}
        found[f"learned, {how}"] = summary({TRAINED: cut[TRAINED], **curves})
    return found


def read_scaled(model, args, ids, at_trained: list) -> dict:
    """Each scaling at the length that it aims at; one on short rows, for what it costs."""
    found = {}
    for name in SCALINGS:
        curves, on_short = {TRAINED: at_trained}, {}
        for factor in FACTORS:
            scaled = like(model, "rope", args, scaling=scaling_of(name, factor, args))
            curves[TRAINED * factor] = read(scaled, ids, TRAINED * factor)
            if TRAINED * factor == FURTHER:
                loss = np.mean(read(scaled, ids, TRAINED))
                on_short[str(factor)] = round(float(loss), 4)
        found[f"rope, {name}"] = {**summary(curves), "on_short_rows": on_short}
    return found


def read_all(model, kind: str, args, ids) -> dict:
    """{what was read: its losses}."""
    if kind == "learned":
        return read_learned(model, args, ids)
    curves = {n: read(model, ids, n) for n in LENGTHS}
    found = {kind: summary(curves)}
    if kind in ("rope", "alibi", "none"):
        windowed = like(model, kind, args, mask=Window(TRAINED))
        found[f"{kind}, window"] = summary({n: read(windowed, ids, n) for n in LENGTHS})
    if kind == "rope":
        found.update(read_scaled(model, args, ids, curves[TRAINED]))
    return found


def train_further(model, args, ids, held_out, seed: int) -> dict:
    """A tenth of the steps in rows of 256, scaled or not; in rows of 64 for the window."""
    found, steps = {}, max(1, args.steps // 10)
    config = TrainConfig(steps, args.rate / 4, betas=(0.9, 0.98), seed=seed + 100)
    for name in (*TRAINED_FURTHER, "window"):
        length = TRAINED if name == "window" else FURTHER
        mask = Window(TRAINED) if name == "window" else Causal()
        scaling = None if name == "window" else scaling_of(name, FURTHER // TRAINED, args)
        other = like(model, "rope", args, scaling=scaling, mask=mask)
        data = TokenDataset(ids, length, args.batch * TRAINED // length)
        train(other, data, None, config, schedule=warmup_cosine(steps, max(1, steps // 10)),
              progress=False)
        found[name] = summary({n: read(other, held_out, n) for n in (TRAINED, FURTHER)})
    return found


def one_run(kind: str, seed: int, args) -> tuple:
    """(what was read, what was read after further training) of one model."""
    torch.set_num_threads(1)
    ids, held_out, vocab_size, _ = make_data(args)
    set_seed(seed)
    model = build(kind, args, vocab_size)
    init_weights(model, args.width**-0.5)
    init_copying(model)
    config = TrainConfig(args.steps, args.rate, betas=(0.9, 0.98), seed=seed)
    length = FURTHER if kind == LONG else TRAINED
    data = TokenDataset(ids, length, args.batch * TRAINED // length)
    train(model, data, None, config, progress=False, schedule=warmup_cosine(
        args.steps, max(1, args.steps // 30), 0.02))
    found = read_all(model, kind, args, held_out)
    further = train_further(model, args, ids, held_out, seed) if kind == "rope" else {}
    return found, further


def make_data(args) -> tuple:
    """(ids for training, held-out ids, size of the vocabulary, facts about the stories)."""
    corpus = stories(args.stories, validation=args.held_out)
    tokenizer = train_bpe(corpus.documents("train"), 1024)
    ids, held_out = (tokenize(corpus, tokenizer, split) for split in ("train", "validation"))
    spans = np.diff(np.flatnonzero(held_out == tokenizer.end_of_text))
    late = np.maximum(spans - TRAINED, 0).sum() / spans.sum()
    facts = {"median": float(np.median(spans)), "longest": int(spans.max()),
             "share_of_tokens_past_64": round(float(late), 4), "held_out": len(held_out)}
    return ids, held_out, tokenizer.n_vocab, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stories", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=160, help="stories")
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.stories, args.held_out = 20, 1, 300, 10
    args = SimpleNamespace(width=96, heads=4, layers=3, base=10_000.0, rate=4e-3, batch=8,
                           **vars(args))
    torch.set_num_threads(1)
    facts = make_data(args)[3]
    figures = {"read": {}, "further": {}, "story_tokens": facts, "steps": args.steps,
               "further_steps": max(1, args.steps // 10), "width": args.width,
               "layers": args.layers, "heads": args.heads, "base": args.base,
               "batch": args.batch}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context) as pool:
        todo = {pool.submit(one_run, kind, seed, args): seed
                for kind in KINDS for seed in range(args.seeds)}
        for done in tqdm(as_completed(todo), "runs", len(todo)):
            for part, found in zip(("read", "further"), done.result()):
                for name, losses in found.items():
                    figures[part].setdefault(name, {})[str(todo[done])] = losses
            if not args.quick:
                record("long_context", figures)
    for name, seeds in figures["read"].items():
        print(name, [losses["mean"] for losses in seeds.values()])


if __name__ == "__main__":
    main()
