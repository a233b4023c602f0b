"""Blocked attention against the formula: values, gradients, skipped blocks, memory, dropout."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from attention_examples import All, Documents, by_distance, example, padded, with_gradients
from outside_parts import SlidingWindow

from gptbook import flash
from gptbook.core import (
    Causal, GPTConfig, GPTModel, LossModel, MultiHeadAttention, Positions, naive_attention, sdpa,
    set_seed)
from gptbook.flash import (
    Tiles, flash_attention, flash_backward, flash_forward, tile_columns, tile_reach)
from gptbook.inference import KVCache


SIZES = [dict(), dict(H=4, K=4, Tq=64, Tk=64), dict(H=4, K=1, Tq=1, Tk=50), dict(Tq=13, Tk=41),
         dict(B=1, D=5, Tq=16, Tk=17), dict(Tq=1, Tk=1)]
MASKS = [Causal(), SlidingWindow(1), SlidingWindow(7), SlidingWindow(100), All(), Documents(10)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("block", [8, 16, 256])
def test_values_and_gradients_are_those_of_the_formula(sizes, mask, aligned, block):
    qkv, where = example(**sizes, aligned=aligned)
    ours = with_gradients(partial(flash_attention, block=block), qkv, **where, mask=mask)
    right = with_gradients(naive_attention, qkv, **where, mask=mask)
    assert_close(ours, right, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("T", [64, 300, 513])
def test_float32_is_within_1e_5(T):
    qkv, where = example(1, 2, 1, T, T, 64, torch.float32)
    exact = [y.detach().double().requires_grad_() for y in qkv]
    ours = with_gradients(flash_attention, qkv, **where, mask=Causal())
    right = with_gradients(naive_attention, exact, **where, mask=Causal())
    assert (ours[0] - right[0]).abs().max() < 1e-5
    for a, b in zip(ours[1:], right[1:]):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("block", [3, 4, 64])
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3)], ids=str)
def test_padding_gives_zero_and_finite_gradients(block, mask):
    qkv, _ = example(2, 2, 2, 12, 12)
    where = padded()
    ours = with_gradients(partial(flash_attention, block=block), qkv, **where, mask=mask)
    assert_close(ours[0], naive_attention(*qkv, **where, mask=mask), atol=1e-12, rtol=0)
    assert ours[0][0, :, :4].eq(0).all() and ours[1][0, :, :4].eq(0).all()
    assert all(y.isfinite().all() for y in ours)
    hidden_keys = [y[0, :, :4] for y in ours[2:]]
    assert all(y.eq(0).all() for y in hidden_keys)


@pytest.mark.parametrize("name, broken", [
    ("shrink", lambda top, total, sums, s, v, kept=None: (
        t := torch.maximum(top, s.amax(-1, keepdim=True)),
        total + (s - t).exp().sum(-1, keepdim=True), sums + (s - t).exp() @ v)),
    ("minus infinity", lambda top, total, sums, s, v, kept=None: (
        t := torch.maximum(top, s.amax(-1, keepdim=True)),
        total * (top - t).exp() + (s - t).exp().sum(-1, keepdim=True),
        sums * (top - t).exp() + (s - t).exp() @ v))])
def test_a_broken_running_softmax_is_seen(monkeypatch, name, broken):
    monkeypatch.setattr(flash, "absorb", broken)
    qkv, _ = example(2, 2, 2, 12, 12)
    out = flash_attention(*qkv, **padded(), mask=Causal(), block=3)
    right = naive_attention(*qkv, **padded(), mask=Causal())
    assert not torch.allclose(out, right, atol=1e-6)


def test_the_gradients_of_the_keys_add_up_to_zero_only_with_d():
    qkv, where = example(K=4)
    tiles = Tiles(**where, mask=Causal(), block=8)
    out, lse = flash_forward(*qkv, tiles)
    up = torch.randn_like(out)
    sums = [flash_backward(up, *qkv, o, lse, tiles)[1].sum(2).abs().max()
            for o in (out, torch.zeros_like(out))]
    assert sums[0] < 1e-12 and sums[1] > 0.1


@pytest.mark.parametrize("bias", [None, by_distance])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(bias, dropout):
    qkv, where = example(1, 4, 2, 5, 7, 3)

    def call(*qkv):
        torch.manual_seed(3)
        return flash_attention(*qkv, **where, mask=Causal(), bias=bias, dropout=dropout, block=3)

    assert gradcheck(call, qkv, fast_mode=bias is None)


def test_a_bias_is_added():
    qkv, where = example()
    ours, right, without = (
        with_gradients(kernel, qkv, **where, mask=Causal(), bias=bias) for kernel, bias in (
            (partial(flash_attention, block=8), by_distance), (naive_attention, by_distance),
            (naive_attention, None)))
    assert_close(ours, right, atol=1e-12, rtol=1e-10)
    assert not torch.allclose(ours[0], without[0], atol=1e-3)


# Which blocks ------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [Causal(), *map(SlidingWindow, (1, 8, 9, 100))], ids=str)
@pytest.mark.parametrize("Tq, Tk", [(40, 40), (37, 37), (8, 40), (1, 33), (12, 45)])
def test_blocks_that_are_skipped_hide_all_and_free_ones_nothing(mask, Tq, Tk):
    _, where = example(Tq=Tq, Tk=Tk)
    tiles = Tiles(**where, mask=mask, block=8)
    seen = mask(where["q_pos"].index[0][:, None], where["k_pos"].index[0][None, :])
    for i in tiles.rows():
        computed = torch.zeros(Tk, dtype=torch.bool)
        for j in tile_columns(tiles, i):
            computed[j] = True
            if j.stop <= tile_reach(tiles, i)[1].stop:
                assert seen[i, j].all()
            else:
                assert mask != Causal() or not seen[i, j].all()
            assert seen[i, j].any(), "a block that is hidden wholly was not skipped"
        assert not seen[i][:, ~computed].any()


def test_nothing_is_skipped_without_alignment():
    for mask, aligned in ((Causal(), False), (All(), True), (Documents(4), True)):
        _, where = example(aligned=aligned)
        tiles = Tiles(**where, mask=mask, block=8)
        assert all(len(tile_columns(tiles, i)) == 5 for i in tiles.rows())


@pytest.mark.parametrize("mask, blocks", [(Causal(), 15), (SlidingWindow(8), 9), (All(), 25)], ids=str)
def test_the_kernel_computes_no_other_blocks(monkeypatch, mask, blocks):
    calls, real = [], flash.tile_scores
    monkeypatch.setattr(flash, "tile_scores", lambda *a: calls.append(a) or real(*a))
    qkv, where = example(Tq=40, Tk=40)
    out = flash_attention(*qkv, **where, mask=mask, block=8)
    assert len(calls) == blocks
    out.sum().backward()
    assert len(calls) == 2 * blocks


# Memory ------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """The largest storage that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for y in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(y, torch.Tensor):
                self.bytes = max(self.bytes, y.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(50), All()], ids=str)
def test_no_tensor_is_square(mask):
    def largest(kernel):
        qkv, where = example(1, 4, 2, 512, 512, 16, torch.float32)
        with Largest() as seen:
            kernel(*qkv, **where, mask=mask).sum().backward()
        return seen.bytes

    square = 4 * 4 * 512 * 512
    assert largest(naive_attention) >= square
    assert largest(partial(flash_attention, block=64)) <= 4 * 4 * 512 * 16


def test_what_is_kept_grows_with_the_tokens():
    def kept(T):
        qkv, where = example(1, 2, 2, T, T, 16, torch.float32)
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: found.update({x.data_ptr(): x.numel() * 4}) or x, lambda x: x):
            out = flash_attention(*qkv, **where, mask=Causal(), block=16)
        return sum(found.values()), out

    assert kept(64)[0] == 4 * 2 * 64 * (4 * 16 + 1)  # q, k, v, out and one number a row
    assert kept(128)[0] == 2 * kept(64)[0]


# Dropout -----------------------------------------------------------------------------
def dropped(seed, **how):
    """The weights after dropout: values are the identity, so they are the output."""
    (q, k, _), where = example(1, 2, 2, 24, 24)
    v = torch.eye(24, dtype=q.dtype).expand(1, 2, 24, 24).clone().requires_grad_()
    torch.manual_seed(seed)
    call = partial(flash_attention, **where, mask=All(), block=7, **how)
    return (q, k, v), call, call(q, k, v)


def test_dropout_is_the_same_both_ways():
    (q, k, v), call, out = dropped(0, dropout=0.3)
    _, _, full = dropped(0)
    factors = (out / full).detach()
    assert_close(factors, torch.where(factors > 0.5, 1 / 0.7, 0.0).double())
    share = factors.eq(0).double().mean().item()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / factors.numel())

    def formula(q, k, v):
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mul(factors) @ v

    up = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), up)
    right = torch.autograd.grad(formula(q, k, v), (q, k, v), up)
    assert_close(ours, right, atol=1e-12, rtol=1e-10)
    other = torch.autograd.grad(formula(q, k, v.flip(2)), (q, k, v), up)  # can fail
    assert not torch.allclose(ours[0], other[0], atol=1e-6)


def test_dropout_follows_the_seed():
    a, b, c = (dropped(seed, dropout=0.3)[2] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_blocks_drop_different_weights():
    _, _, out = dropped(0, dropout=0.5)
    zeros = out.eq(0)
    first = zeros[..., :7, :7]
    assert not any(torch.equal(first, zeros[..., i:i + 7, j:j + 7])
                   for i, j in ((0, 7), (7, 0), (7, 7), (14, 14)))


def test_dropout_under_activation_checkpointing():
    (q, k, v), call, _ = dropped(0, dropout=0.3)
    grads = []
    for wrap in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(wrap(call, q, k, v).square().sum(), (q, k, v)))
    assert_close(grads[0], grads[1], atol=0, rtol=0)


# Numbers of other kinds --------------------------------------------------------------
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_keeps_its_dtype_and_sums_in_float32(dtype, tolerance):
    qkv, where = example(1, 2, 1, 100, 100, 16, dtype)
    exact = [y.detach().double().requires_grad_() for y in qkv]
    ours = with_gradients(partial(flash_attention, block=16), qkv, **where, mask=Causal())
    right = with_gradients(naive_attention, exact, **where, mask=Causal())
    assert all(y.dtype == dtype for y in ours)
    for a, b in zip(ours, right):
        assert (a - b).abs().max() < tolerance * b.abs().max()


def test_autocast_does_not_reach_the_sums():
    qkv, where = example(1, 2, 2, 40, 40, 16, torch.float32)
    plain = with_gradients(flash_attention, qkv, **where, mask=Causal())
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(flash_attention, qkv, **where, mask=Causal())
        coarse = naive_attention(*qkv, **where, mask=Causal())
    assert_close(cast, plain, atol=0, rtol=0)
    assert not torch.allclose(coarse.float(), plain[0], atol=1e-5)


def test_large_scores_do_not_overflow():
    qkv, where = example(dtype=torch.float32)
    qkv = [(100 * y).detach() for y in qkv[:2]] + [qkv[2].detach()]
    out = flash_attention(*qkv, **where, mask=Causal(), block=8)
    assert_close(out, naive_attention(*qkv, **where, mask=Causal()), atol=1e-4, rtol=1e-4)


# In a model --------------------------------------------------------------------------
def models(**kwargs):
    config = GPTConfig(40, 64, 32, 2, 4, n_kv_heads=2, **kwargs)
    for kernel in (sdpa, partial(flash_attention, block=5)):
        set_seed(0)
        yield GPTModel(config, attention=partial(MultiHeadAttention, kernel=kernel))


def test_a_model_with_it_trains_and_decodes_like_the_other():
    ids = torch.randint(40, (2, 23))
    losses, gradients, logits = [], [], []
    for model in models():
        loss = LossModel(model)(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss)
        gradients.append(model.blocks[0].attn.W_key.weight.grad)
        with torch.no_grad():
            cache = KVCache(model.eval())
            logits.append(torch.cat([model(ids[:, a:b], cache=cache) for a, b in
                                     ((0, 9), (9, 10), (10, 23))], 1))
            assert_close(logits[-1], model(ids), atol=1e-5, rtol=1e-4)
    assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
    assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


# Refusals ----------------------------------------------------------------------------
class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, q_pos, k_pos):
        return -self.scale * (q_pos - k_pos)


def test_a_learned_bias_is_refused_where_it_would_lose_its_gradient():
    qkv, where = example()
    with pytest.raises(ValueError, match="learned bias"):
        flash_attention(*qkv, **where, mask=Causal(), bias=Learned())
    with torch.no_grad():
        out = flash_attention(*qkv, **where, mask=Causal(), bias=Learned(), block=8)
        assert_close(out, naive_attention(*qkv, **where, mask=Causal(), bias=Learned()))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_a_share_outside_its_range_is_refused(dropout):
    qkv, where = example()
    with pytest.raises(ValueError, match="outside"):
        flash_attention(*qkv, **where, mask=Causal(), dropout=dropout)


def test_sizes_that_disagree_are_refused():
    (q, k, v), where = example()
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        flash_attention(q, *(y[:, :1].expand(-1, 3, -1, -1) for y in (k, v)), **where,
                        mask=Causal())
    for name in where:
        more = {**where, name: Positions(torch.arange(50)[None], True)}
        with pytest.raises(ValueError, match="50 positions for 37"):
            flash_attention(q, k, v, **more, mask=Causal())
        more = {**where, name: Positions(torch.arange(37).expand(3, -1))}
        with pytest.raises(ValueError, match="3 rows of them for 2"):
            flash_attention(q, k, v, **more, mask=Causal())


@pytest.mark.parametrize("change", [
    lambda q, k, v: (q, k, torch.cat([v, v], 2)), lambda q, k, v: (q, k, v[:, :, :5]),
    lambda q, k, v: (q, k, v[:, :1]), lambda q, k, v: (q, k[:1], v[:1]),
    lambda q, k, v: (q[:1], k, v), lambda q, k, v: (q, k[..., :4], v)])
def test_tensors_that_do_not_belong_together_are_refused(change):
    qkv, where = example()
    with pytest.raises(ValueError, match="do not belong together"):
        flash_attention(*change(*qkv), **where, mask=Causal())


def test_no_key_head_and_no_floats_are_refused():
    (q, k, v), where = example()
    with pytest.raises(ValueError, match="cannot share 0"):
        flash_attention(q, k[:, :0], v[:, :0], **where, mask=Causal())
    with pytest.raises(ValueError, match="floats are wanted"):
        flash_attention(q.long(), k.long(), v.long(), **where, mask=Causal())


@pytest.mark.parametrize("block", [0, -1, 2.0, True, None])
def test_a_block_that_is_none_is_refused(block):
    qkv, where = example()
    with pytest.raises(ValueError, match="whole number >= 1"):
        flash_attention(*qkv, **where, mask=Causal(), block=block)


def test_a_second_derivative_is_refused():
    qkv, where = example()
    out = flash_attention(*qkv, **where, mask=Causal())
    grad, = torch.autograd.grad(out.square().sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Odd inputs --------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [dict(Tq=0, Tk=0), dict(Tq=0, Tk=5), dict(B=0), dict(Tq=9, Tk=4)],
                         ids=str)
def test_empty_inputs_and_more_queries_than_keys(sizes):
    qkv, where = example(**sizes)
    ours = with_gradients(partial(flash_attention, block=4), qkv, **where, mask=Causal())
    right = with_gradients(naive_attention, qkv, **where, mask=Causal())
    assert_close(ours, right, atol=1e-12, rtol=1e-10)


def test_without_keys_the_output_is_zero():
    (q, k, v), where = example(Tq=3, Tk=3)
    where["k_pos"] = Positions(torch.zeros(1, 0, dtype=torch.long))
    out = flash_attention(q, k[:, :, :0], v[:, :, :0], **where, mask=Causal())
    assert out.shape == q.shape and out.eq(0).all()


def test_values_may_be_of_another_width():
    (q, k, v), where = example()
    qkv = q, k, torch.cat([v, v], 3)[..., :11].detach().requires_grad_()
    ours = with_gradients(partial(flash_attention, block=8), qkv, **where, mask=Causal())
    right = with_gradients(naive_attention, qkv, **where, mask=Causal())
    assert_close(ours, right, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_meta_device_has_shapes_and_gradients(dropout):
    qkv = [torch.empty(2, 4, 9, 8, device="meta", requires_grad=True) for _ in range(3)]
    where = Positions(torch.arange(9, device="meta")[None], True)
    with torch.device("meta"):  # what a model that is built there may be called under
        out = flash_attention(*qkv, q_pos=where, k_pos=where, mask=Causal(), dropout=dropout,
                              block=4)
    out.sum().backward()
    assert out.is_meta and out.shape == qkv[0].shape == qkv[0].grad.shape


def test_a_bias_may_hide_a_row():
    qkv, where = example(K=4)
    out = flash_attention(*qkv, **where, mask=Causal(), block=8,
                          bias=lambda q, k: torch.where(q == 2, -math.inf, 0.0) + 0 * k)
    right = naive_attention(*qkv, **where, mask=Causal())
    assert out[:, :, 2].eq(0).all() and not right[:, :, 2].eq(0).any()
    rest = torch.arange(37) != 2
    assert_close(out[:, :, rest], right[:, :, rest], atol=1e-12, rtol=1e-10)
    assert all(y.isfinite().all() for y in torch.autograd.grad(out.sum(), qkv))


def test_a_number_that_is_none_stays_seen():
    qkv, where = example(dtype=torch.float32)
    qkv = [y.detach() for y in qkv]
    qkv[0][0, 0, 7, 0] = math.nan
    out = flash_attention(*qkv, **where, mask=Causal(), block=8)
    assert torch.equal(out.isnan(), naive_attention(*qkv, **where, mask=Causal()).isnan())
    assert out.isnan().sum() == 8


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch
def test_compiled_and_copied_models_are_the_same():
    model, ids = [*models()][1], torch.arange(23)[None]
    logits = model(ids)
    assert torch.equal(copy.deepcopy(model)(ids), logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), logits)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")(ids)
    assert_close(compiled, logits, atol=1e-6, rtol=1e-5)
    weight = model.blocks[0].attn.W_key.weight
    grads = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (compiled, logits)]
    assert_close(*grads, atol=1e-6, rtol=1e-4)
