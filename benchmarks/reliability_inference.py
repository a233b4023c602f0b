"""Rows R5 and R6 of the reliability scoreboard, one figure a row.

    python benchmarks/reliability_inference.py            the full counts, in minutes
    python benchmarks/reliability_inference.py --only decoder    a part of it: R5, R6 or
                                                          the decoder; the rest is kept
    python benchmarks/reliability_inference.py --quick    those of `make test`

All but the last write benchmarks/results/reliability_inference.json.

R5  Cached = uncached. 1,000 prompts for each variant of the model, read in one go, in
    chunks, token by token, and behind a prefix that is read once and forked; then eight
    greedy tokens. The same ids, and every row of logits within 1e-5 of the uncached one.
R6  Batch invariance. Batches of 1 to 32 prompts of unequal length, with 0 to 64 columns
    of padding more on the left: the ids of each prompt alone, logits within 1e-5; within
    `batch_invariant` not one bit differs.

The `Decoder`, with its native kernels where it has them, goes through both: its logits
beside those of the plain model with the same weights, without a cache; and with
`deterministic=True` the bits of a row alone.

Differences are divided by the largest logit of the batch, or by 1 if that is less: a sum
of float32 numbers is off by some multiples of 6e-8 of its size, and 1e-5 leaves a factor
of ten above what is seen. What rounds activations (int8_dynamic, Int8Cache) turns such a
difference into a whole step of its integers where a number lies between two; so these
are compared in float64, where that does not happen, and in float32 bit by bit within
`batch_invariant`. Nothing is run twice until it fits.

Each row runs its negative controls too, and they must turn it red.
"""
import argparse
import copy
import random
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from gptbook import batch_invariance, quantization, quantized_cache
from gptbook.architecture import NoPositions, RMSNorm, SwiGLU
from gptbook.batch_invariance import FixedShapes, batch_invariant
from gptbook.checkpoints import load_demo
from gptbook.core import GPTConfig, GPTModel, MultiHeadAttention, Positions, set_seed
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.inference import KVCache
from gptbook.quantization import quantize
from gptbook.quantized_cache import Int8Cache, seeing_rounded
from gptbook.recipes import rotated
from gptbook.sparse import SlidingWindow
from gptbook.stories import story
from results_file import load, record

BOUND = 1e-5
VOCAB, CONTEXT = 97, 160
SIZES = dict(vocab_size=VOCAB, context_length=CONTEXT, emb_dim=40, n_layers=2, n_heads=4)


# ------------------------------------------------------------------ the variants


@dataclass(frozen=True)
class Variant:
    """A model and how it is cached."""

    name: str
    recipe: str = "gpt2"
    options: dict = field(default_factory=dict, hash=False)
    kv_heads: int | None = None
    scheme: str | None = None  # of `quantize`
    cache: type = KVCache
    rounds: bool = False  # activations or keys: compared in float64


VARIANTS = [
    Variant("gpt2"),
    Variant("llama", "llama"),
    Variant("llama, grouped heads", "llama", kv_heads=2),
    Variant("llama, one key head", "llama", kv_heads=1),
    Variant("mistral, window 6", "mistral", dict(window=6), 2),
    Variant("windows in turn"),
    Variant("mixtral", "mixtral", dict(n_experts=4, window=7), 2),
    Variant("switch", "switch", dict(n_experts=4)),
    Variant("alibi", "alibi"),
    Variant("strided", "strided", dict(stride=4)),
    Variant("longformer", "longformer", dict(window=6)),
    Variant("bigbird", "bigbird", dict(window=6, block=4)),
    Variant("stories model"),
    Variant("int8", scheme="int8"),
    Variant("int8, mixtral", "mixtral", dict(n_experts=4, window=7), 2, "int8"),
    Variant("int4", scheme="int4"),
    Variant("int8_dynamic", scheme="int8_dynamic", rounds=True),
    Variant("int8_dynamic, llama", "llama", {}, 2, "int8_dynamic", rounds=True),
    Variant("Int8Cache", cache=Int8Cache, rounds=True),
    Variant("Int8Cache, mistral", "mistral", dict(window=6), 2, cache=Int8Cache,
            rounds=True),
    Variant("Int8Cache, stories model", cache=Int8Cache, rounds=True),
]


def alternating(config: GPTConfig, layer: int):
    """Rotated attention that sees a window in every other layer."""
    parts = {} if layer % 2 else dict(mask=SlidingWindow(6))
    return rotated(MultiHeadAttention, 10_000.0, None, **parts)(config, layer)


@lru_cache(maxsize=None)
def built(variant: Variant, dtype=torch.float32) -> GPTModel:
    """Weights three times as large as usual: a wrong key shows in the logits."""
    if "stories" in variant.name:
        model = load_demo()[0]
    else:
        set_seed(0)
        config = GPTConfig(**SIZES, recipe=variant.recipe, options=variant.options,
                           n_kv_heads=variant.kv_heads)
        slots = dict(attention=alternating, position_embedding=NoPositions, mlp=SwiGLU,
                     norm=RMSNorm) if variant.name == "windows in turn" else {}
        model = GPTModel(config, **slots)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
    if variant.scheme:
        quantize(model, variant.scheme)
    return model.eval().to(dtype)


def uncached(variant: Variant, dtype=torch.float32) -> GPTModel:
    """What a cache must equal; for an `Int8Cache` attention that sees rounded keys."""
    model = built(variant, dtype)
    if variant.cache is KVCache:
        return model
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.kernel = seeing_rounded(block.attn.kernel)
    return model


def prompts(variant: Variant, rows: int, n_tokens: int, seed: int) -> Tensor:
    """Random ids; for the stories model pieces of stories."""
    generator = torch.Generator().manual_seed(seed)
    if "stories" not in variant.name:
        return torch.randint(VOCAB, (rows, n_tokens), generator=generator)
    text = told()
    starts = torch.randint(len(text) - n_tokens, (rows, 1), generator=generator)
    return text[starts + torch.arange(n_tokens)]


@lru_cache(maxsize=None)
def told() -> Tensor:
    """Stories that the model was not trained on, one after the other."""
    tokenizer = load_demo()[1]
    texts = [tokenizer.encode(story(977, number).text) for number in range(40)]
    return torch.tensor([i for text in texts for i in [tokenizer.end_of_text, *text]])


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


# ------------------------------------------------------------------ R5: one batch


def splits(n: int, rng: random.Random) -> list[int]:
    """Chunks of several sizes, together n tokens."""
    sizes = []
    while n:
        sizes.append(min(n, rng.choice((1, 2, 3, 5, 8))))
        n -= sizes[-1]
    return sizes


WAYS = ("one go", "chunks", "one by one", "forked")


def read(model, make_cache, ids: Tensor, way: str, shared: int, rng) -> tuple:
    """The prompts' logits (B, T, V) and the cache that holds them."""
    n_tokens, parts = ids.shape[1], []
    cache = make_cache(model)
    if way == "forked":  # the rows begin alike
        first = model(ids[:1, :shared], cache=cache)
        parts, cache = [first.expand(len(ids), -1, -1)], cache.fork(len(ids))
        ids = ids[:, shared:]
    sizes = {"one go": [n_tokens], "chunks": splits(n_tokens, rng),
             "one by one": [1] * n_tokens, "forked": splits(ids.shape[1], rng)}[way]
    parts += [model(part, cache=cache) for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, 1), cache


def greedy_uncached(model, ids: Tensor, n: int) -> tuple:
    """The texts, and all their logits, each made by a pass over the text so far."""
    logits = model(ids)
    for _ in range(n):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        logits = torch.cat([logits, model(ids)[:, -1:]], 1)
    return ids, logits


def greedy_cached(model, cache, logits: Tensor, n: int) -> tuple:
    """The new ids (B, n), and the logits with those of the new tokens."""
    new = []
    for _ in range(n):
        new.append(logits[:, -1:].argmax(-1))
        logits = torch.cat([logits, model(new[-1], cache=cache)], 1)
    return torch.cat(new, 1), logits


@dataclass
class Found:
    """What came of some prompts."""

    prompts: int = 0
    ids: int = 0  # prompts whose new tokens were the same in every way
    worst: float = 0.0  # the largest relative difference of a logit
    by_way: dict = field(default_factory=dict)  # way -> the same
    bits: int = 0  # logits that differ at all


def compare(variant, rows: int, seed: int, dtype, make_cache, new: int, found: Found):
    """One batch of prompts that share a beginning, read in every way."""
    rng = random.Random(seed)
    model, full = built(variant, dtype), uncached(variant, dtype)
    ids = prompts(variant, rows, rng.randint(4, 28), seed)
    shared = rng.randint(1, ids.shape[1] - 1)
    ids[:, :shared] = ids[:1, :shared]
    text, want = greedy_uncached(full, ids, new)
    same = torch.ones(rows, dtype=torch.bool)
    for way in WAYS:
        logits, cache = read(model, make_cache, ids, way, shared, rng)
        written, logits = greedy_cached(model, cache, logits, new)
        same &= (written == text[:, -new:]).all(1)
        worst = relative(logits, want)
        found.by_way[way] = max(found.by_way.get(way, 0.0), worst)
        found.bits += int((logits != want).sum())
    found.prompts, found.ids = found.prompts + rows, found.ids + int(same.sum())
    found.worst = max(found.by_way.values())


@torch.no_grad()
def cached_trial(variant: Variant, count: int, rows: int = 50, dtype=None,
                 make_cache=None, new: int = 8, invariant=False) -> Found:
    """So many prompts of one variant."""
    dtype = dtype or (torch.float64 if variant.rounds else torch.float32)
    found = Found()
    for seed in range(-(-count // rows)):
        with ExitStack() as stack:
            if invariant:
                stack.enter_context(batch_invariant(built(variant, dtype)))
            compare(variant, rows, seed, dtype, make_cache or variant.cache, new, found)
    return found


# ------------------------------------------------------------------ R5: controls


def off_by_one(kind: type) -> type:
    """A cache whose positions are one too small from the second step on."""
    class OffByOne(kind):
        def begin(self, B, T, positions=None):
            where = super().begin(B, T, positions)
            late = int(self._filled.length > 0)
            return Positions((where.index - late).clamp(min=0), where.aligned)

    return OffByOne


def forgetful(kind: type) -> type:
    """A cache in which the values of every row's newest token are not written."""
    class Forgetful(kind):
        def commit(self):
            last = self._step.after.length - 1
            super().commit()
            for layer, buffers in enumerate(self.buffers):
                values = buffers[len(buffers) // 2]
                values[:, :, last % self.sizes[layer]] = 0

    return Forgetful


CONTROLS = {"off by one": off_by_one, "forgetful": forgetful}


def report_r5(count: int, control: int) -> dict:
    rows, red, flips = {}, {name: [] for name in CONTROLS}, {}
    for variant in tqdm(VARIANTS, "R5", delay=2, disable=None):
        found = cached_trial(variant, count)
        rows[variant.name] = dict(
            prompts=found.prompts, same_ids=found.ids, worst=found.worst,
            by_way=found.by_way, dtype="float64" if variant.rounds else "float32")
        for name, spoil in CONTROLS.items():
            spoilt = cached_trial(variant, control, make_cache=spoil(variant.cache))
            if spoilt.worst > BOUND:
                red[name].append(variant.name)
        if variant.rounds:
            plain = cached_trial(variant, count // 10 or 20, dtype=torch.float32)
            exact = cached_trial(variant, control, rows=4, dtype=torch.float32, new=3,
                                 invariant=True)
            flips[variant.name] = dict(
                float32_prompts=plain.prompts, float32_same_ids=plain.ids,
                float32_worst=plain.worst, invariant_prompts=exact.prompts,
                invariant_bits=exact.bits)
    return dict(
        variants=len(rows), prompts=sum(r["prompts"] for r in rows.values()),
        same_ids=sum(r["same_ids"] for r in rows.values()),
        worst=max(r["worst"] for r in rows.values()), rows=rows, rounding=flips,
        controls=dict(variants=len(VARIANTS),
                      red={name: len(those) for name, those in red.items()}))


# ------------------------------------------------------------------ R6: one batch

BATCHES = (1, 2, 3, 4, 7, 8, 16, 32)
PADDINGS = range(65)


def padded(texts: list, padding: int) -> tuple[Tensor, Tensor]:
    """Ids and positions, the short ones padded on the left, and all by so much more."""
    width = padding + max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    where = torch.full_like(ids, -1)
    for row, text in enumerate(texts):
        ids[row, width - len(text):] = torch.tensor(text)
        where[row, width - len(text):] = torch.arange(len(text))
    return ids, where


@torch.no_grad()
def decode(model, cache, texts: list, padding: int, new: int) -> tuple:
    """Greedy ids (B, new) and the logits that chose them (B, new, V)."""
    ids, where = padded(texts, padding)
    logits = [model(ids, positions=where, cache=cache)[:, -1]]
    for _ in range(new - 1):
        logits.append(model(logits[-1].argmax(-1)[:, None], cache=cache)[:, -1])
    logits = torch.stack(logits, 1)
    return logits.argmax(-1), logits


def some_texts(variant: Variant, count: int = 32, longest: int = 6) -> list:
    """Prompts of unequal length."""
    rng, ids = random.Random(1), prompts(variant, count, longest, 1).tolist()
    return [row[: rng.randint(1, longest)] for row in ids]


@dataclass
class Batches:
    """What came of the batches of one variant."""

    cells: int = 0
    rows: int = 0
    same_ids: int = 0
    worst: float = 0.0
    bits: int = 0  # logits that differ at all

    def add(self, ids, logits, alone: list) -> None:
        """Hold a batch against its rows alone: their ids and logits."""
        want_ids, want = (torch.cat(parts) for parts in zip(*alone))
        self.cells, self.rows = self.cells + 1, self.rows + len(ids)
        self.same_ids += int((ids == want_ids).all(1).sum())
        self.worst = max(self.worst, relative(logits, want))
        self.bits += int((logits != want).sum())


def batch_trial(variant: Variant, batches=BATCHES, paddings=PADDINGS, invariant=False,
                new: int = 2, dtype=None, mode=None) -> Batches:
    """The grid of batch sizes and paddings, beside each prompt alone."""
    dtype = dtype or (
        torch.float64 if variant.rounds and not invariant else torch.float32)
    model, texts, found = built(variant, dtype), some_texts(variant), Batches()
    mode = mode or (batch_invariant if invariant else lambda model: nullcontext())
    with mode(model):
        alone = [decode(model, variant.cache(model), [text], 0, new) for text in texts]
        rng = random.Random(0)
        for B in batches:
            for padding in paddings:
                rows = rng.sample(range(len(texts)), B)
                ids, logits = decode(model, variant.cache(model),
                                     [texts[row] for row in rows], padding, new)
                found.add(ids, logits, [alone[row] for row in rows])
    return found


def text_trial(variant: Variant, new: int = 6, invariant=False) -> int:  # wrong texts
    """`generate_text` in batches of every size, beside each prompt alone."""
    model, texts, wrong = built(variant), some_texts(variant), 0
    with batch_invariant(model) if invariant else nullcontext():
        alone = [generate_text(model, text, new, 0.0)[0] for text in texts]
        drawn = [generate_text(model, text, new, seed=row)[0]
                 for row, text in enumerate(texts)]
        for B in BATCHES:
            together = generate_text(model, texts[:B], new, 0.0)
            sampled = generate_text(model, texts[:B], new, seed=0)
            wrong += sum(a != b for a, b in zip(together, alone))
            wrong += sum(a != b for a, b in zip(sampled, drawn))
    return wrong


# ------------------------------------------------------------------ R6: controls


def scale_of_the_batch(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all activations: the neighbour's outlier rounds them."""
    scale = x.detach().float().abs().max() / 127
    return (x / scale).round().to(torch.int8), scale.expand(*x.shape[:-1], 1)


def padding_seen(variant: Variant) -> Batches:
    """Padding that is given positions like any other token."""
    def all_real(texts, padding, real=padded):
        ids, where = real(texts, padding)
        return ids, torch.arange(ids.shape[1]).expand_as(ids)

    with mock.patch(f"{__name__}.padded", all_real):
        return batch_trial(variant, (2, 4), (0, 3))


def without(part: str):
    """`batch_invariant` with one of its three parts left out."""
    def mode(model):
        stack = ExitStack()
        left_out = {
            "tiles": ("linear_in_tiles", torch.nn.functional.linear),
            "whole vectors": ("in_whole_vectors", lambda f, *x, **kw: f(*x, **kw)),
            "queries alone": ("attend_alone", model.blocks[0].attn.kernel),
        }[part]
        stack.enter_context(mock.patch.object(batch_invariance, *left_out))
        stack.enter_context(batch_invariant(model))
        return stack

    return mode


PARTS = ("tiles", "whole vectors", "queries alone")


def control_r6() -> dict:  # what is done badly -> whether it shows
    dynamic = next(v for v in VARIANTS if v.scheme == "int8_dynamic")
    llama = next(v for v in VARIANTS if v.name == "llama, grouped heads")
    with mock.patch.object(quantization, "quantize_tokens", scale_of_the_batch):
        shared_scale = batch_trial(dynamic, (4, 8), (0, 1))
    seen = padding_seen(llama)
    few = dict(batches=(2, 3, 7), paddings=(0, 5))
    left_out = {part: batch_trial(llama, **few, mode=without(part)).bits for part in PARTS}
    return dict(scale_of_the_batch=shared_scale.worst, padding_seen=seen.worst,
                bits_without=left_out)


def report_r6(batches=BATCHES, paddings=PADDINGS) -> dict:
    rows = {}
    for variant in tqdm(VARIANTS, "R6", delay=2, disable=None):
        plain = batch_trial(variant, batches, paddings)
        exact = batch_trial(variant, batches, paddings, invariant=True)
        rows[variant.name] = dict(
            cells=plain.cells, rows=plain.rows, same_ids=plain.same_ids,
            worst=plain.worst, invariant_cells=exact.cells,
            invariant_rows=exact.rows, invariant_same_ids=exact.same_ids,
            invariant_bits=exact.bits,
            wrong_texts=0 if variant.rounds else text_trial(variant))
    total = lambda key: sum(row[key] for row in rows.values())
    return dict(
        variants=len(rows), cells=total("cells"), rows_compared=total("rows"),
        same_ids=total("same_ids"), worst=max(row["worst"] for row in rows.values()),
        wrong_texts=total("wrong_texts"), invariant_cells=total("invariant_cells"),
        invariant_rows=total("invariant_rows"), invariant_bits=total("invariant_bits"),
        rows=rows, controls=control_r6())


# ------------------------------------------------------------------ the decoder

DECODERS = [(v.name, v, {}) for v in VARIANTS
            if v.cache is KVCache and v.scheme is None] + [
    (f"{name}, {form}", next(v for v in VARIANTS if v.name == name), options)
    for name in ("gpt2", "llama, grouped heads")
    for form, options in dict(
        int8=dict(quantize="int8"), int4=dict(quantize="int4"),
        int8_dynamic=dict(quantize="int8_dynamic"),
        bfloat16=dict(dtype=torch.bfloat16)).items()]


def read_by(decoder, ids: Tensor, way: str, shared: int, rng) -> tuple:
    """The logits (B, N, V) after each of some places in the prompts, and the places."""
    n_tokens, places, found = ids.shape[1], [], []
    decoder.truncate(0)
    start = 0
    if way == "forked":
        decoder.read(ids[:1, :shared])
        decoder.reorder([0] * len(ids))
        start = shared
    sizes = {"one go": [n_tokens], "chunks": splits(n_tokens, rng),
             "one by one": [1] * n_tokens, "forked": splits(n_tokens - start, rng)}[way]
    for part in ids[:, start:].split(sizes, dim=1):
        found.append(decoder.read(part).clone())
        places.append((places[-1] if places else start - 1) + part.shape[1])
    return torch.stack(found, 1), places


@torch.no_grad()
def decoder_cached(variant: Variant, options: dict, count: int, rows: int = 20,
                   new: int = 8, spoil=lambda decoder: None) -> Found:
    """R5 for a decoder: its logits beside its own model's without a cache."""
    found = Found()
    decoder = Decoder(built(variant), rows, CONTEXT, **options)
    spoil(decoder)
    for seed in range(-(-count // rows)):
        rng = random.Random(seed)
        ids = prompts(variant, rows, rng.randint(4, 28), seed)
        shared = rng.randint(1, ids.shape[1] - 1)
        ids[:, :shared] = ids[:1, :shared]
        text, want = greedy_uncached(decoder.model, ids, new)
        same = torch.ones(rows, dtype=torch.bool)
        for way in WAYS:
            logits, places = read_by(decoder, ids, way, shared, rng)
            for _ in range(new):
                id_ = logits[:, -1].argmax(-1)
                same &= id_ == text[:, places[-1] + 1]
                logits = torch.cat([logits, decoder.step(id_)[:, None]], 1)
                places.append(places[-1] + 1)
            worst = relative(logits, want[:, places])
            found.by_way[way] = max(found.by_way.get(way, 0.0), worst)
        found.prompts, found.ids = found.prompts + rows, found.ids + int(same.sum())
    found.worst = max(found.by_way.values())
    return found


def decode_by(decoder, texts: list, padding: int, new: int) -> tuple:
    """As `decode`."""
    ids, where = padded(texts, padding)
    decoder.truncate(0)
    logits = [decoder.read(ids, where).clone()]
    for _ in range(new - 1):
        logits.append(decoder.step(logits[-1].argmax(-1)).clone())
    logits = torch.stack(logits, 1)
    return logits.argmax(-1), logits


def decoder_batches(variant: Variant, options: dict, batches=BATCHES, paddings=PADDINGS,
                    deterministic=False, new: int = 2) -> Batches:
    """R6 for a decoder."""
    make = partial(Decoder, built(variant), max_length=CONTEXT, **options,
                   deterministic=deterministic)
    texts, found, rng = some_texts(variant), Batches(), random.Random(0)
    single = make(max_batch=1)
    alone = [decode_by(single, [text], 0, new) for text in texts]
    for B in batches:
        decoder = make(max_batch=B)
        for padding in paddings:
            rows = rng.sample(range(len(texts)), B)
            ids, logits = decode_by(decoder, [texts[r] for r in rows], padding, new)
            found.add(ids, logits, [alone[row] for row in rows])
    return found


def lagging(decoder) -> None:
    """Positions that are one too small from the second step on."""
    begin = decoder.cache.begin

    def late(B, T, positions=None):
        where = begin(B, T, positions)
        index = (where.index - int(decoder.cache._filled.length > 0)).clamp(min=0)
        decoder.cache._step.where = Positions(index, where.aligned)
        return decoder.cache._step.where

    decoder.cache.begin = late


def report_decoder(count: int, batches=BATCHES, paddings=(0, 1, 2, 7, 16, 33, 64)):
    """All forms of the decoder, through fewer prompts and paddings than the model."""
    rows = {}
    for name, variant, options in tqdm(DECODERS, "decoder", delay=2, disable=None):
        rounds = options.get("quantize") == "int8_dynamic"
        cached = decoder_cached(variant, options, count)
        plain = decoder_batches(variant, options, batches, paddings)
        fixed = decoder_batches(variant, options, batches, paddings, deterministic=True)
        spoilt = decoder_cached(variant, options, 20, spoil=lagging)
        rows[name] = dict(
            rounds=rounds, native=Decoder(built(variant), **options).native is not None,
            prompts=cached.prompts, same_ids=cached.ids, worst=cached.worst,
            rows=plain.rows, rows_same_ids=plain.same_ids, rows_worst=plain.worst,
            deterministic_rows=fixed.rows, deterministic_bits=fixed.bits,
            control_worst=spoilt.worst)
    strict = [row for row in rows.values() if not row["rounds"]]
    total = lambda key: sum(row[key] for row in rows.values())
    return dict(
        forms=len(rows), prompts=total("prompts"), same_ids=total("same_ids"),
        worst=max(row["worst"] for row in strict), rows_compared=total("rows"),
        rows_same_ids=total("rows_same_ids"),
        rows_worst=max(row["rows_worst"] for row in strict),
        deterministic_rows=total("deterministic_rows"),
        deterministic_bits=total("deterministic_bits"), rows=rows,
        controls=dict(red=sum(row["control_worst"] > BOUND for row in rows.values())))


# ------------------------------------------------------------------ the report


def verdicts(r5: dict, r6: dict, decoder: dict) -> dict:  # row -> whether it is green
    """A row is green if all is as it should be and each control turned red.

    Words of a decoder that rounds activations may differ where a number lies between
    two integers; all else counts."""
    red = r5["controls"]
    left_out = r6["controls"]["bits_without"]
    strict = [row for row in decoder["rows"].values() if not row["rounds"]]
    return {
        "R5": r5["prompts"] == r5["same_ids"] and r5["worst"] <= BOUND
        and all(f["invariant_bits"] == 0 for f in r5["rounding"].values())
        and all(count == red["variants"] for count in red["red"].values())
        and all(row["prompts"] == row["same_ids"] for row in strict)
        and decoder["worst"] <= BOUND and decoder["controls"]["red"] == decoder["forms"],
        "R6": r6["rows_compared"] == r6["same_ids"] and r6["worst"] <= BOUND
        and r6["wrong_texts"] == 0 and r6["invariant_bits"] == 0
        and r6["controls"]["scale_of_the_batch"] > BOUND
        and r6["controls"]["padding_seen"] > BOUND and all(left_out.values())
        and all(row["rows"] == row["rows_same_ids"] for row in strict)
        and decoder["rows_worst"] <= BOUND and decoder["deterministic_bits"] == 0,
    }


def tell(r5: dict, r6: dict, decoder: dict, green: dict) -> None:
    """One figure a row."""
    print(f"R5  {r5['same_ids']:,} of {r5['prompts']:,} prompts with the same ids, "
          f"{r5['variants']} variants, logits within {r5['worst']:.1e}; decoder: "
          f"{decoder['same_ids']:,} of {decoder['prompts']:,}, {decoder['worst']:.1e}")
    print(f"R6  {r6['same_ids']:,} of {r6['rows_compared']:,} rows with the same ids, "
          f"logits within {r6['worst']:.1e}; bits that differ within batch_invariant: "
          f"{r6['invariant_bits']}, in a deterministic decoder: "
          f"{decoder['deterministic_bits']}")
    for row, good in green.items():
        print(row, "green" if good else "RED")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("R5", "R6", "decoder"))
    parser.add_argument("--quick", action="store_true", help="few of each, no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    few = ((1, 3, 8, 32), (0, 1, 17)) if args.quick else ()
    parts = dict(
        R5=lambda: report_r5(40 if args.quick else 1000, 20),
        R6=lambda: report_r6(*few),
        decoder=lambda: report_decoder(40 if args.quick else 200, *few))
    kept = load("reliability_inference")["figures"] if args.only else {}
    found = {}
    for name, report in parts.items():
        found[name] = report() if args.only in (None, name) else kept[name]
        if not args.quick:  # a cut-off keeps what is done
            record("reliability_inference", {**kept, **found})
    green = verdicts(*found.values())
    tell(*found.values(), green)
    note = {"note": f"all but {args.only} is from an earlier run"} if args.only else {}
    if not args.quick:
        record("reliability_inference", dict(green=green, **found, **note))
    raise SystemExit(not all(green.values()))


if __name__ == "__main__":
    main()
