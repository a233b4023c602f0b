"""The loss without logits, and activations computed twice: numerics, sockets, and error paths."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from gptbook.core import GPTConfig, GPTModel, LossModel, init_weights, replace_modules, set_seed
from gptbook.core import Positions, auxiliary_loss, clear_auxiliary_loss
from gptbook.data import TokenDataset
from gptbook.inference import KVCache
from gptbook.less_memory import (
    ChunkedLoss, FusedHead, Recomputed, asked_rows, checkpoint_activations, fused_head,
    head_loss, is_plain, loss_and_gradient, product_dtype, recomputed_head, saved_bytes)
from gptbook.precision import BFloat16, Float16
from gptbook.runs import OutOfMemory, Run, TrainConfig, explain_memory
from gptbook.training import train

pytestmark = [pytest.mark.filterwarnings("error::DeprecationWarning"),
              pytest.mark.filterwarnings("error::FutureWarning")]
V, T = 61, 12


def new_model(seed=0, layers=2, vocab=V, **sizes):
    set_seed(seed)
    model = GPTModel(GPTConfig(vocab, T, 16, layers, 2, **sizes))
    init_weights(model, 0.3)
    return model


def new_batch(B=3, length=T, asked=0.7, seed=0, vocab=V):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (B, length + 1), generator=g)
    targets = ids[:, 1:].clone()
    targets[torch.rand(B, length, generator=g) >= asked] = -100
    return ids[:, :-1], targets


def results(loss_model, batch, backward=lambda loss: loss.backward()):
    """[loss, the gradient of each parameter]; the gradients are cleared before."""
    loss_model.zero_grad()
    loss = loss_model(*batch)
    backward(loss)
    return [loss.detach(), *(p.grad for p in loss_model.parameters() if p.grad is not None)]


def assert_near(found, expected, tolerance):
    """As `assert_same`, by norms."""
    least = 0.05 * max(b.norm().item() for b in expected)
    for a, b in zip(found, expected):
        assert (a - b).norm() <= tolerance * max(b.norm().item(), least)


def assert_same(found, expected, tolerance=1e-6):
    """To a share of each tensor's largest number. The bias of a key has the gradient zero, for
    a softmax does not see it: such a tensor holds rounding, small beside the others."""
    assert len(found) == len(expected)
    least = 0.02 * max(b.abs().max().item() for b in expected)
    for a, b in zip(found, expected):
        limit = tolerance * max(b.abs().max().item(), least)
        assert (a - b).abs().max().item() <= limit


def add_bias(model):
    model.head.bias = nn.Parameter(0.3 * torch.randn(model.config.vocab_size))
    return model


# The loss ----------------------------------------------------------------------------
@pytest.mark.parametrize("B, length", [(1, 1), (1, T), (3, T), (5, 7)])
@pytest.mark.parametrize("chunk", [1, 5, 36, 1000])
@pytest.mark.parametrize("asked", [1.0, 0.6, 0.0])
def test_equals_the_plain_loss(B, length, chunk, asked):
    for tied in (True, False):
        for bias in (True, False):
            model = new_model(tied=tied).double()
            if bias:
                add_bias(model).double()
            batch = new_batch(B, length, asked)
            found = results(ChunkedLoss(model, chunk), batch)
            expected = results(LossModel(model), batch)
            assert_same(found, expected, 2e-7)  # the plain loss rounds logits to float32
            if asked == 0:
                assert found[0] == 0 and all((g == 0).all() for g in found[1:])


@pytest.mark.parametrize("vocab", [61, 1000])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_equals_the_plain_loss_in_float32(vocab, chunk):
    for tied in (True, False):
        model = new_model(vocab=vocab, tied=tied)
        batch = new_batch(4, vocab=vocab)
        assert_same(results(ChunkedLoss(model, chunk), batch),
                    results(LossModel(model), batch), 5e-6)  # sums in another order


def test_a_difference_would_be_seen():
    """The negative control: a mean of means, and a bias that is forgotten."""
    model, batch = new_model(), new_batch()
    right = results(LossModel(model), batch)
    wrong = [1.001 * x for x in right]
    with pytest.raises(AssertionError):
        assert_same(wrong, right)
    add_bias(model)
    with pytest.raises(AssertionError):
        assert_same(results(LossModel(model), batch)[:1], right[:1])
    x, t = torch.randn(36, 16), batch[1].flatten()
    means = [F.cross_entropy(model.head(x[some]), t[some]) for some in torch.arange(36).split(9)]
    assert abs(sum(means) / len(means) - F.cross_entropy(model.head(x), t)) > 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_gradcheck(bias, chunk):
    set_seed(0)
    x, W = (torch.randn(n, 5, dtype=torch.double, requires_grad=True) for n in (7, 6))
    b = torch.randn(6, dtype=torch.double, requires_grad=True) if bias else None
    t = torch.tensor([0, 5, -100, 2, 2, -100, 1])

    def loss(x, W, b):
        return FusedHead.apply(x, W, b, t, torch.double, chunk, True)

    assert torch.autograd.gradcheck(loss, (x, W, b))
    torch.testing.assert_close(loss(x, W, b), F.cross_entropy(F.linear(x, W, b), t))


def test_gradcheck_would_see_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W, t):
            loss, sums = fused_head(x, W, None, t, dtype=torch.double)
            ctx.save_for_backward(sums[0], 1.01 * sums[1])
            return loss

        @staticmethod
        def backward(ctx, factor):
            return *(g * factor for g in ctx.saved_tensors), None

    x, W = (torch.randn(n, 5, dtype=torch.double, requires_grad=True) for n in (7, 6))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x, W: Wrong.apply(x, W, torch.arange(7) % 6), (x, W))


def test_equals_pytorchs_own_chunked_loss():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has no linear_cross_entropy")
    x, t = torch.randn(40, 16, requires_grad=True), torch.randint(V, (40,))
    t[::3] = -100
    head = nn.Linear(16, V, bias=False)
    found = torch.autograd.grad(head_loss(head, x, t, 7), (x, head.weight))
    theirs = F.linear_cross_entropy(x, head.weight, t, ignore_index=-100,
                                    options=nn.LinearCrossEntropyOptions())
    assert_same(found, torch.autograd.grad(theirs, (x, head.weight)), 5e-6)


@pytest.mark.parametrize("big", [1e4, 88.0])
def test_large_logits_do_not_overflow(big):
    logits = torch.tensor([[big, 0.0, -big], [0.0, big, big]])
    t = torch.tensor([2, 1])
    expected = F.cross_entropy(logits, t, reduction="sum")
    gradient = logits.softmax(1) - F.one_hot(t, 3)
    loss = loss_and_gradient(logits, t)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, gradient)


def test_what_is_not_asked_costs_no_product(monkeypatch):
    rows, product = [], torch.mm

    def counted(a, b, **kwargs):
        rows.append(len(a))
        return product(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    batch = new_batch(asked=0.4)
    ChunkedLoss(new_model(), 5)(*batch)
    assert sum(rows) == (batch[1] != -100).sum() and max(rows) <= 5


def test_pieces_have_about_one_size():
    t = torch.zeros(101, dtype=torch.long)
    t[50] = -100
    pieces = asked_rows(t, 33)
    assert [len(p) for p in pieces] == [25] * 4 and 50 not in torch.cat(pieces)


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True, "256"])
def test_a_bad_chunk_is_refused(chunk):
    with pytest.raises(ValueError, match="whole number"):
        ChunkedLoss(new_model(), chunk)(*new_batch())


def test_targets_of_another_shape_are_refused():
    ids, targets = new_batch()
    with pytest.raises(ValueError, match=r"\(3, 11\).*\(3, 12\)"):
        ChunkedLoss(new_model())(ids, targets[:, 1:])


@pytest.mark.parametrize("bad", [V, -1])
def test_a_target_outside_the_vocabulary_is_refused(bad):
    ids, targets = new_batch()
    targets[0, 0] = bad
    for loss in (LossModel, ChunkedLoss):
        with pytest.raises((IndexError, RuntimeError)):
            loss(new_model())(ids, targets)


def test_positions_are_passed_on():
    ids, targets = new_batch()
    positions = torch.arange(T).flip(0)
    model = new_model()
    found, expected = (kind(model)(ids, targets, positions) for kind in (ChunkedLoss, LossModel))
    torch.testing.assert_close(found, expected)
    assert abs(ChunkedLoss(model)(ids, targets) - found) > 1e-3


# Autograd ----------------------------------------------------------------------------
def test_without_gradients_none_are_computed():
    x, t = torch.randn(9, 16), torch.arange(9)
    head = nn.Linear(16, V)
    with torch.no_grad():
        loss = head_loss(head, x, t, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(head(x), t).detach())
    assert fused_head(x, head.weight, head.bias, t, (False,) * 3)[1] == [None] * 3


@pytest.mark.parametrize("frozen", ["head", "features", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    model, batch = add_bias(new_model(tied=False)), new_batch()
    for name, p in model.named_parameters():
        of_head = name.startswith("head.")
        p.requires_grad_(not (of_head if frozen == "head" else
                              not of_head if frozen == "features" else name == "head.weight"))
    found, expected = (results(kind(model), batch) for kind in (ChunkedLoss, LossModel))
    assert_same(found, expected, 5e-6)
    assert len(found) == 1 + sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("factor", [0.25, 1.0, 65536.0])
def test_factors_from_above(factor):
    model, batch = new_model(), new_batch()
    found, expected = (results(kind(model), batch, lambda loss: (factor * loss).backward())
                       for kind in (ChunkedLoss, LossModel))
    assert_same(found, expected, 5e-6)


def test_backward_twice_adds_twice():
    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    model, batch = new_model(), new_batch()
    once = [g.clone() for g in results(ChunkedLoss(model), batch)]
    both = results(ChunkedLoss(model), batch, twice)
    assert_same(both[1:], [2 * g for g in once[1:]])
    loss = ChunkedLoss(model)(*batch)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_backward_twice_with_a_factor_is_refused_not_wrong():
    model, batch = new_model(), new_batch()
    loss = 3 * ChunkedLoss(model)(*batch)
    loss.backward(retain_graph=True)
    kept = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    assert_same(kept, results(LossModel(model), batch, lambda x: (3 * x).backward())[1:], 5e-6)


def test_two_calls_in_one_graph():
    model, first, second = new_model(), new_batch(seed=1), new_batch(seed=2)
    found, expected = [], []
    for kind, into in ((ChunkedLoss, found), (LossModel, expected)):
        model.zero_grad()
        (kind(model)(*first) * 3 + kind(model)(*second)).backward()
        into += [p.grad.clone() for p in model.parameters()]
    assert_same(found, expected, 5e-6)


def test_a_second_derivative_is_refused_not_wrong():
    x = torch.randn(4, 16, requires_grad=True)
    loss = head_loss(nn.Linear(16, V), x, torch.arange(4), 4)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("kind, tolerance", [(BFloat16, 0.02), (Float16, 0.004)])
def test_autocast(kind, tolerance):
    model, batch = add_bias(new_model(tied=False)), new_batch(8)
    exact = results(LossModel(model), batch)
    exact = [x.clone() for x in exact]
    with kind("cpu").autocast():
        found = results(ChunkedLoss(model, 20), batch)
    assert all(x.dtype == torch.float32 for x in found)
    assert_near(found, exact, 4 * tolerance)
    with pytest.raises(AssertionError):
        assert_near(found, exact, 1e-5)  # it was short
    assert abs(found[0] - exact[0]) < tolerance * exact[0]
    with kind("cpu").autocast():
        assert product_dtype(model.head.weight) == kind.dtype
        assert product_dtype(model.head.weight.double()) == torch.double


def test_float16_keeps_the_small_gradients():
    """Divided before it is rounded, the gradient of most words would be zero."""
    set_seed(0)
    n, vocab = 64, 20_000
    x, W = torch.randn(n, 8), 0.01 * torch.randn(vocab, 8)
    t = torch.randint(vocab, (n,))
    _, exact = fused_head(x, W, None, t)
    _, found = fused_head(x, W, None, t, dtype=torch.float16)
    for a, b in zip(found[:2], exact):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2e-3 * b.norm()
    early = (torch.softmax(x @ W.T, 1) / 4096).half()
    assert (early == 0).float().mean() > 0.9


def test_a_loss_scaler_scales_and_unscales():
    model, batch = new_model(), new_batch()
    expected = [x.clone() for x in results(LossModel(model), batch)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = results(ChunkedLoss(model), batch, lambda loss: scaler.scale(loss).backward())
    scaler.unscale_(optimizer)
    found = [found[0], *(p.grad for p in model.parameters())]
    assert_same(found, expected, 5e-6)


def test_weights_in_bfloat16():
    model, batch = new_model().bfloat16(), new_batch()
    exact = results(LossModel(copy.deepcopy(model).float()), batch)
    found, plain = (results(kind(copy.deepcopy(model)), batch) for kind in (ChunkedLoss, LossModel))
    assert [a.dtype for a in found] == [b.dtype for b in plain]
    errors = [sum((a.float() - b).norm().item() for a, b in zip(one, exact))
              for one in (found, plain)]
    assert 0 < errors[0] < 1.2 * errors[1]


# Heads that are more than a linear ---------------------------------------------------
class Wrapped(nn.Module):
    """A low-rank update with dropout beside the head, as LoRA has it."""

    def __init__(self, base, vocab=V):
        super().__init__()
        self.base, self.drop = base, nn.Dropout(0.5)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, vocab, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.drop(x)))


def wrap(model, vocab=V):
    replace_modules(model, lambda name, m: name == "head", lambda name, m: Wrapped(m, vocab))
    return model


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_wrapped_head(chunk):
    model, batch = wrap(new_model()).eval(), new_batch()
    assert not is_plain(model.head)
    found, expected = (results(kind(model).eval(), batch) for kind in (ChunkedLoss, LossModel))
    assert_same(found, expected, 5e-6)
    assert_same(results(ChunkedLoss(model, chunk).eval(), batch), expected, 5e-6)


def test_a_wrapped_head_with_dropout_drops_the_same_again():
    """Against finite differences along one direction, with the same random numbers."""
    model, batch = wrap(new_model()).double().train(), new_batch()
    loss_model = ChunkedLoss(model, 7)
    weight = model.head.up.weight
    direction = torch.randn_like(weight)

    def at(step):
        torch.manual_seed(5)
        with torch.no_grad():
            weight.add_(step * direction)
            loss = loss_model(*batch)
            weight.sub_(step * direction)
        return loss.item()

    torch.manual_seed(5)
    results(loss_model, batch)
    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    assert abs((weight.grad * direction).sum().item() - slope) < 1e-6 * max(1, abs(slope))


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "subclass"])
def test_a_watched_head_is_called(kind):
    model, batch, seen = new_model(), new_batch(), []
    if kind == "forward":
        model.head.register_forward_hook(lambda *args: seen.append(1))
    elif kind == "pre":
        model.head.register_forward_pre_hook(lambda *args: seen.append(1))
    elif kind == "backward":
        model.head.register_full_backward_hook(lambda *args: seen.append(1))
    else:
        class Scaled(nn.Linear):
            def forward(self, x):
                seen.append(1)
                return 2 * super().forward(x)
        model.head.__class__ = Scaled
    assert not is_plain(model.head)
    found = results(ChunkedLoss(model, 9), batch)
    assert seen
    assert_same(found, results(LossModel(model), batch), 5e-6)


def test_a_plain_head_is_plain():
    assert is_plain(nn.Linear(2, 3)) and is_plain(new_model().head)


def test_recomputed_head_without_gradients_and_without_targets():
    x, t, head = torch.randn(6, 16), torch.full((6,), -100), nn.Linear(16, V)
    assert recomputed_head(head, x, t, 4) == 0
    with torch.no_grad():
        found = recomputed_head(head, x, torch.arange(6), 4)
    torch.testing.assert_close(found, F.cross_entropy(head(x), torch.arange(6)).detach())


# Bytes -------------------------------------------------------------------------------
def test_saved_bytes_by_hand():
    linear, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(lambda: linear(x), linear) == 128
    assert saved_bytes(lambda: (linear(x), linear(x)), linear) == 128  # one storage
    assert saved_bytes(lambda: x + 1, linear) == 0
    assert saved_bytes(lambda: linear(x), nn.Linear(1, 1)) == 128 + 256  # its weight too
    with torch.no_grad():
        assert saved_bytes(lambda: linear(x), linear) == 0


def test_the_logits_are_not_kept():
    vocab, batch = 5000, new_batch(8, vocab=5000)
    model, N = new_model(vocab=vocab), 8 * T
    blocks = saved_bytes(lambda: model.features(batch[0]), model)
    plain = saved_bytes(lambda: LossModel(model)(*batch), model) - blocks
    chunked = saved_bytes(lambda: ChunkedLoss(model)(*batch), model) - blocks
    assert 4 * N * vocab <= plain < 4.1 * N * vocab
    head = 4 * 16 * (vocab + N)  # its gradient, and that of the features
    assert head <= chunked < 1.1 * head
    head = wrap(model, vocab).head
    again = saved_bytes(lambda: ChunkedLoss(model)(*batch), model) - blocks
    assert isinstance(head, Wrapped) and again < 0.05 * plain


# Training ----------------------------------------------------------------------------
def data():
    ids = torch.randint(V, (900,), generator=torch.Generator().manual_seed(3)).numpy()
    return TokenDataset(ids, T, 4, document_end=0)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_in_the_loop(precision):
    part = BFloat16("cpu") if precision else None
    runs = [train(new_model(), data(), None, TrainConfig(8), loss_model=kind, precision=part,
                  progress=False) for kind in (LossModel, ChunkedLoss)]
    found, expected = (one.column("loss")[1] for one in reversed(runs))
    assert max(abs(a - b) for a, b in zip(found, expected)) < (2e-2 if precision else 1e-5)


def test_the_error_about_memory_names_what_there_is():
    model = new_model()
    run = Run(model, None, TrainConfig(1))
    with pytest.raises(OutOfMemory) as error, explain_memory(run, data()):
        raise MemoryError
    assert "loss_model=ChunkedLoss" in str(error.value)
    assert "checkpoint_activations(model)" in str(error.value)


def test_compiled():
    model, batch = new_model(), new_batch()
    expected = [x.clone() for x in results(LossModel(model), batch)]
    loss_model = torch.compile(ChunkedLoss(model), backend="aot_eager")
    assert_same(results(loss_model, batch), expected, 5e-6)


# Activations -------------------------------------------------------------------------
@pytest.mark.parametrize("every, names", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (9, [0])])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_gradients_are_the_same_bits(every, names, drop_rate):
    model = new_model(layers=5, drop_rate=drop_rate)
    again = copy.deepcopy(model)
    assert checkpoint_activations(again, every) == [f"blocks.{i}" for i in names]
    found = []
    for one in (model, again):
        torch.manual_seed(4)
        found.append(results(LossModel(one).train(), new_batch()) + [torch.rand(3)])
    assert all(map(torch.equal, *found))  # the random numbers after it as well
    assert list(again.state_dict()) == list(model.state_dict())
    assert [n for n, _ in again.named_modules()] == [n for n, _ in model.named_modules()]


def test_without_the_random_numbers_they_are_not():
    """The negative control: what preserve_rng_state is for."""
    model = new_model(drop_rate=0.3).train()
    plain = copy.deepcopy(model)
    for block in model.blocks:
        own = block.forward
        block.forward = lambda *args, own=own: checkpoint(
            own, *args, use_reentrant=False, preserve_rng_state=False)
    found = []
    for one in (plain, model):
        torch.manual_seed(4)
        found.append(results(LossModel(one).train(), new_batch()))
    assert torch.equal(found[0][0], found[1][0])  # the loss shows nothing
    assert not all(map(torch.equal, *found))


def test_it_keeps_less():
    model, ids = new_model(layers=6), new_batch()[0]
    plain = saved_bytes(lambda: model.features(ids), model)
    half, whole = copy.deepcopy(model), copy.deepcopy(model)
    checkpoint_activations(half, 2)
    checkpoint_activations(whole)
    kept = [saved_bytes(lambda: m.features(ids), m) for m in (whole, half)]
    assert kept[0] < 0.2 * plain and 0.5 * plain < kept[1] < 0.65 * plain


def test_twice_is_refused_and_changes_nothing():
    model = new_model()
    checkpoint_activations(model, 2)
    kinds = [type(b) for b in model.blocks]
    with pytest.raises(ValueError, match="already"):
        checkpoint_activations(model)
    assert [type(b) for b in model.blocks] == kinds


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_a_bad_every_is_refused(every):
    with pytest.raises(ValueError, match="whole number"):
        checkpoint_activations(new_model(), every)


def test_a_copy_computes_with_its_own_weights():
    model = new_model()
    checkpoint_activations(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert other(new_batch()[0]).abs().max() > 0
    assert all(isinstance(block, Recomputed) for block in other.blocks)


def test_a_cache_and_inference_take_no_part(monkeypatch):
    import gptbook.less_memory as page

    calls = []
    monkeypatch.setattr(page, "checkpoint", lambda f, *a, **k: calls.append(1) or f(*a))
    model, ids = new_model(), new_batch()[0]
    plain = copy.deepcopy(model)
    checkpoint_activations(model)
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
        torch.testing.assert_close(model(ids, cache=KVCache(model)), plain(ids))
    block, x = model.blocks[0], torch.randn(2, 5, 16, requires_grad=True)
    where = Positions(torch.arange(5)[None], aligned=True)

    class Cache:  # one that allows gradients
        def update(self, layer, k, v):
            return k, v, where

    assert torch.equal(block(x, where, Cache()), plain.blocks[0](x, where))
    assert not calls
    model(ids)
    assert len(calls) == 2


def test_frozen_embeddings_do_not_stop_the_gradient():
    model, batch = new_model(), new_batch()
    model.tok_emb.weight.requires_grad_(False)
    model.position_embedding.requires_grad_(False)
    expected = [x.clone() for x in results(LossModel(model), batch)]
    trap = copy.deepcopy(model)
    checkpoint_activations(model)
    assert all(map(torch.equal, results(LossModel(model), batch), expected))
    for block in trap.blocks:
        own = block.forward
        block.forward = lambda *args, own=own: checkpoint(own, *args, use_reentrant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LossModel(trap)(*batch).backward()
    assert trap.blocks[0].mlp.fc_in.weight.grad is None  # the negative control


def test_auxiliary_losses_reach_their_weights():
    class Balanced(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.gate, self.aux_loss = base, nn.Linear(16, 1), None

        def forward(self, x, positions):
            self.aux_loss = self.gate(x).square().mean()
            return self.base(x, positions)

    def grads(again):
        model = new_model()
        set_seed(1)
        replace_modules(model, lambda name, m: name.endswith(".mlp"),
                        lambda name, m: Balanced(m))
        if again:
            checkpoint_activations(model)
        loss = LossModel(model)(*new_batch())
        (loss + auxiliary_loss(model)).backward()
        clear_auxiliary_loss(model)
        assert auxiliary_loss(model) == 0
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, grads(False), grads(True)))


def test_both_together_in_the_loop_with_half_precision():
    runs = []
    for kind, again in ((LossModel, False), (ChunkedLoss, True)):
        model = new_model(drop_rate=0.1)
        if again:
            checkpoint_activations(model)
        runs.append(train(model, data(), None, TrainConfig(6), loss_model=kind,
                          precision=BFloat16("cpu"), progress=False).column("loss")[1])
    assert max(abs(a - b) for a, b in zip(*runs)) < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    model, batch = new_model().cuda(), tuple(x.cuda() for x in new_batch(8))
    exact = [x.clone() for x in results(LossModel(model), batch)]
    checkpoint_activations(model)
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        found = results(ChunkedLoss(model, 20), batch)
    largest = max(b.norm() for b in exact[1:])  # the bias of the keys has none but noise
    for a, b in zip(found, exact):
        assert (a - b).norm() < (0.05 if dtype else 1e-5) * max(b.norm(), 0.01 * largest)
