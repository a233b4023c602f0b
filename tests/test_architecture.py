"""The parts of Llama: against transformers, closed forms and each other, over shapes and dtypes."""

import copy
import importlib.util
import math
import pickle
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as hf

from gptbook.architecture import (
    NoPositions, RMSNorm, Rotary, SwiGLU, gated_width, half_to_interleaved, interleaved_to_half,
    rope_frequencies,
)
from gptbook.core import (
    FeedForward, GPTConfig, GPTModel, MultiHeadAttention, Positions, init_weights,
    naive_attention, sdpa, set_seed,
)
from gptbook.inference import KVCache

V = 61
ROTARY = partial(MultiHeadAttention, rotary=Rotary)
LLAMA = dict(attention=ROTARY, mlp=SwiGLU, norm=RMSNorm, position_embedding=NoPositions)


def config_of(head_dim, heads=2, **more):
    return GPTConfig(V, 64, head_dim * heads, n_layers=2, n_heads=heads, **more)


def llama_model(seed=0, n_kv_heads=2, **slots):
    set_seed(seed)
    sizes = GPTConfig(V, 64, 64, n_layers=2, n_heads=4, n_kv_heads=n_kv_heads, bias=False,
                      tied=False)
    model = GPTModel(sizes, **{**LLAMA, **slots})
    init_weights(model, 0.1)
    return model.eval()


def some_ids(rows=2, n=14, seed=0):
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(seed))


# Rotation -------------------------------------------------------------------------------------

@pytest.mark.parametrize("head_dim", [2, 6, 16, 64, 128])
@pytest.mark.parametrize("base", [100.0, 10_000.0, 500_000.0, 1e6])
def test_frequencies_are_the_closed_form(head_dim, base):
    exact = torch.tensor([base ** (-2 * i / head_dim) for i in range(head_dim // 2)],
                         dtype=torch.float64)
    found = rope_frequencies(head_dim, base)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    # the power of a float32 is exact to a few units in the last place of its logarithm
    assert_close(found.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("head_dim, base", [(7, 1e4), (1, 1e4), (8, 0), (8, -1.0), (8, math.nan)])
def test_impossible_frequencies_are_refused(head_dim, base):
    with pytest.raises(ValueError, match="odd|positive"):
        rope_frequencies(head_dim, base)


def test_a_head_of_odd_width_is_refused_when_the_model_is_made():
    with pytest.raises(ValueError, match="head_dim=5 is odd"):
        GPTModel(config_of(5), attention=ROTARY)


@pytest.mark.parametrize("batch, heads, n, head_dim", [(1, 1, 1, 2), (2, 3, 7, 16), (1, 4, 33, 64),
                                                       (3, 2, 5, 6)])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("each_row", [False, True])
def test_rotation_equals_transformers(batch, heads, n, head_dim, base, each_row):
    torch.manual_seed(n)
    q, k = torch.randn(2, batch, heads, n, head_dim)
    index = torch.randint(0, 500, (batch if each_row else 1, n))
    theirs = hf.LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads,
        rope_parameters=dict(rope_type="default", rope_theta=base)))
    cos, sin = theirs(q, index)
    expected = hf.apply_rotary_pos_emb(q, k, cos, sin)
    rotary = Rotary(config_of(head_dim, heads), base)
    found = tuple(rotary(y, Positions(index)) for y in (q, k))
    assert_close(found, expected, atol=3e-6, rtol=0)
    if n > 1:  # the negative control: another base, the other layout
        for wrong in (Rotary(config_of(head_dim, heads), base * 3),
                      Rotary(config_of(head_dim, heads), base, interleaved=True)):
            if head_dim > 2:
                assert (wrong(q, Positions(index)) - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_of_halves_equals_transformers(dtype):
    torch.manual_seed(0)
    q, index = torch.randn(2, 3, 40, 16).to(dtype), torch.arange(40)[None] + 3000
    cos, sin = hf.LlamaRotaryEmbedding(LlamaConfig(hidden_size=48, num_attention_heads=3))(q, index)
    expected, _ = hf.apply_rotary_pos_emb(q, q, cos, sin)
    found = Rotary(config_of(16, 3)).to(dtype)(q, Positions(index))
    assert found.dtype == dtype
    assert_close(found, expected, atol=0.04 if dtype == torch.bfloat16 else 0.005, rtol=0)


@pytest.mark.parametrize("head_dim", [2, 8, 32])
def test_interleaved_rotation_is_a_complex_product(head_dim):
    x, index = torch.randn(2, 3, 9, head_dim), torch.arange(9)[None] * 7
    angle = index[..., None].double() * rope_frequencies(head_dim).double()
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    found = Rotary(config_of(head_dim), interleaved=True)(x, Positions(index))
    assert_close(found.double(), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shift", [1, 13, 500])
def test_scores_depend_on_distances_and_lengths_stay(interleaved, shift):
    torch.manual_seed(shift)
    q, k = torch.randn(2, 1, 2, 12, 32)
    rotary, index = Rotary(config_of(32), interleaved=interleaved), torch.arange(12)[None]

    def scores(start):
        where = Positions(index + start)
        return rotary(q, where) @ rotary(k, where).mT

    assert_close(scores(shift), scores(0), atol=2e-3, rtol=0)  # angles near 512: 3e-5
    moved = rotary(q, Positions(index + shift)) @ rotary(k, Positions(index)).mT
    assert (moved - scores(0)).abs().max() > 0.1  # only one of them moved
    assert_close(rotary(q, Positions(index)).norm(dim=-1), q.norm(dim=-1))


def test_the_gradient_is_the_rotation_back():
    rotary, where = Rotary(config_of(8)), Positions(torch.arange(5)[None])
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    y = torch.randn(1, 2, 5, 8)
    (found,) = torch.autograd.grad(rotary(x, where), x, y)
    back = rotary(y, Positions(-where.index))
    assert_close(found, back, atol=1e-6, rtol=0)
    assert (found - rotary(y, where)).abs().max() > 0.1


def test_scaling_changes_frequencies_and_size():
    def scaling(f):
        return f / 4, 1.5

    slow, plain = Rotary(config_of(16), scaling=scaling), Rotary(config_of(16))
    x, index = torch.randn(1, 2, 6, 16), torch.arange(6)[None]
    expected = 1.5 * plain(x, Positions(index / 4))
    assert_close(slow(x, Positions(index)), expected, atol=1e-5, rtol=0)
    assert (slow(x, Positions(index)) - plain(x, Positions(index))).abs().max() > 0.1


# The two layouts ------------------------------------------------------------------------------

@pytest.mark.parametrize("head_dim", [2, 4, 6, 64])
@pytest.mark.parametrize("heads", [1, 3])
def test_layouts_convert_both_ways(head_dim, heads):
    for weight in (torch.randn(heads * head_dim, 5), torch.randn(heads * head_dim)):
        half = interleaved_to_half(weight, head_dim)
        assert torch.equal(half_to_interleaved(half, head_dim), weight)
        assert half.shape == weight.shape
        by_hand = torch.cat([torch.cat([w[0::2], w[1::2]]) for w in weight.split(head_dim)])
        assert torch.equal(half, by_hand)
        if head_dim > 4:  # of four, swapping the middle two is its own inverse
            assert not torch.equal(half_to_interleaved(weight, head_dim), half)


@pytest.mark.parametrize("convert", [interleaved_to_half, half_to_interleaved])
@pytest.mark.parametrize("rows, head_dim", [(20, 5), (10, 4), (6, 12)])
def test_rows_that_are_no_whole_heads_of_pairs_are_refused(convert, rows, head_dim):
    with pytest.raises(RuntimeError, match="multiply up to the size of dim"):
        convert(torch.randn(rows, 3), head_dim)


@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_converted_weights_give_the_other_models_logits(n_kv_heads):
    turned = partial(MultiHeadAttention, rotary=partial(Rotary, interleaved=True))
    theirs, ours = llama_model(0, n_kv_heads, attention=turned), llama_model(1, n_kv_heads)
    state = theirs.state_dict()
    ids, wanted = some_ids(), theirs(some_ids())
    ours.load_state_dict(state)
    assert (ours(ids) - wanted).abs().max() > 0.01  # not sorted: shapes fit, values do not
    names = [n for n in state if n.endswith(("W_query.weight", "W_key.weight"))]
    ours.load_state_dict(state | {n: interleaved_to_half(state[n], 16) for n in names})
    assert_close(ours(ids), wanted, atol=2e-5, rtol=1e-4)


# What a Rotary survives -----------------------------------------------------------------------

@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_angles_stay_float32_and_exact(cast):
    rotary = getattr(llama_model(), cast)().blocks[0].attn.rotary
    assert torch.equal(rotary.frequencies, rope_frequencies(16))
    angles = rotary.angles(Positions(torch.tensor([[4000, 4007]])))
    assert angles.dtype == torch.float32 and angles.shape == (1, 1, 2, 8)
    assert_close((angles[..., 1, :] - angles[..., 0, :]).flatten(), 7 * rope_frequencies(16),
                 atol=5e-4, rtol=0)
    rough = torch.tensor([4000, 4007]).bfloat16()  # the negative control
    assert rough[0] == rough[1]


def test_nothing_of_it_is_in_the_state():
    model = llama_model()
    assert not [n for n in model.state_dict() if "rotary" in n]
    assert not [*model.blocks[0].attn.rotary.buffers()]


def test_copies_pickles_and_exports_compute_the_same():
    model, ids = llama_model(), some_ids()
    wanted = model(ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  torch.export.export(model, (ids,)).module()):
        assert_close(other(ids), wanted, atol=1e-6, rtol=0)


def test_a_model_made_on_meta_comes_to_life():
    real, ids = llama_model(), some_ids()
    with torch.device("meta"):
        made = llama_model()
        assert made(ids.to("meta")).is_meta
    gone = copy.deepcopy(real).to("meta")
    for model in (made, gone):
        assert model.blocks[0].attn.rotary.frequencies.device.type == "cpu"
        model.to_empty(device="cpu").load_state_dict(real.state_dict())
        assert torch.equal(model(ids), real(ids))


def test_it_follows_its_model_to_a_device():
    """No GPU here: the device that a move asks for is what `_apply` finds out."""
    rotary, asked = Rotary(config_of(8)), []

    def move(t):
        asked.append(t)
        return t.half()

    rotary._apply(move)
    assert asked and rotary.frequencies.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_compiles_as_one_graph(interleaved):
    attention = partial(MultiHeadAttention, rotary=partial(Rotary, interleaved=interleaved))
    model, ids = llama_model(attention=attention), some_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-5)


# RMSNorm --------------------------------------------------------------------------------------

def naive_norm(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1,), (3, 8), (2, 5, 96), (1, 1, 1, 768)])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.1])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_rms_norm_equals_torch_transformers_and_the_formula(shape, eps, size):
    torch.manual_seed(0)
    x, norm = size * torch.randn(shape), RMSNorm(shape[-1], eps)
    nn.init.normal_(norm.weight)
    for oracle in (nn.RMSNorm(shape[-1], eps=eps), hf.LlamaRMSNorm(shape[-1], eps)):
        oracle.load_state_dict(norm.state_dict())
        assert_close(norm(x), oracle(x))
    assert_close(norm(x).double(), naive_norm(x, norm.weight, eps), rtol=2e-5, atol=1e-6)
    if shape[-1] > 1:
        assert (F.layer_norm(x, shape[-1:], norm.weight, eps=eps) - norm(x)).abs().max() > 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("size", [1.0, 300.0, 3e4])
def test_rms_norm_squares_in_float32(dtype, tolerance, size):
    x = (size * torch.ones(4, 64) * torch.tensor([1.0, -1.0]).repeat(32)).to(dtype)
    out = RMSNorm(64).to(dtype)(x)
    assert out.dtype == dtype
    assert_close(out.double(), naive_norm(x, torch.ones(64), 1e-5), rtol=tolerance, atol=0)
    if dtype == torch.float16 and size > 256:  # the negative control: silence
        assert not (x / (x * x).mean(-1, keepdim=True).sqrt()).any()


def test_rms_norm_in_two_dtypes_keeps_that_of_the_input():
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    out = RMSNorm(16)(x)  # float32 weights
    assert out.dtype == torch.bfloat16
    assert_close(out, RMSNorm(16).bfloat16()(x))


def test_rms_norm_of_nothing_is_nothing_and_gradients_are_right():
    assert torch.equal(RMSNorm(8)(torch.zeros(2, 8)), torch.zeros(2, 8))
    norm = RMSNorm(6).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    norm(x).sum().backward()
    assert_close(norm.weight.grad, naive_norm(x, torch.ones(6), 1e-5).sum(0))


# SwiGLU ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim, hidden", [(8, None), (64, None), (64, 96), (48, 1)])
def test_swiglu_equals_transformers(bias, dim, hidden):
    config = GPTConfig(V, 8, dim, 1, 2, bias=bias)
    mlp, x = SwiGLU(config, 0, hidden), torch.randn(2, 5, dim)
    width = hidden or gated_width(dim)
    oracle = hf.LlamaMLP(LlamaConfig(hidden_size=dim, intermediate_size=width, mlp_bias=bias,
                                     num_attention_heads=2))
    for theirs, ours in (("gate_proj", "fc_gate"), ("up_proj", "fc_in"), ("down_proj", "fc_out")):
        getattr(oracle, theirs).load_state_dict(getattr(mlp, ours).state_dict())
    assert_close(mlp(x, None), oracle(x))
    if width > 1:  # the negative control: gate and input exchanged
        oracle.gate_proj, oracle.up_proj = oracle.up_proj, oracle.gate_proj
        assert (mlp(x, None) - oracle(x)).abs().max() > 1e-4


@pytest.mark.parametrize("dim", [8, 64, 96, 384, 768, 1000, 4096])
@pytest.mark.parametrize("multiple", [1, 8, 256])
def test_gated_width_is_the_next_multiple(dim, multiple):
    width = gated_width(dim, multiple)
    assert width % multiple == 0 and type(width) is int
    assert 0 <= width - 8 * dim / 3 < multiple


@pytest.mark.parametrize("dim", [192, 384, 768])
def test_it_has_the_weights_of_the_feed_forward(dim):
    config = GPTConfig(V, 8, dim, 1, 2, bias=False)
    count = [sum(p.numel() for p in m(config, 0).parameters()) for m in (FeedForward, SwiGLU)]
    assert count[0] == count[1]


@pytest.mark.parametrize("hidden", [0, -8])
def test_impossible_widths_are_refused(hidden):
    with pytest.raises(ValueError, match=f"hidden_dim={hidden}"):
        SwiGLU(config_of(8), 0, hidden)


def test_the_residual_branches_begin_small():
    set_seed(0)
    mlp = GPTModel(GPTConfig(V, 8, 128, 8, 2), **LLAMA).blocks[0].mlp
    assert mlp.fc_out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert mlp.fc_gate.weight.std().item() == pytest.approx(0.02, rel=0.05)


# Grouped keys ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel", [sdpa, naive_attention])
@pytest.mark.parametrize("heads, n_kv_heads", [(4, 1), (4, 2), (6, 3), (6, 2)])
def test_grouped_heads_are_heads_with_equal_keys(kernel, heads, n_kv_heads):
    set_seed(0)
    config = config_of(8, heads, n_kv_heads=n_kv_heads, bias=True)
    attn = ROTARY(config, 0, kernel=kernel)
    x, where = torch.randn(2, 7, 8 * heads), Positions(torch.arange(7)[None], True)

    def ungrouped(spread):
        full = ROTARY(replace(config, n_kv_heads=None), 0, kernel=kernel)
        names = ("W_key.weight", "W_key.bias", "W_value.weight", "W_value.bias")
        state = attn.state_dict()
        full.load_state_dict(state | {n: spread(state[n].unflatten(0, (-1, 8))).flatten(0, 1)
                                      for n in names})
        return full(x, where)

    group, out = heads // n_kv_heads, attn(x, where)
    assert_close(ungrouped(lambda w: w.repeat_interleave(group, 0)), out, atol=1e-5, rtol=1e-4)
    if n_kv_heads > 1:  # the negative control: copies in the other order
        wrong = ungrouped(lambda w: w.repeat(group, *[1] * (w.dim() - 1)))
        assert (wrong - out).abs().max() > 1e-2


# Whole layers and models ----------------------------------------------------------------------

NAMES = {"norm1": "input_layernorm", "attn.W_query": "self_attn.q_proj",
         "attn.W_key": "self_attn.k_proj", "attn.W_value": "self_attn.v_proj",
         "attn.out_proj": "self_attn.o_proj", "norm2": "post_attention_layernorm",
         "mlp.fc_gate": "mlp.gate_proj", "mlp.fc_in": "mlp.up_proj", "mlp.fc_out": "mlp.down_proj"}


@pytest.fixture(scope="module")
def oracle():
    """A random Llama of transformers and ours with its weights."""
    set_seed(0)
    theirs = hf.LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=gated_width(64), num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, initializer_range=0.1,
        tie_word_embeddings=False, attn_implementation="eager")).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1)
    ours = llama_model()
    ours.tok_emb.load_state_dict(theirs.model.embed_tokens.state_dict())
    ours.norm.load_state_dict(theirs.model.norm.state_dict())
    ours.head.load_state_dict(theirs.lm_head.state_dict())
    for block, layer in zip(ours.blocks, theirs.model.layers):
        for mine, other in NAMES.items():
            block.get_submodule(mine).load_state_dict(layer.get_submodule(other).state_dict())
    return theirs, ours


@pytest.mark.parametrize("rows, n", [(1, 1), (2, 9), (3, 50)])
def test_a_layer_equals_transformers(oracle, rows, n):
    theirs, ours = oracle
    x, index = torch.randn(rows, n, 64), torch.arange(n)[None]
    cos_sin = theirs.model.rotary_emb(x, index)
    future = torch.full((n, n), -math.inf).triu(1)[None, None]
    for block, layer in zip(ours.blocks, theirs.model.layers):
        expected = layer(x, attention_mask=future, position_embeddings=cos_sin)
        assert_close(block(x, Positions(index, True)), expected, atol=2e-5, rtol=1e-4)


def test_a_model_equals_transformers_in_logits_and_gradients(oracle):
    theirs, ours = oracle
    ids = some_ids(3, 30)
    expected = theirs(ids, use_cache=False).logits
    assert_close(ours(ids), expected, atol=5e-5, rtol=1e-4)
    for model, logits in ((theirs, expected), (ours, ours(ids))):
        model.zero_grad()
        logits.square().mean().backward()
    for mine, other in NAMES.items():
        found, wanted = (m.get_submodule(n).weight.grad for m, n in (
            (ours.blocks[0], mine), (theirs.model.layers[0], other)))
        assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_other_parts_do_not_equal_it(oracle):
    theirs, ours = oracle
    ids = some_ids()
    wanted = theirs(ids, use_cache=False).logits
    wrong = [dict(attention=partial(MultiHeadAttention, rotary=partial(Rotary, interleaved=True))),
             dict(attention=partial(MultiHeadAttention, rotary=partial(Rotary, base=500.0))),
             dict(attention=MultiHeadAttention), dict(norm=partial(RMSNorm, eps=0.5))]
    for slots in wrong:
        other = llama_model(**slots)
        other.load_state_dict(ours.state_dict())
        assert (other(ids) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[1] * 14, [14], [5, 1, 8], [1, 13]])
def test_cached_equals_full(n_kv_heads, chunks):
    model, ids = llama_model(n_kv_heads=n_kv_heads), some_ids()
    cache = KVCache(model)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in ids.split(chunks, 1)]
        assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-4)


def test_padded_rows_equal_rows_alone():
    model, ids = llama_model(), some_ids()
    where = torch.arange(14).repeat(2, 1)
    where[1] = torch.cat([torch.full((4,), -1), torch.arange(10)])  # padding on the left
    padded = ids.clone()
    padded[1, 4:], padded[1, :4] = ids[1, :10], 0
    with torch.no_grad():
        out = model(padded, positions=where)
        assert_close(out[0], model(ids[:1])[0], atol=1e-5, rtol=1e-4)
        assert_close(out[1, 4:], model(ids[1:, :10])[0], atol=1e-5, rtol=1e-4)


def test_a_cache_goes_on_where_each_row_stands():
    model, ids = llama_model(), some_ids()
    where = torch.stack([torch.arange(6), torch.cat([torch.full((2,), -1), torch.arange(4)])])
    first = ids[:, :6].clone()
    first[1, 2:] = ids[1, :4]
    cache = KVCache(model)
    with torch.no_grad():
        model(first, positions=where, cache=cache)
        step = model(torch.stack([ids[0, 6:7], ids[1, 4:5]]), cache=cache)
        assert_close(step[0, 0], model(ids[:1, :7])[0, -1], atol=1e-5, rtol=1e-4)
        assert_close(step[1, 0], model(ids[1:, :5])[0, -1], atol=1e-5, rtol=1e-4)


def test_it_never_sees_the_future():
    model, ids = llama_model(), some_ids()
    for t in (1, 6, 13):
        other = ids.clone()
        other[:, t:] = (ids[:, t:] + 1) % V
        assert torch.equal(model(other)[:, :t], model(ids)[:, :t])
        assert (model(other)[:, t] - model(ids)[:, t]).abs().max() > 1e-4


def test_where_a_text_begins_does_not_matter_and_turned_values_are_found():
    rotary = Rotary(llama_model().config)

    def turned_values(q, k, v, *, k_pos, **rest):
        return sdpa(q, k, rotary(v, k_pos), k_pos=k_pos, **rest)

    ids, where = some_ids(), torch.arange(14)
    found = []
    for kernel in (sdpa, turned_values):
        model = llama_model(attention=partial(ROTARY, kernel=kernel))
        found.append((model(ids, positions=where + 100) - model(ids)).abs().max().item())
    assert found[0] < 1e-3 < 0.05 < found[1]


def test_there_is_no_limit_of_positions():
    assert llama_model().max_positions is None
    assert llama_model()(some_ids(1, 200)).isfinite().all()
    with pytest.raises(ValueError, match="64 positions"):
        GPTModel(llama_model().config)(some_ids(1, 200))


def test_no_positions_changes_nothing():
    x = torch.randn(2, 3, 16)
    assert NoPositions(config_of(8))(x, None) is x
    assert not [*NoPositions(config_of(8)).parameters()]


# The experiment -------------------------------------------------------------------------------

def test_the_six_models_of_the_experiment_have_equally_many_weights():
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("_bench", folder / "architecture.py")
        bench = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bench)
    finally:
        sys.path.remove(str(folder))
    counts = {name: bench.count(bench.build(name, bench.fitting_width(name)))
              for name in bench.VARIANTS}
    assert len(counts) == 6 and max(counts.values()) < 1.01 * min(counts.values())
    unmatched = bench.count(bench.build("rotation", 4 * bench.WIDTH))
    assert unmatched < 0.99 * counts["GPT-2"]  # the negative control
