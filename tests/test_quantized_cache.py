"""Int8Cache: what it stores, what it gives back, and the invariants of every cache."""
import copy
import random
from functools import partial

import pytest
import torch

from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.inference import KVCache
from gptbook.quantization import decibels, quantize_tokens
from gptbook.quantized_cache import Int8Cache, as_cached, seeing_rounded

V, CONTEXT = 97, 64
RECIPES = {
    "gpt2": ({}, 4), "llama": ({}, 2), "mistral": (dict(window=6), 1), "alibi": ({}, 4),
    "longformer": (dict(window=6), 4), "mixtral": (dict(n_experts=4, window=7), 2)}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def make(recipe, dtype=torch.float64):
    set_seed(0)
    options, heads = RECIPES[recipe]
    config = GPTConfig(V, CONTEXT, 32, 3, 4, heads, recipe=recipe, options=options)
    model = GPTModel(config).eval()
    for p in model.parameters():
        p.mul_(3)
    return model.to(dtype)


@pytest.fixture(scope="module", params=list(RECIPES))
def pair(request):
    """A model in float64, and its oracle: attention that sees rounded keys."""
    with torch.no_grad():
        model = make(request.param)
    return model, oracle_of(model)


def oracle_of(model):
    oracle = copy.deepcopy(model)
    for block in oracle.blocks:
        block.attn.kernel = seeing_rounded(block.attn.kernel)
    return oracle


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


close = partial(torch.testing.assert_close, atol=1e-8, rtol=0)


# what is stored ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16,
                                   torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 8), (1, 2, 9, 64)])
def test_what_comes_back_is_within_half_a_step(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = as_cached(x)
    assert back.dtype == dtype and back.shape == x.shape
    step = x.float().abs().amax(-1, keepdim=True) / 127
    slack = 2 * torch.finfo(dtype).eps * x.float().abs().amax(-1, keepdim=True)
    assert ((back.float() - x.float()).abs() <= step / 2 * (1 + 1e-5) + slack).all()


def test_a_worse_scale_would_be_noticed():
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(-1, keepdim=True) / 127
    scale = x.abs().amax() / 127  # one for all
    assert (((x / scale).round() * scale - x).abs() > step / 2 * (1 + 1e-5)).any()


def test_zeros_and_numbers_that_are_not_finite():
    x = torch.zeros(1, 1, 3, 4)
    assert torch.equal(as_cached(x), x)
    for bad in (float("nan"), float("inf")):
        x[0, 0, 1, 2] = bad
        back = as_cached(x)
        assert not back[0, 0, 1].isfinite().any(), "a broken token stays visible"
        assert torch.equal(back[0, 0, [0, 2]], torch.zeros(2, 4))


def test_buffers_are_the_rounded_ones_of_a_plain_cache(pair):
    model, _ = pair
    plain, small = KVCache(model), Int8Cache(model)
    ids = tokens(2, 9)
    model(ids, cache=plain), model(ids, cache=small)
    for i, (q, scale) in enumerate((small.buffers[0][:2], small.buffers[0][2:])):
        n = min(9, plain.sizes[0])
        due, due_scale = quantize_tokens(plain.buffers[0][i][:, :, :n])
        assert torch.equal(q[:, :, :n], due) and q.dtype == torch.int8
        torch.testing.assert_close(scale[:, :, :n], due_scale, atol=0, rtol=0)


def test_bytes_are_the_formula():
    model = make("llama", torch.float32)
    cache = Int8Cache(model, max_length=50)
    model(tokens(3, 5), cache=cache)
    size = sum(x.nbytes for parts in cache.buffers for x in parts)
    config = model.config
    assert size == 2 * 3 * 50 * config.n_layers * config.kv_heads * (config.head_dim + 4)


@pytest.mark.parametrize("chunk", [1, 2, 5, 12])
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("recipe", ["gpt2", "mistral"])
def test_equal_keys_are_stored_as_equal_bits_in_every_chunking(recipe, chunk, spare):
    """Given the same keys: no kernel lies between, so there is no tolerance."""
    model = make(recipe, torch.float32)
    g = torch.Generator().manual_seed(1)
    kv = torch.randn(2, 3, 2, model.config.kv_heads, 12, 8, generator=g)
    one, other = Int8Cache(model, spare=spare), Int8Cache(model, spare=spare)
    for cache, size in ((one, 12), (other, chunk)):
        for start in range(0, 12, size):
            part = kv[..., start : start + size, :]
            cache.begin(2, part.shape[-2])
            for layer in range(3):
                cache.update(layer, part[0, layer], part[1, layer])
            cache.commit()
    for a, b in zip(one.buffers, other.buffers):
        assert all(map(torch.equal, a, b))


# cached = the oracle ----------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 40])
@pytest.mark.parametrize("spare", [0, 3])
def test_chunks(pair, chunk, spare):
    model, oracle = pair
    ids, cache = tokens(3, 40), Int8Cache(model, spare=spare)
    got = torch.cat([model(part, cache=cache) for part in ids.split(chunk, dim=1)], 1)
    close(got, oracle(ids))
    assert cache.length == 40


def test_the_oracle_is_not_the_plain_model(pair):
    model, oracle = pair
    ids = tokens(3, 40)
    want, rounded = model(ids), oracle(ids)
    assert (want - rounded).abs().max() > 1e-4, "rounding must show"
    assert decibels(want, rounded) > 20


def test_exact_keys_in_the_chunk_turn_the_chunk_test_red():
    class ExactChunk(Int8Cache):
        def update(self, layer, k, v):
            keys, values, where = super().update(layer, k, v)
            old = keys.shape[2] - k.shape[2]
            return (torch.cat([keys[:, :, :old], k], 2),
                    torch.cat([values[:, :, :old], v], 2), where)

    model, ids = make("gpt2"), tokens(2, 30)
    whole = model(ids, cache=ExactChunk(model))
    close(whole, model(ids))  # prefill looks perfect
    cache = ExactChunk(model)
    steps = torch.cat([model(part, cache=cache) for part in ids.split(1, dim=1)], 1)
    assert (steps - whole).abs().max() > 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_anything_that_can_happen_to_a_cache(pair, seed):
    """Padding, rows that rest, interruptions, forks, orders, tokens taken back."""
    (model, oracle), rng = pair, random.Random(seed)
    cache, texts = Int8Cache(model, CONTEXT, spare=4), [[] for _ in range(rng.randint(1, 3))]
    for _ in range(10):
        n, B = rng.choice((1, 1, 2, 5, 9)), len(texts)
        if max(map(len, texts)) + n > CONTEXT:
            break
        ids = tokens(B, n, seed=rng.randrange(10**9))
        rests = [rng.random() < 0.3 for _ in range(B)]
        where = torch.tensor([[-1] * n if r else [len(t) + i for i in range(n)]
                              for t, r in zip(texts, rests)])
        interrupt(model, ids, where, cache, rng.randrange(3))
        out = model(ids, positions=where, cache=cache)
        for b, text in enumerate(texts):
            if not rests[b]:
                text += ids[b].tolist()
                close(out[b], oracle(torch.tensor([text]))[0, -n:])
        if any(texts):
            cache, texts = edited(cache, texts, rng)


def interrupt(model, ids, where, cache, block):
    def stop(*_):
        raise KeyboardInterrupt

    hook = model.blocks[block].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids, positions=where, cache=cache)
    hook.remove()


def edited(cache, texts, rng):
    what, B = rng.choice(("back", "reorder", "fork", "nothing")), len(texts)
    if what == "back":
        keep = [max(0, len(t) - rng.randint(0, 3)) for t in texts]
        try:
            cache.truncate(keep)
        except ValueError:  # a ring that was taken back twice
            return cache, texts
        return cache, [t[:n] for t, n in zip(texts, keep)]
    if what == "reorder":
        rows = [rng.randrange(B) for _ in range(rng.randint(1, 3))]
        cache.reorder(rows)
        return cache, [list(texts[i]) for i in rows]
    if what == "fork" and B < 3:
        return cache.fork(2), [list(t) for t in texts for _ in range(2)]
    return cache, texts


def test_an_interrupted_step_can_be_repeated_exactly(pair):
    model, _ = pair
    ids, cache, twin = tokens(2, 30), Int8Cache(model), Int8Cache(model)
    for c in (cache, twin):
        model(ids[:, :23], cache=c)
    interrupt(model, ids[:, 23:], None, cache, 2)
    assert torch.equal(*(model(ids[:, 23:], cache=c) for c in (cache, twin)))


def test_forks_are_independent(pair):
    model, oracle = pair
    ids, cache = tokens(1, 20), Int8Cache(model)
    model(ids[:, :12], cache=cache)
    model(tokens(2, 8, seed=9), cache=cache.fork(2))
    close(model(ids[:, 12:], cache=cache), oracle(ids)[:, 12:])


# dtypes and errors ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_other_dtypes(dtype):
    model, ids = make("llama", dtype), tokens(2, 24)
    cache = Int8Cache(model)
    got = torch.cat([model(part, cache=cache) for part in ids.split(5, dim=1)], 1)
    assert got.dtype == dtype and cache.buffers[0][0].dtype == torch.int8
    assert cache.buffers[0][1].dtype == torch.float32
    assert decibels(make("llama")(ids), got) > 20


def test_a_model_of_another_dtype_is_refused():
    """Integers look alike: without the note, half a cache would come from each model."""
    model, ids = make("gpt2", torch.float32), tokens(2, 10)
    other, cache = make("gpt2", torch.bfloat16), Int8Cache(model)
    before = model(ids, cache=cache)
    for held in (cache, cache.fork(2)):
        rows = ids[:, :1].repeat_interleave(len(held.buffers[0][0]) // 2, 0)
        with pytest.raises(ValueError, match="float32, got torch.bfloat16: another"):
            other(rows, cache=held)
    assert cache.length == 10 and torch.equal(model(ids, cache=Int8Cache(model)), before)
    cache.truncate(0)  # an empty one may be used again
    assert other(ids, cache=cache).dtype == torch.bfloat16


def test_in_float32_the_difference_is_below_that_of_the_rounding():
    model, ids = make("llama", torch.float32), tokens(4, 40)
    oracle, cache = oracle_of(model), Int8Cache(model)
    got = torch.cat([model(part, cache=cache) for part in ids.split(3, dim=1)], 1)
    rounding = (oracle(ids) - model(ids)).abs().max()
    assert (got - oracle(ids)).abs().max() < rounding


def test_inference_mode_and_no_grad_can_be_mixed():
    model, ids, cache, parts = make("mistral"), tokens(2, 40), None, []
    cache = Int8Cache(model, spare=3)
    for t, mode in zip(range(0, 40, 4), (torch.inference_mode, torch.no_grad) * 5):
        with mode():
            parts.append(model(ids[:, t : t + 4], cache=cache).clone())
            cache.truncate(t + 4)
            cache.reorder([0, 1])
    close(torch.cat(parts, 1), oracle_of(model)(ids))


def test_errors_leave_the_cache_as_it_was():
    model, oracle, ids = make("gpt2"), oracle_of(make("gpt2")), tokens(2, 20)
    cache = Int8Cache(model, max_length=20)
    model(ids[:, :10], cache=cache)
    heads = GPTModel(GPTConfig(V, CONTEXT, 32, 3, 4, 2)).eval().double()
    for call, match in (
        (lambda: model(ids[:, :11], cache=cache), "21 tokens .* max_length=20"),
        (lambda: model(ids[:1, :1], cache=cache), "1 rows .* 2 rows"),
        (lambda: heads(ids[:, :1], cache=cache), "layer 0"),
        (lambda: cache.truncate(-1), "-1"),
        (lambda: cache.reorder([0, 2]), "2 rows"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
        assert cache.length == 10
        close(model(ids[:, 10:12], cache=cache), oracle(ids[:, :12])[:, 10:])
        cache.truncate(10)
    with pytest.raises(RuntimeError, match="no_grad"), torch.enable_grad():
        model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match="step"):
        Int8Cache(model).update(0, torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8))
