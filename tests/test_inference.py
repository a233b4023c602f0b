"""Cached equals full, for every variant, chunking and history of a cache."""
import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptbook import inference
from gptbook.core import (
    GPTConfig, GPTModel, MultiHeadAttention, Positions, set_seed,
)
from gptbook.inference import (
    Filled, KVCache, given_positions, held_positions, next_positions, settle,
)
from outside_parts import NoPositions, Rotary, SlidingWindow

V, CONTEXT = 97, 64


rotary = partial(MultiHeadAttention, rotary=Rotary)
local = partial(rotary, mask=SlidingWindow(8))
shorter = partial(rotary, mask=SlidingWindow(5))
VARIANTS = {
    "learned": {},
    "rotary": dict(attention=rotary, position_embedding=NoPositions),
    "window, learned": dict(attention=partial(MultiHeadAttention, mask=SlidingWindow(8))),
    "window": dict(attention=local, position_embedding=NoPositions),
    "window and full": dict(attention=lambda c, i: (rotary if i % 2 else local)(c, i),
                            position_embedding=NoPositions),
    "two windows": dict(attention=lambda c, i: (shorter if i % 2 else local)(c, i),
                        position_embedding=NoPositions),
}
HEADS = {"window": 1, "rotary": 2, "two windows": 2}


def make(variant, **sizes):
    set_seed(0)
    kv_heads = HEADS.get(variant, 4)
    model = GPTModel(GPTConfig(V, CONTEXT, 32, 4, 4, kv_heads, **sizes), **VARIANTS[variant]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request):
    return make(request.param)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got, want):
    torch.testing.assert_close(got, want, atol=1e-5 * max(1, want.abs().max().item()), rtol=0)


def stop_in_block(model, block):
    """A hook that interrupts a forward pass in front of a block."""
    def stop(*_):
        raise KeyboardInterrupt

    return model.blocks[block].register_forward_pre_hook(stop)


# --- R5 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 40])
@pytest.mark.parametrize("spare", [0, 3, 50])
def test_chunks(model, chunk, spare):
    ids = tokens(3, 40)
    cache = KVCache(model, spare=spare)
    parts = [model(part, cache=cache) for part in ids.split(chunk, dim=1)]
    assert_same(torch.cat(parts, 1), model(ids))
    assert cache.length == 40 and type(cache.length) is int


def test_forty_prompts_greedy(model):
    """Small count of R5: ids equal in all cases, logits to 1e-5, no reruns."""
    for b, prompt in enumerate(tokens(40, 24, seed=1)):
        prompt, cache = prompt[None, : 3 + b % 20], KVCache(model)
        logits = model(prompt, cache=cache)[:, -1]
        for _ in range(4):
            full = model(prompt)[:, -1]
            assert_same(logits, full)
            assert logits.argmax() == full.argmax()
            prompt = torch.cat([prompt, full.argmax(-1, keepdim=True)], 1)
            logits = model(prompt[:, -1:], cache=cache)[:, -1]


@pytest.mark.slow
def test_a_thousand_prompts_in_random_chunks(model):
    rng = random.Random(0)
    for n in range(1000):
        ids, t, cache = tokens(1, 40, seed=n), 0, KVCache(model, spare=rng.choice((0, 4)))
        parts = []
        while t < 40:
            size = min(rng.choice((1, 2, 3, 8, 17)), 40 - t)
            parts.append(model(ids[:, t : t + size], cache=cache))
            t += size
        assert_same(torch.cat(parts, 1), model(ids))


class Walk:
    """A cache with everything that can happen to it, beside the texts it should hold."""

    def __init__(self, model, seed):
        self.model, self.rng = model, random.Random(seed)
        self.spare = self.rng.choice((0, 2, 6))
        self.cache = KVCache(model, CONTEXT, self.spare)
        self.texts = [[] for _ in range(self.rng.randint(1, 4))]

    def step(self):
        n_tokens, B = self.rng.choice((1, 1, 2, 3, 5, 12)), len(self.texts)
        ids, where = tokens(B, n_tokens, seed=self.rng.randrange(10**9)), None
        real = [[True] * n_tokens for _ in range(B)]
        if self.rng.random() < 0.4:  # padding anywhere, rows that rest
            real = [[rest and self.rng.random() < 0.7 for _ in range(n_tokens)]
                    for rest in (self.rng.random() < 0.8 for _ in range(B))]
            where = torch.tensor([[len(t) + sum(r[:i]) if r[i] else -1 for i in range(n_tokens)]
                                  for t, r in zip(self.texts, real)])
        new = [[i for i, r in zip(row, rs) if r] for row, rs in zip(ids.tolist(), real)]
        if max(len(t) + len(n) for t, n in zip(self.texts, new)) > CONTEXT:
            return self.back([0] * B)
        if self.rng.random() < 0.4:
            self.interrupt(ids, where)
        out = self.model(ids, positions=where, cache=self.cache)
        for b, (text, chunk) in enumerate(zip(self.texts, new)):
            text += chunk
            if chunk:
                want = self.model(torch.tensor([text]))[0, -len(chunk):]
                assert_same(out[b, torch.tensor(real[b])], want)

    def interrupt(self, ids, where):
        hook = stop_in_block(self.model, self.rng.randrange(4))
        same = self.rng.random() < 0.5
        with pytest.raises((KeyboardInterrupt, ValueError)):
            if same:
                self.model(ids, positions=where, cache=self.cache)
            else:
                self.model(tokens(len(self.texts), 9, seed=1), cache=self.cache)
        hook.remove()

    def back(self, lengths):
        try:
            self.cache.truncate(lengths)
        except ValueError:  # only a ring may refuse, and only beyond its spare
            assert min(self.cache.sizes) < CONTEXT
            assert max(len(t) - n for t, n in zip(self.texts, lengths)) > 0
        else:
            self.texts = [t[:n] for t, n in zip(self.texts, lengths)]

    def edit(self):
        what, B = self.rng.choice(("back", "reorder", "fork", "nothing")), len(self.texts)
        if what == "back":
            self.back([max(0, len(t) - self.rng.randint(0, self.spare)) for t in self.texts])
        if what == "reorder":
            rows = [self.rng.randrange(B) for _ in range(self.rng.randint(1, 4))]
            self.cache.reorder(rows)
            self.texts = [list(self.texts[i]) for i in rows]
        if what == "fork" and B < 3 and any(self.texts):
            self.cache = self.cache.fork(2)
            self.texts = [list(t) for t in self.texts for _ in range(2)]
        if any(self.texts):
            lengths = [len(t) for t in self.texts]
            held = self.cache.length
            assert ([held] * len(lengths) if type(held) is int else held.tolist()) == lengths


@pytest.mark.parametrize("seed", range(8))
def test_anything_that_can_happen_to_a_cache(model, seed):
    walk = Walk(model, seed)
    for _ in range(12):
        walk.step()
        walk.edit()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 400))
def test_anything_that_can_happen_to_a_cache_often(model, seed):
    test_anything_that_can_happen_to_a_cache(model, seed)


# --- negative controls: what the tests above would notice ----------------------------------------


def test_the_chunk_test_notices_a_hasty_ring(monkeypatch):
    model, ids, right = make("window"), tokens(1, 40), inference.make_view

    def hasty(where, before, after, size):
        view = right(where, before, after, size)
        keys = Positions(held_positions(after, size, "cpu"))
        return view._replace(copy=False, keys=keys, n_slots=size) if view.copy else view

    monkeypatch.setattr(inference, "make_view", hasty)
    cache = KVCache(model)
    out = torch.cat([model(part, cache=cache) for part in ids.split(5, dim=1)], 1)
    assert (out - model(ids)).abs().max() > 0.5
    cache = KVCache(model)
    out = torch.cat([model(part, cache=cache) for part in ids.split(1, dim=1)], 1)
    assert_same(out, model(ids))  # one at a time hides it


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_unwritten_slots_are_zeros_since_nan_would_leak(monkeypatch, fill):
    model, zeros = make("learned"), torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda x, *shape: zeros(x, *shape) + fill)
    ids, where = tokens(2, 5), torch.tensor([[0, 1, 2, 3, 4], [-1, -1, -1, 0, 1]])
    out = model(ids, positions=where, cache=KVCache(model))
    assert out[1, 3:].isnan().any() == (fill != 0)


def test_forgotten_positions_show(model):
    if model.max_positions is None:
        return
    ids, cache = tokens(1, 20), KVCache(model)
    model(ids[:, :19], cache=cache)
    begin = cache.begin
    cache.begin = lambda B, T, positions: Positions(begin(B, T, positions).index * 0, True)
    assert (model(ids[:, 19:], cache=cache) - model(ids)[:, 19:]).abs().max() > 0.1


# --- an interrupted step ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("size", [1, 7])
def test_an_interrupted_step_can_be_repeated_exactly(model, block, size):
    ids, cache, twin = tokens(2, 40), KVCache(model), KVCache(model)
    for c in (cache, twin):
        model(ids[:, :23], cache=c)
    hook = stop_in_block(model, block)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 23 : 23 + size], cache=cache)
    hook.remove()
    assert cache.length == 23
    out, want = (model(ids[:, 23 : 23 + size], cache=c) for c in (cache, twin))
    assert torch.equal(out, want)


def test_an_interrupted_first_step_leaves_no_trace(model):
    cache, hook = KVCache(model), stop_in_block(model, 2)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(3, 5), cache=cache)
    hook.remove()
    ids = tokens(2, 7)  # another batch size, even
    assert torch.equal(model(ids, cache=cache), model(ids, cache=KVCache(model)))


# --- the parts of the protocol -----------------------------------------------------------------------


def test_lengths_are_integers_while_rows_agree():
    model = make("learned")
    cache, ids = KVCache(model), tokens(3, 6)
    model(ids, positions=torch.arange(6), cache=cache)
    assert cache.length == 6 and type(cache.length) is int
    model(ids[:, :1], positions=torch.tensor([[6], [-1], [6]]), cache=cache)
    assert cache.length.tolist() == [7, 6, 7]
    model(ids[:, :1], positions=torch.tensor([[-1], [6], [-1]]), cache=cache)
    assert cache.length == 7 and type(cache.length) is int
    assert cache.begin(3, 2).aligned


def test_finished_rows_are_neither_written_nor_advanced():
    model = make("window and full")
    cache, ids = KVCache(model), tokens(2, 12)
    model(ids, cache=cache)
    before = [x[1].clone() for held in cache.buffers for x in held]
    model(ids[:, :3], positions=torch.tensor([[12, 13, 14], [-1, -1, -1]]), cache=cache)
    assert all(torch.equal(a, x[1]) for a, x in
               zip(before, (x for held in cache.buffers for x in held)))
    assert cache.length.tolist() == [15, 12]


def test_forks_are_independent(model):
    ids, cache = tokens(1, 20), KVCache(model)
    model(ids[:, :12], cache=cache)
    twin = cache.fork(1)
    model(tokens(1, 8, seed=9), cache=twin)
    assert cache.length == 12
    assert_same(model(ids[:, 12:], cache=cache), model(ids)[:, 12:])


def test_a_ring_takes_back_its_spare_and_no_more():
    model, ids = make("window"), tokens(1, 40)
    for spare in (0, 1, 5):
        for back in range(spare + 3):
            cache = KVCache(model, spare=spare)
            model(ids[:, :30], cache=cache)
            if back > spare:
                with pytest.raises(ValueError, match=f"spare={spare}"):
                    cache.truncate(30 - back)
                back = 0
            else:
                cache.truncate(30 - back)
            assert cache.length == 30 - back
            assert_same(model(ids[:, 30 - back :], cache=cache), model(ids)[:, 30 - back :])


def test_a_ring_can_start_again():
    model, ids = make("window"), tokens(1, 30)
    cache = KVCache(model)
    model(tokens(1, 25, seed=3), cache=cache)
    cache.truncate(0)
    out = torch.cat([model(part, cache=cache) for part in ids.split(3, dim=1)], 1)
    assert_same(out, model(ids))


def test_rings_are_small_and_text_may_be_long():
    model = make("window")
    cache = KVCache(model, spare=2)
    assert cache.max_length is None and cache.sizes == [10] * 4
    ids = tokens(1, 200)
    out = torch.cat([model(part, cache=cache) for part in ids.split(9, dim=1)], 1)
    assert_same(out, model(ids))
    assert KVCache(make("rotary")).max_length == CONTEXT  # no table: the configured context
    assert KVCache(model, max_length=6).sizes == [6] * 4


def test_memory_is_the_formula():
    model = make("rotary")
    cache = KVCache(model, max_length=50)
    model(tokens(3, 5), cache=cache)
    config = model.config
    per_token = 2 * config.n_layers * config.kv_heads * config.head_dim * 4
    assert sum(x.nbytes for held in cache.buffers for x in held) == 3 * 50 * per_token


# --- errors, before anything is written --------------------------------------------------------------


def raises_and_still_works(model, cache, call, match, error=ValueError):
    ids, n = tokens(2, 20), cache.length
    with pytest.raises(error, match=match):
        call()
    assert cache.length == n
    assert_same(model(ids[:, n : n + 2], cache=cache), model(ids)[:, n : n + 2])


def test_errors_leave_the_cache_as_it_was():
    model = make("learned")
    ids = tokens(2, 20)
    cache = KVCache(model, max_length=20)
    model(ids[:, :10], cache=cache)
    at = lambda *rows: torch.tensor(rows)
    for call, match in (
        (lambda: model(ids[:, :11], cache=cache), "21 tokens .* max_length=20"),
        (lambda: model(ids[:1, :1], cache=cache), "1 rows .* 2 rows"),
        (lambda: model(ids[:, :2], positions=at([10, 11], [10, 12]), cache=cache), "row 1 .* 11.* 12"),
        (lambda: model(ids[:, :1], positions=at([9], [10]), cache=cache), "row 0 .* 10.* 9"),
        (lambda: model(ids[:, :1], positions=at([10], [-3]), cache=cache), "-3"),
        (lambda: model(ids[:, :1], positions=torch.tensor([10.0]), cache=cache), "whole numbers"),
        (lambda: model(ids[:, :2], positions=at([10, 11, 12]), cache=cache), "2 tokens"),
        (lambda: cache.truncate(-1), "-1"),
        (lambda: cache.truncate([1, 2, 3]), "2 of them"),
        (lambda: cache.truncate(1.5), "1.5"),
        (lambda: cache.reorder([0, 2]), "2 rows"),
        (lambda: cache.reorder([-1]), "-1"),
        (lambda: cache.reorder([]), "rows"),
        (lambda: cache.fork(0), "rows"),
    ):
        raises_and_still_works(model, cache, call, match)
        cache.truncate(10)


def test_another_model_or_dtype_is_refused():
    model, cache = make("learned"), KVCache(make("learned"))
    model(tokens(2, 20)[:, :10], cache=cache)
    half = make("learned").to(torch.bfloat16)
    raises_and_still_works(model, cache, lambda: half(tokens(2, 1), cache=cache), "bfloat16")
    cache.truncate(10)
    other = GPTModel(GPTConfig(V, CONTEXT, 32, 6, 4)).eval()
    raises_and_still_works(model, cache, lambda: other(tokens(2, 1), cache=cache), "4 layers")
    cache.truncate(10)
    fewer = GPTModel(GPTConfig(V, CONTEXT, 32, 2, 4)).eval()
    raises_and_still_works(model, cache, lambda: fewer(tokens(2, 1), cache=cache), "4 layers", RuntimeError)
    cache.truncate(10)
    heads = GPTModel(GPTConfig(V, CONTEXT, 32, 4, 2)).eval()
    raises_and_still_works(model, cache, lambda: heads(tokens(2, 1), cache=cache), "layer 0")


def test_gradients_are_refused():
    model = make("learned")
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model(tokens(1, 3), cache=KVCache(model))


def test_impossible_caches_are_refused():
    model = make("learned")
    for options in (dict(max_length=0), dict(max_length=CONTEXT + 1), dict(spare=-1)):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            KVCache(model, **options)


def test_calls_out_of_order_are_refused():
    cache = KVCache(make("learned"))
    k = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="step"):
        cache.update(0, k, k)
    with pytest.raises(RuntimeError, match="4 layers"):
        cache.commit()
    cache.begin(1, 1)
    cache.update(0, k, k)
    with pytest.raises(RuntimeError, match="4 layers"):
        cache.commit()


# --- modes, compilation, the oracle ------------------------------------------------------------------


def test_inference_mode_and_no_grad_can_be_mixed():
    model, ids = make("window and full"), tokens(2, 40)
    cache, parts = KVCache(model, spare=3), []
    for t, mode in zip(range(0, 40, 4), (torch.inference_mode, torch.no_grad) * 5):
        with mode():
            parts.append(model(ids[:, t : t + 4], cache=cache).clone())
            cache.truncate(t + 4)
            cache.reorder([0, 1])
            cache = cache.fork(1)
    assert_same(torch.cat(parts, 1), model(ids))


def test_what_a_ring_copies_in_inference_mode_can_be_written_later():
    model, ids = make("window and full"), tokens(2, 41)
    cache = KVCache(model)
    with torch.inference_mode():
        for part in ids[:, :40].split(4, 1):  # wraps, so that each step copies the ring
            model(part, cache=cache)
    with torch.no_grad():  # one token is written in place
        last = model(ids[:, 40:], cache=cache)
        assert_same(last, model(ids)[:, 40:])


@pytest.mark.parametrize("n_kv", [4, 2])
def test_outputs_and_keys_equal_transformers(n_kv):
    """Their cache, our attention math: keys, values and logits of a decoder with GQA."""
    transformers = pytest.importorskip("transformers")
    past = transformers.DynamicCache()
    set_seed(0)
    model = GPTModel(GPTConfig(V, CONTEXT, 32, 4, 4, n_kv)).eval()

    class Theirs:  # the protocol of this book, spoken by their cache
        n = 0

        def begin(self, B, T, positions=None):
            self.now = Positions(torch.arange(self.n, self.n + T)[None])
            return self.now

        def update(self, layer, k, v):
            k, v = past.update(k, v, layer)
            return k, v, Positions(torch.arange(k.shape[2])[None])

        def commit(self):
            self.n += self.now.index.shape[1]

    theirs, cache = Theirs(), KVCache(model)
    for part in tokens(2, 30).split([9, 1, 1, 5, 1, 13], dim=1):
        assert_same(model(part, cache=cache), model(part, cache=theirs))
    for (keys, values), layer in zip(cache.buffers, past.layers):
        torch.testing.assert_close(keys[:, :, :30], layer.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(values[:, :, :30], layer.values, atol=1e-5, rtol=0)


def test_a_compiled_model_does_not_compile_each_length():
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    model, ids, counter = make("learned"), tokens(2, 12), CompileCounter()
    model.blocks = model.blocks[:1]  # one block is enough, and compiles fast
    compiled, cache = torch.compile(model, backend=counter), KVCache(model)
    parts = [compiled(part, cache=cache) for part in ids.split([8] + [1] * 4, dim=1)]
    assert_same(torch.cat(parts, 1), model(ids))
    assert counter.frame_count <= 3


# --- properties (R12) ---------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_held_positions_is_what_writing_one_by_one_gives(size, chunks):
    slots, filled = [-1] * size, Filled()
    for n in chunks:
        where, filled = next_positions(filled, n, "cpu")
        for p in where.index[0].tolist():
            slots[p % size] = p
        assert held_positions(filled, size, "cpu")[0].tolist() == slots


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5),
       st.integers(-3, 6), st.integers(0, 2))
def test_given_positions_takes_what_continues_and_nothing_else(real, wrong, column):
    starts = torch.arange(len(real)) * 2
    filled = settle(starts, starts)
    real = torch.tensor(real)
    index = torch.where(real, starts[:, None] + real.cumsum(1) - 1, -1)
    where, after = given_positions(filled, index)
    assert (torch.as_tensor(after.lengths).flatten() == starts + real.sum(1)).all()
    other = index.clone()
    other[0, column] = wrong
    due = torch.where(other >= 0, starts[:, None] + (other >= 0).cumsum(1) - 1, -1)
    if not torch.equal(other, due):
        with pytest.raises(ValueError, match="row 0"):
            given_positions(filled, other)


def test_a_step_never_writes_a_slot_twice():
    for size in (3, 8):
        for lengths in ([0, 0], [5, 2], [20, 11]):
            for n in (1, 2, 9, 20):
                start = torch.tensor(lengths)
                before = settle(start, start)
                index = start[:, None] + torch.arange(n)
                where, after = given_positions(before, index)
                (rows, _, slots), _ = inference.destination(where, before, after, size)
                pairs = list(zip(rows.tolist(), slots.tolist()))
                assert len(pairs) == len(set(pairs)) == 2 * min(n, size)


def test_a_cache_for_a_model_with_a_wrapped_embedding(wrap_embedding):
    model, ids = make("learned"), tokens(2, 9)
    wrap_embedding(model)
    cache = KVCache(model)
    got = torch.cat([model(part, cache=cache) for part in ids.split(4, dim=1)], 1)
    assert_same(got, model(ids))
