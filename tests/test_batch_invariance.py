"""The same bits in every batch: each rule alone, all together, and what is refused."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptbook import batch_invariance
from gptbook.batch_invariance import (
    FixedShapes, attend_alone, batch_invariant, in_whole_vectors, linear_in_tiles)
from gptbook.core import Causal, GPTConfig, GPTModel, Positions, naive_attention, set_seed
from gptbook.generation import generate_text
from gptbook.inference import KVCache
from gptbook.long_context import ALiBi
from gptbook.quantization import quantize
from gptbook.quantized_cache import Int8Cache
from gptbook.sparse import SlidingWindow

V, CONTEXT = 97, 96
RECIPES = {
    "gpt2": ({}, 4), "llama": ({}, 2), "mistral": (dict(window=6), 1), "alibi": ({}, 4),
    "mixtral": (dict(n_experts=4, window=7), 2), "switch": (dict(n_experts=4), 4),
    "strided": (dict(stride=4), 4), "longformer": (dict(window=6), 4),
    "bigbird": (dict(window=6, block=4), 4)}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def make(recipe="gpt2", scheme=None, width=40):
    set_seed(0)
    options, heads = RECIPES[recipe]
    model = GPTModel(GPTConfig(V, CONTEXT, width, 2, 4, heads, recipe=recipe, options=options))
    for p in model.parameters():
        p.mul_(3)
    if scheme:
        quantize(model, scheme)
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# the three rules --------------------------------------------------------------------


@pytest.mark.parametrize("M", [0, 1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("K,N", [(1, 1), (24, 97), (40, 160), (384, 64), (768, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tiles_are_the_linear_and_do_not_depend_on_the_rows(M, K, N, dtype):
    set_seed(0)
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((M, K), (N, K), (N,)))
    out = linear_in_tiles(x, weight, bias)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, F.linear(x, weight, bias), atol=8 * eps * K, rtol=4 * eps)
    for row in range(M):
        assert torch.equal(linear_in_tiles(x[row], weight, bias), out[row])


def test_the_plain_linear_depends_on_the_rows():
    """What the test above would see, for some of the shapes at least."""
    set_seed(0)
    x, weight = torch.randn(40, 768), torch.randn(200, 768)
    assert any(not torch.equal(F.linear(x[row], weight), F.linear(x, weight)[row])
               for row in range(40))


@pytest.mark.parametrize("function", [
    F.gelu, F.silu, F.softplus, F.mish, F.elu, F.logsigmoid, torch.tanh, torch.sigmoid,
    torch.exp], ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 170, 40_000])
def test_whole_vectors_do_not_depend_on_the_rows(function, width):
    set_seed(0)
    x = torch.randn(9, width)
    out = in_whole_vectors(function, x)
    torch.testing.assert_close(out, function(x))
    for M in (1, 2, 5):
        assert torch.equal(in_whole_vectors(function, x[:M]), out[:M])
        assert torch.equal(in_whole_vectors(function, x[-M:].clone()), out[-M:])


@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (3, 0)], ids=str)
def test_a_single_number_and_none(shape):
    x = torch.full(shape, 0.3)
    torch.testing.assert_close(in_whole_vectors(torch.tanh, x), torch.tanh(x))


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(5)])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_queries_alone_are_the_formula(mask, heads, with_bias):
    set_seed(0)
    q, k, v = torch.randn(3, 4, 7, 8), *torch.randn(2, 3, heads, 11, 8)
    keys = torch.stack([torch.randperm(11) for _ in range(3)])
    keys[1, 3] = keys[2, 0] = -1  # dead slots
    queries = torch.stack([torch.arange(4, 11)] * 3)
    queries[2, :3] = -1  # padding
    where = dict(q_pos=Positions(queries), k_pos=Positions(keys), mask=mask,
                 bias=ALiBi(4) if with_bias else None)
    got = attend_alone(q, k, v, **where)
    torch.testing.assert_close(got, naive_attention(q, k, v, **where), atol=1e-5, rtol=1e-5)
    assert (got[2, :, :3] == 0).all(), "who sees nothing gets zero"
    order = torch.randperm(11)  # slots in another order: not a bit
    where["k_pos"] = Positions(keys[:, order])
    assert torch.equal(attend_alone(q, k[:, :, order], v[:, :, order], **where), got)


@pytest.mark.parametrize("function", [F.silu, F.softplus, F.mish], ids=lambda f: f.__name__)
def test_the_mode_takes_activations_by_the_rule(function):
    set_seed(0)
    x, rows = torch.randn(9, 101), range(1, 9)
    with FixedShapes():
        whole = function(x)
        assert all(torch.equal(function(x[:M].clone()), whole[:M]) for M in rows)
    torch.testing.assert_close(whole, function(x))


# all together -----------------------------------------------------------------------


def last_logits(model, texts, padding, cache):
    width = padding + max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    where = torch.tensor([[-1] * (width - len(t)) + [*range(len(t))] for t in texts])
    logits = [model(ids, positions=where, cache=cache)[:, -1]]
    logits.append(model(logits[0].argmax(-1)[:, None], cache=cache)[:, -1])
    return torch.stack(logits, 1)


def different(model, kind=KVCache, sizes=(2, 3, 7), paddings=(0, 9)):
    texts = [row[: 1 + 2 * b] for b, row in enumerate(tokens(7, 13).tolist())]
    alone = torch.cat([last_logits(model, [t], 0, kind(model)) for t in texts])
    return sum((last_logits(model, texts[:B], padding, kind(model)) != alone[:B]).sum().item()
               for B in sizes for padding in paddings)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_no_bit_depends_on_batch_or_padding(recipe):
    model = make(recipe)
    assert different(model) > 0, "the usual mode: otherwise nothing was tested"
    with batch_invariant(model):
        assert different(model) == 0
        assert different(model, Int8Cache) == 0


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "int4"])
def test_quantized_models(scheme):
    with batch_invariant(model := make("llama", scheme)):
        assert different(model) == 0


@pytest.mark.parametrize("part,plain", [
    ("linear_in_tiles", F.linear),
    ("in_whole_vectors", lambda function, *args, **kwargs: function(*args, **kwargs)),
    ("attend_alone", None)])
def test_each_rule_is_needed(monkeypatch, part, plain):
    model = make("llama")
    plain = plain or model.blocks[0].attn.kernel
    monkeypatch.setattr(batch_invariance, part, plain)
    with batch_invariant(model):
        assert different(model) > 0


@pytest.mark.parametrize("recipe", ["gpt2", "mistral", "mixtral", "alibi"])
@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_cached_is_uncached_to_the_bit(recipe, chunk):
    model, ids = make(recipe), tokens(3, 30)
    with batch_invariant(model):
        cache = KVCache(model, spare=2)
        parts = [model(part, cache=cache) for part in ids.split(chunk, dim=1)]
        assert torch.equal(torch.cat(parts, 1), model(ids))
        caches = Int8Cache(model), Int8Cache(model)
        parts = [model(part, cache=caches[0]) for part in ids.split(chunk, dim=1)]
        assert torch.equal(torch.cat(parts, 1), model(ids, cache=caches[1]))


def test_it_changes_nothing_but_the_last_bits():
    for recipe in RECIPES:
        model, ids = make(recipe), tokens(3, 30)
        usual = model(ids)
        with batch_invariant(model):
            fixed = model(ids)
        torch.testing.assert_close(fixed, usual, atol=1e-5 * usual.abs().max(), rtol=0)


def test_texts_of_a_batch_are_those_alone():
    model, prompts = make("llama"), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    with batch_invariant(model):
        for options in (dict(temperature=0.0), dict(seed=3)):
            together, told = generate_text(model, prompts, 12, log_probs=True, **options)
            for b, prompt in enumerate(prompts):
                seed = dict(seed=3 + b) if "seed" in options else {}
                text, numbers = generate_text(
                    model, prompt, 12, log_probs=True, **{**options, **seed})
                assert text[0] == together[b] and numbers[0] == told[b]


# entering, leaving, refusing --------------------------------------------------------


def test_the_model_is_as_before_even_after_an_error():
    model = make()
    kernels = [block.attn.kernel for block in model.blocks]
    with pytest.raises(ValueError, match="outside"), batch_invariant(model):
        model(torch.tensor([[V]]))
    assert [block.attn.kernel for block in model.blocks] == kernels
    with batch_invariant(model), batch_invariant(model):
        inner = model(tokens(1, 5))
    with batch_invariant(model):
        assert torch.equal(model(tokens(1, 5)), inner)
    assert [block.attn.kernel for block in model.blocks] == kernels


def test_other_attention_is_refused():
    class Other(nn.Module):
        def forward(self, x, positions, cache=None):
            return x

    model = GPTModel(GPTConfig(V, CONTEXT, 40, 2, 4),
                     attention=lambda config, layer: Other())
    with pytest.raises(ValueError, match="layer 0: Other"), batch_invariant(model):
        pass


@pytest.mark.parametrize("product", [
    lambda a: a @ a, lambda a: torch.mm(a, a), lambda a: a.matmul(a),
    lambda a: torch.einsum("ij,jk->ik", a, a), lambda a: torch.addmm(a, a, a),
    lambda a: a.mv(a[0]), lambda a: torch.dot(a[0], a[1]), lambda a: torch.inner(a, a),
    lambda a: torch.tensordot(a, a, 1), lambda a: a[None].bmm(a[None]),
    lambda a: torch.linalg.multi_dot([a, a, a]), lambda a: a.addmm(a, a)])
def test_products_without_a_rule_are_refused(product):
    with FixedShapes(), pytest.raises(RuntimeError, match="F.linear"):
        product(torch.eye(3))
