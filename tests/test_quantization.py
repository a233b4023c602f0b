"""Integers for weights: numerics over many shapes, whole models of every recipe, files,
and what bad input gets. Each check has a control that it must refuse."""

import importlib.util
import logging
import math
import os
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptbook import quantization as module
from gptbook import recipes as _recipes  # noqa: F401, registers them
from gptbook.atomic_files import CheckpointError
from gptbook.checkpoints import load_demo, load_model, save_model
from gptbook.core import GPTConfig, GPTModel, LossModel, replace_modules, set_seed
from gptbook.inference import KVCache
from gptbook.pruning import finalize, prune
from gptbook.quantization import (
    SCHEMES, Int4Linear, Int8Embedding, Int8Linear, decibels, dequantize_groups,
    integer_product, pack_int4, quantize, quantize_groups, quantize_rows,
    quantize_tokens, unpack_int4,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import reliability_quantization as trials  # noqa: E402

SHAPES = [(1, 1), (1, 7), (3, 32), (5, 33), (64, 100), (17, 768), (8, 3000)]
RECIPES = {  # name -> what its config says besides the sizes
    "gpt2": {}, "gpt2, untied, no biases": dict(tied=False, bias=False),
    "llama": dict(n_kv_heads=2, bias=False),
    "mistral": dict(n_kv_heads=2, options={"window": 7}, bias=False),
    "mixtral": dict(n_kv_heads=1, options={"n_experts": 4}, bias=False),
    "alibi": {},
}


def make(name="gpt2", dtype=torch.float32, **changes):
    set_seed(0)
    sizes = dict(vocab_size=97, context_length=48, emb_dim=40, n_layers=2, n_heads=4)
    model = GPTModel(GPTConfig(**{**sizes, "recipe": name.split(",")[0],
                                  **RECIPES[name], **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1).add_(0.1 * torch.randn_like(p) * (p.dim() == 1))
    return model.eval().to(dtype)


def tokens(B=2, T=20, seed=1):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(seed))


def bits_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# rows -----------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_rows_equal_the_formula_number_by_number(shape, bits):
    set_seed(sum(shape))
    weight = torch.randn(shape) * 10 ** torch.randn(shape[0], 1)
    q, scale = quantize_rows(weight, bits)
    largest = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert q.shape == shape and scale.shape == (shape[0], 1)
    assert q.abs().amax(1).eq(largest).all(), "the largest of a row is on the edge"
    for row, ints, s in zip(weight[:5], q, scale[:, 0]):
        assert s == row.abs().max() / largest
        assert ints.tolist() == [int((w / s).round()) for w in row]
    error = (q * scale - weight).abs()
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    truncated = (weight / scale).trunc() * scale  # the control: cut off, not rounded
    assert weight.numel() < 40 or not ((truncated - weight).abs() <= 0.51 * scale).all()


def test_ties_go_to_the_even_number_and_signs_do_not_matter():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_rows(weight)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    weight = torch.randn(50, 64)
    assert torch.equal(quantize_rows(-weight)[0], -quantize_rows(weight)[0])


@pytest.mark.parametrize("row", [
    [0.0, 0.0], [1e-45, 0.0], [1e-38, -1e-39], [3.4e38, -1.0], [1e-30, 1e-33]])
def test_extreme_rows_stay_finite(row):
    weight = torch.tensor([row, [1.0, 2.0]])
    q, scale = quantize_rows(weight)
    assert (scale > 0).all() and scale.isfinite().all()
    assert ((q * scale - weight).abs() <= 0.51 * scale).all()


def test_a_scale_that_cannot_be_small_enough_does_not_wrap_around():
    """185 of the smallest numbers there are: their scale is one of them, not 1.46."""
    weight = torch.tensor([[185.0, -185.0, 100.0]]) * 2.0**-149
    assert quantize_rows(weight)[0].tolist() == [[127, -127, 100]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_rounded_in_float32(dtype):
    weight = torch.randn(4, 50).to(dtype)
    q, scale = quantize_rows(weight)
    assert all(map(torch.equal, (q, scale), quantize_rows(weight.float())))


def test_decibels():
    x = torch.randn(1000)
    assert decibels(x, 0.9 * x) == pytest.approx(20, abs=1e-4)
    assert decibels(x, 1.01 * x) == pytest.approx(40, abs=1e-3)
    assert decibels(x, x) == math.inf and decibels(x, -x) < 0
    assert decibels(torch.zeros(3), torch.zeros(3)) == math.inf, "nothing, and rightly so"
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4,\) differ"):
        decibels(torch.ones(3, 4), torch.ones(4))  # would be spread over three rows


@pytest.mark.parametrize("K", [16, 128, 768, 3072])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_gaussian_rows_have_the_noise_of_the_formula(K, bits):
    set_seed(K)
    weight = torch.randn(400_000 // K, K)
    q, scale = quantize_rows(weight, bits)
    level = decibels(weight, q * scale)
    assert level == pytest.approx(trials.expected(K, bits), abs=0.1)
    assert (level >= 40) == (bits == 8), "six bits must fail the row R8"


# groups and bytes -----------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", [2, 8, 32, 1000])
def test_groups_find_the_nearest_value_there_is(shape, group):
    set_seed(group)
    weight = torch.randn(shape)
    q, scale = quantize_groups(weight, group)
    assert q.shape == shape and scale.shape == (shape[0], -(-shape[1] // group))
    assert q.abs().max() == 7
    for column in range(0, shape[1], 13):  # by brute force, over all fifteen
        part = weight[:, column - column % group:][:, : group]
        step = part.abs().amax(1) / 7
        assert torch.allclose(scale[:, column // group], step, rtol=1e-6)
        values = torch.arange(-7, 8) * step[:, None]
        least = (values - weight[:, [column]]).abs().amin(1)
        got = (dequantize_groups(q, scale, group) - weight)[:, column].abs()
        torch.testing.assert_close(got, least, atol=1e-6, rtol=1e-5)


def test_a_group_as_wide_as_the_row_is_a_row():
    weight = torch.randn(6, 40)
    for group in (40, 64):
        assert all(map(torch.equal, quantize_groups(weight, group, 8), quantize_rows(weight)))


@pytest.mark.parametrize("K", [1, 2, 3, 8, 33])
def test_packing_is_lossless(K):
    q = torch.randint(-8, 8, (70, K), dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (70, -(-K // 2))
    assert torch.equal(unpack_int4(packed, K), q)
    high = (packed >> 4 if K > 1 else packed).to(torch.int8)
    assert K == 1 or not torch.equal(high[:, 0], q[:, 1]), "without the sign bit"


def test_all_bytes_unpack_to_what_they_hold():
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    q = unpack_int4(packed, 2)
    assert torch.equal(pack_int4(q), packed)
    signed = lambda n: n - 16 if n > 7 else n
    assert q.tolist() == [[signed(n & 15), signed(n >> 4)] for n in range(256)]


@pytest.mark.parametrize("q", [[8, 0], [-9, 1], [127, -127]], ids=str)
def test_what_needs_more_than_four_bits_is_not_packed(q):
    with pytest.raises(ValueError, match=f"from {min(q)} to {max(q)} need more than 4"):
        pack_int4(torch.tensor([q], dtype=torch.int8))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_table_has_no_row_before_the_first(wrong):
    table = torch.nn.Embedding(5, 3)
    rounded = Int8Embedding(*quantize_rows(table.weight))
    for either in (table, rounded):
        with pytest.raises(IndexError):
            either(torch.tensor([0, wrong]))


def test_llama_cpp_rounds_alike():
    """Q8_0: groups of 32 in eight bits, with scales of 16 bits. Q4_0 has 16 values."""
    gguf = pytest.importorskip("gguf", reason="the oracle gguf is not installed")
    set_seed(0)
    weight = torch.randn(64, 256)
    kinds = gguf.GGMLQuantizationType
    there = {kind: torch.from_numpy(gguf.quants.dequantize(
        gguf.quants.quantize(weight.numpy(), kind), kind)) for kind in (kinds.Q8_0, kinds.Q4_0)}
    q, scale = quantize_groups(weight, 32, 8)
    half = scale.half().float()  # their integers times our scales, at their precision
    ours = dequantize_groups(q, half, 32)
    torch.testing.assert_close(there[kinds.Q8_0], ours, atol=1e-6, rtol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(there[kinds.Q8_0], dequantize_groups(q, scale, 32),
                                   atol=1e-6, rtol=1e-6)
    four = decibels(weight, dequantize_groups(*quantize_groups(weight), 32))
    assert 0 < decibels(weight, there[kinds.Q4_0]) - four < 20 * math.log10(8 / 7)


# integers and tokens --------------------------------------------------------------

@pytest.mark.parametrize("kernel", [True, False], ids=["_int_mm", "blocks"])
@pytest.mark.parametrize("K", [1, 7, 64, 1024, 1025, 4100])
def test_integer_sums_are_exact(K, kernel, monkeypatch):
    if kernel and not module.int_mm_is_exact():
        pytest.skip("this processor has no exact torch._int_mm")
    monkeypatch.setattr(module, "int_mm_is_exact", lambda: kernel)
    set_seed(K)
    b = torch.randint(-127, 128, (33, K), dtype=torch.int8)
    b[0], b[1] = 127, -127
    for shape in ((K,), (1, K), (5, K), (2, 3, K)):
        a = torch.randint(-127, 128, shape, dtype=torch.int8)
        a.view(-1, K)[0] = 127
        exact = a.long() @ b.long().T
        got = integer_product(a, b)
        assert got.dtype == torch.int32 and torch.equal(got.long(), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(integer_product(a, b).long(), exact)
    rounded = (a.bfloat16() @ b.bfloat16().T).long()
    assert K < 64 or not torch.equal(rounded, exact), "sums in bf16 must fail"


def test_a_kernel_that_saturates_is_found_out(monkeypatch):
    narrow = lambda a, b: (a.long() @ b.long()).clamp(-(2**15), 2**15 - 1)
    for broken in (narrow, None):
        module.probe_int_mm.cache_clear()
        if broken is None:
            monkeypatch.delattr(torch, "_int_mm")
        else:
            monkeypatch.setattr(torch, "_int_mm", broken)
        assert not module.int_mm_is_exact()
        monkeypatch.undo()
    module.probe_int_mm.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(8, 5), (33, 100), (768, 96)], ids=str)
def test_a_token_alone_gives_the_same_bits_as_in_company(dtype, sizes):
    set_seed(0)
    linear = nn.Linear(*sizes)
    ours = Int8Linear(*quantize_rows(linear.weight), linear.bias, dynamic=True).to(dtype)
    x = (torch.randn(2, 9, sizes[0]) * 10 ** torch.randn(2, 9, 1)).to(dtype)
    x[0, 4] *= 1e3
    with torch.no_grad():
        together = ours(x)
        for b in range(2):
            assert torch.equal(ours(x[b]), together[b])
            for t in range(9):
                assert torch.equal(ours(x[b, t]), together[b, t])
                assert torch.equal(ours(x[b : b + 1, t : t + 1])[0, 0], together[b, t])
    assert together.dtype == dtype and not trials.alone_as_in_company(trials.one_scale, x.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_token_and_is_seen(bad):
    set_seed(0)
    linear = nn.Linear(64, 8)
    ours = Int8Linear(*quantize_rows(linear.weight), linear.bias, dynamic=True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        clean = ours(x)
        x[1, 5] = bad
        got = ours(x)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert not got[1].isfinite().any(), "a NaN must not be rounded away"


# modules --------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (33, 7), (100, 64)], ids=str)
def test_modules_equal_the_linear_of_their_weights(bias, sizes):
    set_seed(0)
    linear, x = nn.Linear(*sizes, bias=bias), torch.randn(2, 5, sizes[0])
    q, scale = quantize_rows(linear.weight)
    four, groups = quantize_groups(linear.weight, 8)
    packed = Int4Linear(pack_int4(four), groups, linear.bias, sizes[0], 8)
    for ours in (Int8Linear(q, scale, linear.bias), packed):
        assert ours.in_features, ours.out_features == sizes
        expected = F.linear(x, ours.dequantize(), linear.bias)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x[0, 0]), expected[0, 0], atol=1e-5, rtol=1e-5)
        low = deepcopy(ours).bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16
        assert decibels(expected, low.float()) > 35 or sizes == (1, 1)
        assert f"bias={bias}" in repr(ours)
    table = Int8Embedding(q, scale)
    ids = torch.randint(sizes[1], (3, 4))
    assert torch.equal(table(ids), F.embedding(ids, q * scale))
    assert table(ids[0, 0]).shape == (sizes[0],)


def test_gradients_pass_weights_and_are_refused_by_activations():
    set_seed(0)
    linear = nn.Linear(40, 8)
    weights = Int8Linear(*quantize_rows(linear.weight), linear.bias)
    x = torch.randn(3, 40, requires_grad=True)
    weights(x).square().sum().backward()
    got, x.grad = x.grad, None
    F.linear(x, weights.dequantize(), linear.bias).square().sum().backward()
    torch.testing.assert_close(got, x.grad)
    dynamic = Int8Linear(weights.weight_q, weights.scale, linear.bias, dynamic=True)
    with pytest.raises(RuntimeError, match="no gradient passes int8 activations"):
        dynamic.train()(x)
    with torch.no_grad():
        dynamic(x)
    assert dynamic.eval()(x).shape == (3, 8)


def test_compiled_modules_give_the_same():
    set_seed(0)
    linear, x = nn.Linear(64, 8), torch.randn(5, 64)
    ours = Int8Linear(*quantize_rows(linear.weight), linear.bias, dynamic=True).eval()
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), ours(x))


# whole models ---------------------------------------------------------------------

@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_models_of_every_recipe(name, scheme, tmp_path):
    model, ids = make(name), tokens()
    float_logits, linears = model(ids), dict(model.named_modules())
    names = quantize(ours := deepcopy(model), scheme)
    held = dict(ours.named_modules())
    left = {n for n, m in held.items() if isinstance(m, (nn.Linear, nn.Embedding))}
    assert all(n.endswith("router") for n in left) and bool(left) == (name == "mixtral")
    assert {*names} == {n for n, m in linears.items() if isinstance(
        m, (nn.Linear, nn.Embedding))} - left
    logits = ours(ids)
    assert decibels(float_logits, logits) > (25 if scheme == "int8" else 12 if "dyn" in scheme else 3)
    if scheme != "int8_dynamic":  # weight only: a float model with these very weights
        twin = deepcopy(model)
        for n in names:
            twin.get_submodule(n).weight = nn.Parameter(held[n].dequantize())
        torch.testing.assert_close(logits, twin(ids), atol=1e-5 * logits.abs().max(), rtol=0)
    kinds = {n: type(m) for n, m in held.items() if n in names}
    if scheme == "int4":
        assert kinds["head"] is Int8Linear and kinds["tok_emb"] is Int8Embedding
        assert kinds["blocks.0.attn.W_query"] is Int4Linear
    file = save_model(tmp_path / "model.safetensors", ours)
    loaded = load_model(file).model
    assert loaded.transforms == ours.transforms and torch.equal(loaded(ids), logits)
    assert same_bits(bits_of(loaded), bits_of(ours))
    shared = loaded.head.weight_q is loaded.tok_emb.weight_q
    assert shared == model.config.tied
    with pytest.raises(ValueError, match="tok_emb is an Int8Embedding already"):
        quantize(loaded, scheme)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_cached_equals_full(name, scheme):
    model, ids = make(name), tokens(T=30)
    floats = model(ids)
    quantize(model, scheme)
    full = model(ids)
    for chunks in ([12] + [1] * 18, [5, 9, 2, 14]):
        cache = KVCache(model, max_length=30)
        got = torch.cat([model(part, cache=cache) for part in ids.split(chunks, 1)], 1)
        assert torch.equal(got.argmax(-1), full.argmax(-1))
        if scheme == "int8_dynamic":  # an edge between two integers may be crossed
            assert decibels(full, got) > decibels(floats, full)
        else:
            torch.testing.assert_close(got, full, atol=1e-5 * full.abs().max(), rtol=0)


@torch.no_grad()
def test_batches_change_nothing():
    for scheme in SCHEMES:
        quantize(model := make(), scheme)
        ids = tokens(B=5)
        together = model(ids)
        for row in range(5):
            alone = model(ids[row : row + 1])
            limit = 1e-5 if scheme != "int8_dynamic" else 0.02
            assert (alone - together[row]).abs().max() < limit * together.abs().max()


@torch.no_grad()
def test_a_tied_pair_stays_one():
    quantize(model := make(), "int8")
    assert model.head.weight_q is model.tok_emb.weight_q
    assert "head.weight" not in model.state_dict()
    for changed in (deepcopy(model), deepcopy(model).to(torch.bfloat16),
                    deepcopy(model).double().float(), deepcopy(model).to("cpu")):
        assert changed.head.weight_q is changed.tok_emb.weight_q
        assert changed.head.scale is changed.tok_emb.scale
        assert changed.head.weight_q.dtype == torch.int8
        assert torch.equal(changed.head.weight_q, model.head.weight_q)
    empty = deepcopy(model).to("meta").to_empty(device="cpu")
    assert empty.head.weight_q.shape == model.head.weight_q.shape
    quantize(untied := make("gpt2, untied, no biases"), "int8")
    assert untied.head.weight_q is not untied.tok_emb.weight_q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype, tmp_path):
    """Rounded in half precision, moved to it, loaded in it: types agree everywhere."""
    model, ids = make(), tokens()
    floats = model(ids)
    for scheme in SCHEMES:
        quantize(ours := deepcopy(model), scheme)
        expected = ours(ids)
        file = save_model(tmp_path / f"{scheme}.safetensors", ours)
        quantize(low := deepcopy(model).to(dtype), scheme)
        for changed in (low, deepcopy(ours).to(dtype), load_model(file, dtype=dtype).model):
            got = changed(ids)
            assert got.dtype == dtype and changed.head.weight_q.dtype == torch.int8
            assert decibels(expected, got.float()) > 20
    assert decibels(floats, got.float()) > 3


@torch.no_grad()
def test_loud_inputs_do_not_overflow_in_float16():
    """600 times a row of 127s is beyond the largest float16; the output is not."""
    weight, x = torch.full((2, 8), 0.01), torch.full((1, 8), 600.0)
    linear = Int8Linear(*quantize_rows(weight), nn.Parameter(torch.ones(2))).half()
    assert (x.half() @ linear.weight_q.half().T).isinf().all(), "the control"
    torch.testing.assert_close(linear(x.half()).float(), x @ weight.T + 1, atol=0.05, rtol=0)


@torch.no_grad()
def test_autocast():
    for scheme in SCHEMES:
        quantize(model := make(), scheme)
        full = model(tokens())
        with torch.autocast("cpu", torch.bfloat16):
            assert decibels(full, model(tokens()).float()) > 20


def test_keep():
    for keep in (("head",), ("tok_emb",), ("head", "tok_emb")):  # one of a pair: both
        names = quantize(model := make(), "int8", keep=keep)
        assert not {"head", "tok_emb"} & {*names}
        assert model.head.weight is model.tok_emb.weight
        assert model.transforms == [["quantize", {"scheme": "int8", "keep": [*keep]}]]
    names = quantize(make("gpt2, untied, no biases"), "int8", keep=("head",))
    assert "tok_emb" in names and "head" not in names
    names = quantize(make(), "int4", keep=("blocks.1.mlp.fc_in", "W_query"), group=16)
    assert "blocks.0.mlp.fc_in" in names and "blocks.1.mlp.fc_in" not in names
    assert not any(name.endswith("W_query") for name in names)


@torch.no_grad()
def test_kept_parts_survive_the_file(tmp_path):
    quantize(model := make(), "int4", keep=("head", "blocks.1.mlp.fc_in"), group=10)
    file = save_model(tmp_path / "kept.safetensors", model)
    loaded = load_model(file).model
    assert isinstance(loaded.blocks[1].mlp.fc_in, nn.Linear)
    assert isinstance(loaded.blocks[0].mlp.fc_in, Int4Linear)
    assert torch.equal(loaded(tokens()), model(tokens()))
    again = load_model(save_model(tmp_path / "again.safetensors", loaded)).model
    assert torch.equal(again(tokens()), model(tokens()))


@torch.no_grad()
def test_wrappers_are_looked_into():
    """A wrapper keeps its linear as `.base`, under the linear's own name."""
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    replace_modules(model := make(), lambda n, m: n.endswith("W_query"), lambda n, m: Wrapper(m))
    names = quantize(model, "int8", keep=("W_key",))
    assert "blocks.0.attn.W_query.base" in names
    assert isinstance(model.blocks[0].attn.W_query.base, Int8Linear)
    with pytest.raises(ValueError, match="W_query.* is an Int8Linear already|already"):
        quantize(model)


@torch.no_grad()
def test_masked_weights_are_rounded_as_they_read(tmp_path):
    """A mask computes its weight anew each time: no identity to be confused by."""
    prune(model := make(), 0.5)
    zeros = {n: m.weight == 0 for n, m in model.blocks.named_modules()
             if isinstance(m, nn.Linear)}
    floats = model(tokens())
    names = quantize(model, "int8")
    assert len(names) == 3 + 2 * 6 and decibels(floats, model(tokens())) > 25
    for name, zero in zeros.items():
        assert (model.blocks.get_submodule(name).weight_q[zero] == 0).all()
    file = save_model(tmp_path / "pruned.safetensors", model)
    assert torch.equal(load_model(file).model(tokens()), model(tokens()))
    assert model.transforms == [["quantize", dict(scheme="int8", keep=[])]], "no mask left"


@torch.no_grad()
def test_masks_of_linears_that_stay_in_floats_stay(tmp_path):
    prune(model := make(), 0.5)
    quantize(model, "int4", keep=("fc_in",))
    masked = [f"blocks.{i}.mlp.fc_in" for i in range(2)]
    assert model.transforms[0] == ["prune", {"modules": masked}]
    file = save_model(tmp_path / "half.safetensors", model)
    loaded = load_model(file).model
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert loaded.transforms == model.transforms
    assert finalize(loaded) == masked and [t[0] for t in loaded.transforms] == ["quantize"]


def test_other_parameters_still_train():
    quantize(model := make().train(), "int8")
    before = bits_of(model)
    loss = LossModel(model)(tokens(), tokens(seed=2))
    loss.backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad and all(n.endswith(("bias", "weight")) for n in with_grad)
    torch.optim.SGD(model.parameters(), 0.1).step()
    after = bits_of(model)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(before[n], after[n]) for n in before if n.endswith("weight_q"))


# the model that travels with the book ---------------------------------------------

@torch.no_grad()
def test_files_are_smaller_by_what_was_promised(tmp_path):
    model, tokenizer = load_demo()
    sizes = {}
    for scheme in ("float32", *SCHEMES):
        ours = deepcopy(model)
        if scheme != "float32":
            quantize(ours, scheme)
        file = save_model(tmp_path / f"{scheme}.safetensors", ours, tokenizer)
        sizes[scheme] = file.stat().st_size
        loaded = load_model(file)
        assert loaded.tokenizer.n_vocab == tokenizer.n_vocab
    assert sizes["int8"] <= 0.27 * sizes["float32"]
    assert sizes["int8_dynamic"] <= 0.27 * sizes["float32"]
    assert sizes["int4"] <= 0.19 * sizes["float32"]
    quantize(ours := deepcopy(model), "int8", keep=("head",))
    kept = save_model(tmp_path / "kept.safetensors", ours, tokenizer)
    assert kept.stat().st_size > 0.27 * sizes["float32"], "the table is what counts here"


def test_gpt2_would_be_a_quarter():
    with torch.device("meta"):
        floats, model = GPTModel(GPTConfig()), GPTModel(GPTConfig())
    module.quantized_shapes(model, scheme="int8")
    size = lambda m: sum(t.nbytes for t in {id(t): t for t in m.state_dict(
        keep_vars=True).values()}.values())
    assert size(floats) == 4 * 124_439_808
    assert size(model) <= 0.255 * size(floats)


# oracles --------------------------------------------------------------------------

def has_torchao():
    return importlib.util.find_spec("torchao") is not None


@pytest.mark.skipif(not has_torchao(), reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [(64, 32), (100, 7), (768, 768)], ids=str)
@torch.no_grad()
def test_torchao(sizes):
    """Its integers, from its own grid; its outputs, from its integers."""
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_)
    finally:
        logging.disable(logging.NOTSET)
    set_seed(0)
    linear, x = nn.Linear(*sizes), torch.randn(50, sizes[0])
    quantize_(theirs := nn.Sequential(deepcopy(linear)), Int8WeightOnlyConfig())
    q, scale = theirs[0].weight.qdata, theirs[0].weight.scale
    ours = Int8Linear(q, scale, linear.bias)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    mine = Int8Linear(*quantize_rows(linear.weight), linear.bias)
    assert abs(decibels(linear(x), mine(x)) - decibels(linear(x), theirs(x))) < 1
    assert (mine.weight_q.int() - q.int()).abs().max() <= 1
    with pytest.raises(AssertionError):  # the control: another grid, other outputs
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=1e-5)
    quantize_(theirs := nn.Sequential(deepcopy(linear)),
              Int8DynamicActivationInt8WeightConfig())
    dynamic = Int8Linear(mine.weight_q, mine.scale, linear.bias, dynamic=True)
    assert decibels(linear(x), dynamic(x)) > decibels(linear(x), theirs(x)) - 1
    assert decibels(theirs(x), dynamic(x)) > 36


@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"),
                    reason="this PyTorch has no quantize_dynamic")
@torch.no_grad()
def test_torch_ao_has_one_scale_a_call():
    set_seed(0)
    linear, quiet = nn.Linear(256, 64), torch.randn(8, 256)
    company = torch.cat((quiet, 50 * torch.randn(1, 256)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        theirs = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(deepcopy(linear)), config)
    ours = Int8Linear(*quantize_rows(linear.weight), linear.bias, dynamic=True)
    assert decibels(theirs(quiet), ours(quiet)) > 30
    assert decibels(theirs(quiet), theirs(company)[:8]) < 15
    assert torch.equal(ours(quiet), ours(company)[:8])


# what bad input gets --------------------------------------------------------------

@pytest.mark.parametrize("arguments, said", [
    (dict(scheme="int3"), "unknown scheme 'int3'; known: int8, int8_dynamic, int4"),
    (dict(scheme=None), "unknown scheme None; known: int8, int8_dynamic, int4"),
    (dict(keep=("haed",)), "keep='haed' is not in the model; it has W_key, W_query"),
    (dict(keep="head"), "keep='head' must be a tuple of names"),
    (dict(keep=(1,)), "keep=1 is not in the model"),
    (dict(scheme="int4", group=0), "group=0 must be a whole number >= 2"),
    (dict(scheme="int4", group=2.0), "group=2.0 must be a whole number >= 2"),
    (dict(scheme="int4", group=True), "group=True must be a whole number >= 2"),
])
def test_wrong_arguments_name_the_values_and_change_nothing(arguments, said):
    model = make()
    before = bits_of(model)
    with pytest.raises(ValueError) as error:
        quantize(model, **arguments)
    assert said in str(error.value)
    assert same_bits(bits_of(model), before) and model.transforms == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_weights_that_are_not_finite(bad, scheme):
    model = make()
    model.blocks[1].mlp.fc_out.weight[2, 3] = bad
    before, modules = bits_of(model), [*model.modules()]
    with pytest.raises(ValueError, match="blocks.1.mlp.fc_out: 1 of 6400 weights are NaN"):
        quantize(model, scheme)
    assert [*model.modules()] == modules and model.transforms == []
    assert all(torch.equal(before[n].nan_to_num(9, 9), t.nan_to_num(9, 9))
               for n, t in model.state_dict().items())
    model.blocks[1].mlp.fc_out.weight[2, 3] = 0
    assert quantize(model, scheme), "and once it is mended, it goes"


def test_bits_and_groups():
    weight = torch.randn(2, 8)
    for bits in (1, 9, 0, -4, 8.0, True, None):
        for call in (lambda: quantize_rows(weight, bits), lambda: quantize_groups(weight, 4, bits)):
            with pytest.raises(ValueError, match=f"bits={bits!r} must be"):
                call()
    for group in (1, 0, -3, 4.0, None):
        with pytest.raises(ValueError, match="must be a whole number >= 2"):
            quantize_groups(weight, group)
    with pytest.raises(ValueError, match="2 of 16 weights are NaN or infinite"):
        quantize_rows(torch.where(weight == weight.flatten()[:2].view(1, 2).repeat(1, 4)
                                  , math.nan, weight))


@pytest.mark.parametrize("call", [
    lambda: quantize_rows(torch.empty(3, 0)), lambda: quantize_rows(torch.tensor(1.0)),
    lambda: quantize_tokens(torch.empty(2, 0)), lambda: quantize_groups(torch.ones(8))])
def test_nothing_to_round_is_said(call):
    with pytest.raises(ValueError, match="no rows to round|are no matrix"):
        call()


@pytest.mark.parametrize("options", [
    {"scheme": "int3", "keep": []}, {"scheme": "int8", "keep": ["nothing"]},
    {"scheme": "int8", "keep": 3}, {"scheme": "int8", "keep": [[]]}, {"keep": []},
    {"scheme": ["int8"], "keep": []}, {"scheme": "int8", "keep": [], "extra": 1},
    {"scheme": "int4", "keep": [], "group": 0}, {"scheme": "int4", "keep": []},
])
def test_hostile_options_in_a_file(options, tmp_path):
    quantize(model := make(), "int8" if "group" in options else "int4")
    good = save_model(tmp_path / "good.safetensors", model)
    assert load_model(good)
    model.transforms = [["quantize", options]]
    try:
        bad = save_model(tmp_path / "bad.safetensors", model)
    except CheckpointError:
        return
    if options == {"scheme": "int4", "keep": []}:  # the default group, as it was made
        assert load_model(bad)
        return
    with pytest.raises(CheckpointError):
        load_model(bad)


def test_the_wrong_scheme_does_not_load(tmp_path):
    quantize(model := make(), "int8")
    model.transforms = [["quantize", {"scheme": "int4", "keep": [], "group": 32}]]
    file = save_model(tmp_path / "wrong.safetensors", model)
    with pytest.raises(CheckpointError, match="lacks|unknown"):
        load_model(file)


# row R8, small counts -------------------------------------------------------------

@pytest.fixture(scope="module")
def r8():
    return trials.report(quick=True)


def test_row_r8(r8):
    green = trials.verdicts(r8)
    assert all(green.values()), (green, r8)


def test_the_controls_of_r8_turn_it_red(r8):
    assert r8["controls"] and all(r8["controls"].values()), r8["controls"]


@pytest.mark.parametrize("part, figure, value", [
    ("weights", "lowest", 39.9), ("weights", "from_the_formula", 0.5),
    ("w8a8", "lowest", 35.9), ("tokens", "equal", 12), ("sums", "exact", 11),
    ("qat", "equal", 2), ("smollm2", "change", 0.006)])
def test_a_figure_below_its_mark_is_red(r8, part, figure, value):
    changed = {**r8, part: {**r8[part], figure: value}}
    assert [name for name, good in trials.verdicts(changed).items() if not good] == [part]


def test_a_model_prepared_for_training_is_converted_and_not_quantized():
    from gptbook.qat import prepare_qat

    model = GPTModel(GPTConfig(32, 16, 32, 1, 2))
    prepare_qat(model)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="convert"):
        quantize(model)
    assert list(model.state_dict()) == before
