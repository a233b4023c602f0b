"""ALiBi and the scalings of RoPE against transformers, over shapes, kernels and caches."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from gptbook.architecture import NoPositions, Rotary, rope_frequencies
from gptbook.core import (Causal, GPTConfig, GPTModel, MultiHeadAttention, Positions,
                          naive_attention, sdpa, set_seed)
from gptbook.data import TokenDataset
from gptbook.inference import KVCache
from gptbook.long_context import (ALiBi, alibi_slopes, dynamic_ntk_factor, linear_scaling,
                                  llama3_scaling, loss_by_position, ntk_scaling,
                                  pair_with_turns, rope_scaling, yarn_attention, yarn_scaling)
from gptbook.training import evaluate_loss

ORIGINAL = "original_max_position_embeddings"


def alibi_model(n_heads=4, n_kv_heads=None, kernel=sdpa, bias=ALiBi, mask=Causal(), seed=0):
    """A model with ALiBi and weights large enough that attention matters."""
    def attention(config, layer):
        return MultiHeadAttention(config, layer, mask=mask, kernel=kernel,
                                  bias=bias(config.n_heads))

    set_seed(seed)
    config = GPTConfig(50, 8, 16 * n_heads, 2, n_heads, n_kv_heads=n_kv_heads)
    model = GPTModel(config, attention=attention, position_embedding=NoPositions).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model


@pytest.fixture
def ids():
    return torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(1))


# ALiBi ---------------------------------------------------------------------------------
@pytest.mark.parametrize("n_heads", [*range(1, 34), 40, 48, 63, 64, 65, 71, 112, 128])
def test_slopes_are_those_of_bloom_and_of_mpt(n_heads):
    slopes = alibi_slopes(n_heads)
    two = torch.ones(1, 2, dtype=torch.long)  # the bias of position 1 is the slope itself
    bloom = build_alibi_tensor(two, n_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(slopes, bloom, rtol=2e-6, atol=0)
    mpt = -build_mpt_alibi_tensor(n_heads, 2)[:, 0, 0]
    torch.testing.assert_close(slopes, mpt, rtol=2e-6, atol=0)
    assert slopes.dtype == torch.float32 and slopes.shape == (n_heads,)


def test_slopes_by_hand():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(3).tolist() == pytest.approx([2**-4, 2**-8, 2**-2])
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert len(set(alibi_slopes(12).tolist())) == 12


@pytest.mark.parametrize("n_heads", [0, -1, 2.0, "4", None, True])
def test_impossible_head_counts(n_heads):
    with pytest.raises(ValueError, match="n_heads="):
        alibi_slopes(n_heads)


@pytest.mark.parametrize("n_heads", [1, 3, 4, 6])
def test_the_whole_attention_is_the_papers_formula(n_heads):
    """softmax(q_i K^T / sqrt(D) - m (i - j)), head by head and row by row."""
    set_seed(n_heads)
    B, T, D = 2, 11, 8
    q, k, v = torch.randn(3, B, n_heads, T, D, dtype=torch.double)
    expected = torch.zeros(B, n_heads, T, D, dtype=torch.double)
    for b in range(B):
        for h, slope in enumerate(alibi_slopes(n_heads).tolist()):
            for i in range(T):
                far = torch.arange(i, -1, -1)
                scores = k[b, h, :i + 1] @ q[b, h, i] / math.sqrt(D) - slope * far
                expected[b, h, i] = scores.softmax(0) @ v[b, h, :i + 1]
    where = Positions(torch.arange(T)[None], aligned=True)
    kwargs = dict(q_pos=where, k_pos=where, mask=Causal(), bias=ALiBi(n_heads))
    for kernel in (naive_attention, sdpa):
        torch.testing.assert_close(kernel(q, k, v, **kwargs), expected)
        without = kernel(q, k, v, **{**kwargs, "bias": None})
        assert (without - expected).abs().max() > 1e-3  # the check can fail


def test_blooms_bias_differs_by_a_number_a_row_and_so_not_at_all():
    n_heads, T = 6, 13
    where = torch.arange(T)
    ours = ALiBi(n_heads)(where[None, None, :, None], where[None, None, None, :])[0]
    bloom = build_alibi_tensor(torch.ones(1, T, dtype=torch.long), n_heads, torch.float32)
    causal = torch.ones(T, T).tril().bool()
    scores = torch.randn(n_heads, T, T)
    weights = [(scores + b).masked_fill(~causal, -math.inf).softmax(-1) for b in (ours, bloom)]
    torch.testing.assert_close(*weights)
    raw = (scores - bloom).masked_fill(~causal, -math.inf).softmax(-1)
    assert (raw - weights[0]).abs().max() > 0.1


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, None), (4, 2), (6, 1)])
def test_kernels_agree_in_a_model(ids, n_heads, n_kv_heads):
    logits = [alibi_model(n_heads, n_kv_heads, kernel)(ids) for kernel in (naive_attention, sdpa)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_cached_equals_full_past_the_context_length(ids):
    model = alibi_model()
    full = model(ids)  # 24 tokens, context_length is 8: nothing ends there
    for chunks in ([1] * 24, [10, 1, 1, 12], [24]):
        cache, parts = KVCache(model, 24), []
        with torch.no_grad():
            for part in ids.split(chunks, 1):
                parts.append(model(part, cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", [naive_attention, sdpa])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(ids, kernel, side):
    model, n = alibi_model(kernel=kernel), 24 - 5
    alone = model(ids[:1, :n])
    padded, where = ids[:1].clone(), torch.full((1, 24), -1)
    place = slice(5, 24) if side == "left" else slice(0, n)
    padded[:, place], where[:, place] = ids[:1, :n], torch.arange(n)
    out = model(padded, positions=where)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, place], alone, atol=1e-4, rtol=1e-4)
    zeros = where.clamp(min=0)  # padding that claims to be a token does change them
    assert (model(padded, positions=zeros)[:, place] - alone).abs().max() > 1e-2


def test_distance_alone_counts(ids):
    model = alibi_model()
    there = model(ids, positions=torch.arange(24) + 1000)
    torch.testing.assert_close(there, model(ids), atol=1e-4, rtol=1e-4)


def test_packed_documents_read_as_if_alone(ids):
    """Positions doc * L + i with a mask on q // L == k // L: distances stay inside."""
    L = 100

    def same_document(q, k):
        return (q >= k) & (q // L == k // L)

    model = alibi_model(mask=same_document)
    where = torch.cat((torch.arange(10), L + torch.arange(14)))
    packed = model(ids, positions=where)
    torch.testing.assert_close(packed[:, 10:], alibi_model()(ids[:, 10:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", ["sign", "shared"])
def test_broken_biases_are_seen(ids, wrong):
    class Broken(ALiBi):
        def __init__(self, n_heads):
            super().__init__(n_heads)
            shared = self.slopes.mean().expand(n_heads)
            self.slopes = -self.slopes if wrong == "sign" else shared

    assert (alibi_model(bias=Broken)(ids) - alibi_model()(ids)).abs().max() > 1e-2


def test_slopes_stay_float32_and_out_of_the_state():
    model = alibi_model()
    assert not any("slopes" in name for name in model.state_dict())
    half = copy.deepcopy(model).half()
    assert half.blocks[0].attn.bias.slopes.dtype == torch.float32
    where = torch.tensor([700, 701])
    bias = half.blocks[0].attn.bias(where[None, None, 1:, None], where[None, None, None])
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias[0, :, 0, 0], -alibi_slopes(4))  # in bfloat16 they meet
    lost = where.bfloat16()
    assert lost[0] == lost[1]


def test_a_model_that_was_on_meta_comes_to_life(ids):
    """A forward pass on meta, as for counting FLOPs, must not take the slopes along."""
    real, gone = alibi_model(), copy.deepcopy(alibi_model()).to("meta")
    assert gone(ids.to("meta")).is_meta
    gone.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(gone(ids), real(ids))


def test_slopes_follow_their_model_and_copies_compute_the_same(ids):
    """No GPU here: the device that a move asks for is what `_apply` finds out."""
    bias, asked = ALiBi(4), []

    def move(t):
        asked.append(t)
        return t.half()

    bias._apply(move)
    assert len(asked) == 1 and torch.equal(bias.slopes, alibi_slopes(4))
    model = alibi_model()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), model(ids))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles
def test_it_compiles_as_one_graph(ids):
    model = alibi_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-4, rtol=1e-4)


def test_gradients_flow_and_bfloat16_runs(ids):
    model = alibi_model()
    model(ids).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    low = alibi_model().bfloat16()(ids)
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_no_copy_of_the_graph_is_needed(ids):
    """torch.export traces the bias: nothing in it looks at a tensor's values."""
    model = alibi_model()
    program = torch.export.export(model, (ids,))
    torch.testing.assert_close(program.module()(ids), model(ids), atol=1e-4, rtol=1e-4)


# Scalings ------------------------------------------------------------------------------
def transformers_says(said: dict, head_dim: int, base: float, length: int, seq_len=None):
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4,
                         max_position_embeddings=length,
                         rope_parameters={**said, "rope_theta": base})
    return ROPE_INIT_FUNCTIONS[said["rope_type"]](config, seq_len=seq_len)


def ours(said: dict, head_dim: int, base: float, length: int):
    config = GPTConfig(10, length, 4 * head_dim, 1, 4)
    return rope_scaling(said, config, base)(rope_frequencies(head_dim, base))


SETTINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64},
    {"rope_type": "yarn", "factor": 1.0, ORIGINAL: 4096},
    {"rope_type": "yarn", "factor": 16.0, ORIGINAL: 4096, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 0.5},
    {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 2048, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 2048, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 2048, "beta_fast": 1, "beta_slow": 1},
    {"rope_type": "llama3", "factor": 8.0, ORIGINAL: 8192, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 2.0, ORIGINAL: 64, "low_freq_factor": 0.5,
     "high_freq_factor": 2.0},
]


@pytest.mark.parametrize("said", SETTINGS, ids=lambda said: "-".join(map(str, said.values())))
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
@pytest.mark.parametrize("base", [100.0, 10_000.0, 500_000.0])
def test_scalings_are_those_of_transformers(said, head_dim, base):
    found, factor = ours(said, head_dim, base, 65_536)
    expected, expected_factor = transformers_says(dict(said), head_dim, base, 65_536)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-9)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("head_dim", [8, 24, 128])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("length", [64, 65, 200, 512])
def test_dynamic_is_that_of_transformers_at_a_fixed_length(head_dim, factor, length):
    said = {"rope_type": "dynamic", "factor": factor}
    expected, _ = transformers_says(dict(said), head_dim, 10_000.0, 64, seq_len=length)
    found, attention = ours({**said, ORIGINAL: 64}, head_dim, 10_000.0, length)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-9)
    assert attention == 1.0
    if length > 64 and factor > 1:
        assert (found < rope_frequencies(head_dim))[1:].all()


def test_dynamic_without_an_original_length_changes_nothing():
    found, _ = ours({"rope_type": "dynamic", "factor": 8.0}, 16, 10_000.0, 64)
    assert torch.equal(found, rope_frequencies(16))
    assert dynamic_ntk_factor(8.0, 64, 10) == 1.0 and dynamic_ntk_factor(8.0, 64, 128) == 9.0


@pytest.mark.parametrize("head_dim", [4, 16, 64])
@pytest.mark.parametrize("base", [50.0, 10_000.0])
def test_ntk_is_rope_with_a_larger_base(head_dim, base):
    found, factor = ntk_scaling(8.0)(rope_frequencies(head_dim, base))
    larger = base * 8.0 ** (head_dim / (head_dim - 2))
    torch.testing.assert_close(found, rope_frequencies(head_dim, larger), rtol=3e-6, atol=1e-9)
    assert factor == 1.0 and found[0] == 1.0
    assert found[-1].item() == pytest.approx(rope_frequencies(head_dim, base)[-1].item() / 8)


def test_the_pair_with_so_many_turns():
    f = rope_frequencies(32)
    for i in (0, 5, 15):
        turns = 4096 * f[i].item() / (2 * math.pi)
        assert pair_with_turns(f, 4096, turns) == pytest.approx(i, abs=1e-4)
    assert pair_with_turns(f, 4096, 1) > pair_with_turns(f, 4096, 32)


def test_attention_factor_by_hand():
    assert yarn_attention(1.0) == yarn_attention(0.5) == 1.0
    assert yarn_attention(math.e) == pytest.approx(1.1)
    assert yarn_attention(math.e, 0.5) == pytest.approx(1.05)


def rope_model(scaling=None, base=10_000.0, seed=0):
    set_seed(seed)
    rotary = partial(Rotary, base=base, scaling=scaling)
    config = GPTConfig(50, 16, 64, 2, 4)
    return GPTModel(config, attention=partial(MultiHeadAttention, rotary=rotary),
                    position_embedding=NoPositions).eval()


@pytest.mark.parametrize("scaling", [linear_scaling(4.0), ntk_scaling(4.0),
                                     yarn_scaling(4.0, 16), llama3_scaling(4.0, 16)])
def test_scaled_models_keep_the_weights_and_the_cache(scaling, ids):
    plain, scaled = rope_model(), rope_model(scaling)
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(4)
        full, cache = scaled(ids), KVCache(scaled, 24)
        parts = [scaled(part, cache=cache) for part in ids.split([7, 1, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-4)


def test_linear_scaling_is_a_division_of_the_positions(ids):
    """What transformers notes as equivalent: angles at 4 p, slowed fourfold, are those at p."""
    x, config = torch.randn(2, 4, 24, 16), GPTConfig(50, 16, 64, 2, 4)
    slow, plain = Rotary(config, scaling=linear_scaling(4.0)), Rotary(config)
    at = torch.arange(24)[None]
    torch.testing.assert_close(slow(x, Positions(4 * at)), plain(x, Positions(at)))
    assert (slow(x, Positions(at)) - plain(x, Positions(at))).abs().max() > 0.1


def test_scalings_do_not_change_their_input():
    f = rope_frequencies(16)
    for scaling in (linear_scaling(4.0), ntk_scaling(4.0), yarn_scaling(4.0, 16),
                    llama3_scaling(4.0, 16)):
        scaling(f)
        assert torch.equal(f, rope_frequencies(16))


@pytest.mark.parametrize("scaling", [ntk_scaling(2.0), yarn_scaling(2.0, 64)])
def test_one_pair_cannot_be_fast_and_slow(scaling):
    with pytest.raises(ValueError, match="head_dim >= 4"):
        scaling(rope_frequencies(2))


# The dictionary --------------------------------------------------------------------------
CONFIG = GPTConfig(10, 256, 64, 1, 4)


@pytest.mark.parametrize("said", [None, {}, {"rope_type": "default"}, {"type": "default"},
                                  {"rope_type": "default", "rope_theta": 10_000.0},
                                  {"rope_theta": 10_000, "partial_rotary_factor": 1.0}])
def test_defaults_need_no_scaling(said):
    assert rope_scaling(said, CONFIG, 10_000.0) is None


def test_the_older_key_and_nulls():
    new = rope_scaling({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64, "beta_fast": None},
                       CONFIG)
    old = rope_scaling({"type": "yarn", "factor": 4.0, ORIGINAL: 64}, CONFIG)
    f = rope_frequencies(16)
    assert torch.equal(new(f)[0], old(f)[0]) and new(f)[1] == old(f)[1]


@pytest.mark.parametrize("said, words", [
    ({"rope_type": "longrope", "factor": 4.0},
     r"unknown rope_type 'longrope'; known: default, dynamic, linear, llama3, ntk, yarn"),
    ({"rope_type": None}, "unknown rope_type None"),
    ({"rope_type": ["yarn"]}, "unknown rope_type"),
    ("yarn", "must be a dictionary"),
    ({"rope_type": "linear"}, "needs the field 'factor'"),
    ({"rope_type": "linear", "factor": None}, "needs the field 'factor'"),
    ({"rope_type": "yarn", "factor": 4.0}, f"needs the field '{ORIGINAL}'"),
    ({"rope_type": "llama3", "factor": 4.0, ORIGINAL: 64, "low_freq_factor": 1.0},
     "needs the field 'high_freq_factor'"),
    ({"rope_type": "llama3", "factor": 4.0, ORIGINAL: 64, "low_freq_factor": 4.0,
      "high_freq_factor": 4.0}, "high_freq_factor=4.0"),
    ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 must be a number >= 1"),
    ({"rope_type": "linear", "factor": "4"}, "factor='4' must be"),
    ({"rope_type": "linear", "factor": True}, "factor=True must be"),
    ({"rope_type": "linear", "factor": math.nan}, "factor=nan must be"),
    ({"rope_type": "linear", "factor": math.inf}, "factor=inf must be"),
    ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 0}, f"{ORIGINAL}=0 must be"),
    ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64, "beta_fast": 0}, "beta_fast=0 must be"),
    ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64, "beta_fast": 1, "beta_slow": 2},
     "beta_fast=1"),
    ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64, "truncate": 1}, "truncate=1 must be"),
    ({"rope_type": "linear", "factor": 4.0, "beta_fast": 32}, "has no field 'beta_fast'"),
    ({"rope_type": "default", "factor": 4.0}, "has no field 'factor'; it has: none"),
    ({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, "rope_theta=500000.0"),
    ({"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
     "partial_rotary_factor=0.5"),
])
def test_bad_dictionaries_are_refused_by_name(said, words):
    with pytest.raises(ValueError, match=words):
        rope_scaling(said, CONFIG, 10_000.0)


# The measure -----------------------------------------------------------------------------
def test_loss_by_position_is_the_loss_taken_apart():
    model, ids = alibi_model(), torch.randint(50, (4 * 16 + 1,)).numpy()
    data = TokenDataset(ids, 16, 3)  # a full batch and one of a single row
    model.train()
    losses = loss_by_position(model, data.windows())
    assert losses.shape == (16,) and model.training
    assert losses.mean().item() == pytest.approx(evaluate_loss(model, data), rel=1e-5)
    model.eval()
    row = torch.from_numpy(ids[:17].astype("int64"))[None]
    by_hand = F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="none")
    torch.testing.assert_close(loss_by_position(model, [(row[:, :-1], row[:, 1:])]), by_hand)


def test_loss_by_position_refuses_nothing_and_padding():
    model = alibi_model()
    with pytest.raises(ValueError, match="no row"):
        loss_by_position(model, [])
    ids = torch.zeros(1, 4, dtype=torch.long)
    targets = torch.tensor([[0, 0, 0, -100]])
    with pytest.raises(ValueError, match="-100"):
        loss_by_position(model, [(ids, targets)])


@pytest.mark.parametrize("lengths", [(8, 1), (1, 8), (8, 7)])
def test_loss_by_position_refuses_rows_of_two_lengths(lengths):
    rows = [torch.zeros(2, n, dtype=torch.long) for n in lengths]
    with pytest.raises(ValueError, match=f"rows of {lengths[0]} and {lengths[1]} tokens"):
        loss_by_position(alibi_model().train(), [(row, row) for row in rows])


def test_modules_are_modules():
    assert isinstance(ALiBi(4), nn.Module) and not list(ALiBi(4).parameters())
