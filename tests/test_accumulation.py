"""A batch in pieces has the gradient of the whole: ragged, masked, partial, in half precision,
in a run that is resumed, and in two processes."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.testing import assert_close

from gptbook.accumulation import Accumulate, accumulate_gradients, cut_batch, without_sync
from gptbook.core import GPTConfig, GPTModel, LossModel, init_weights, set_seed
from gptbook.data import TokenDataset
from gptbook.precision import BFloat16, Float16
from gptbook.presets import PRESETS
from gptbook.training import TrainConfig, compute_gradients, train

VOCAB, CPU = 61, torch.device("cpu")
SHAPES = [(1, 1, 1), (2, 7, 1), (5, 12, 2), (6, 12, 4), (7, 16, 3), (4, 16, 4), (3, 9, 8)]


def new_model(dtype=torch.float32, seed=0, **options):
    set_seed(seed)
    model = GPTModel(GPTConfig(VOCAB, 16, 24, 2, 2, **options))
    init_weights(model, 0.3)
    return LossModel(model.to(dtype))


def ragged(rows, length, seed=0, masked=0.2):
    """Inputs and targets: rows of random lengths, with holes; one row asks nothing."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, length + 1), generator=rng)
    targets = ids[:, 1:].clone()
    lengths = torch.randint(1, length + 1, (rows,), generator=rng)
    lengths[rows // 2] = length
    targets[torch.arange(length) >= lengths[:, None]] = -100
    targets[torch.rand(rows, length, generator=rng) < masked] = -100
    targets[rows // 2, -1] = 3  # something is asked
    if rows > 2:
        targets[0] = -100
    return ids[:, :-1], targets


def found(loss_model, way, *args, **options):
    """(loss, auxiliary) and {name: gradient} of one way to compute them."""
    loss_model.zero_grad()
    numbers = way(loss_model, *args, **options)
    return numbers, {name: p.grad.clone() for name, p in loss_model.named_parameters()}


def oracle(loss_model, input_ids, targets):
    """The sum of token losses over their number, in float64, from the formula."""
    loss_model.double().zero_grad()
    at = torch.nonzero(targets != -100)
    logp = loss_model.model(input_ids).log_softmax(-1)
    losses = torch.stack([-logp[b, t, targets[b, t]] for b, t in at])
    (losses.sum() / len(losses)).backward()
    grads = {name: p.grad.clone() for name, p in loss_model.named_parameters()}
    return losses.mean().item(), grads


def apart(one, other):
    """The largest difference of two sets of gradients, beside 1 or their largest entry."""
    size = max(1.0, *(g.abs().max().item() for g in other.values()))
    return max((one[name] - other[name]).abs().max().item() for name in other) / size


def mean_of_means(loss_model, batches):
    for batch in batches:
        (loss_model(*batch) / len(batches)).backward()
    return 0.0, 0.0


# Equal to the whole ------------------------------------------------------------------
@pytest.mark.parametrize("rows, length, piece", SHAPES)
@pytest.mark.parametrize("trim", [True, False])
def test_pieces_have_the_gradient_of_the_whole(rows, length, piece, trim):
    batch = ragged(rows, length, seed=rows)
    (loss, auxiliary), grads = found(new_model(), Accumulate(piece, trim), *batch)
    (whole, _), same = found(new_model(), compute_gradients, *batch)
    expected, exact = oracle(new_model(), *batch)
    assert auxiliary == 0.0 and abs(loss - whole) < 1e-5 and abs(loss - expected) < 1e-5
    assert apart(grads, same) < 1e-6
    assert apart({n: g.double() for n, g in grads.items()}, exact) < 1e-6


@pytest.mark.parametrize("rows, length, piece", SHAPES)
def test_in_float64_to_twelve_digits(rows, length, piece):
    class Exact(LossModel):  # LossModel computes its loss in float32
        def forward(self, input_ids, targets):
            logits = self.model(input_ids)
            total = F.cross_entropy(logits.mT, targets, reduction="sum")
            return total / (targets != -100).sum().clamp(min=1)

    batch = ragged(rows, length, seed=rows + 50)
    model = Exact(new_model(torch.float64).model)
    (loss, _), grads = found(model, Accumulate(piece), *batch)
    expected, exact = oracle(new_model(), *batch)
    assert abs(loss - expected) < 1e-12 and apart(grads, exact) < 1e-12
    model.zero_grad()  # and torch's own mean over the whole batch
    F.cross_entropy(model.model(batch[0]).mT, batch[1]).backward()
    assert apart({n: p.grad for n, p in model.named_parameters()}, grads) < 1e-12


def test_batches_of_different_shapes_and_a_last_one_that_is_partial():
    batches = [ragged(4, 16, 1), ragged(4, 9, 2), ragged(4, 12, 3), ragged(1, 5, 4)]
    width = max(x.shape[1] for x, _ in batches)
    whole = [torch.cat([F.pad(y[i], (0, width - y[i].shape[1]), value=(0, -100)[i])
                        for y in batches]) for i in (0, 1)]
    (loss, _), grads = found(new_model(), accumulate_gradients, iter(batches))
    expected, exact = oracle(new_model(), *whole)
    assert abs(loss - expected) < 1e-5
    assert apart({n: g.double() for n, g in grads.items()}, exact) < 1e-6


def test_the_usual_mistakes_are_seen():
    batches = [ragged(4, 16, 1), ragged(4, 9, 2), ragged(4, 12, 3), ragged(1, 5, 4)]
    _, right = found(new_model(), accumulate_gradients, batches)
    _, means = found(new_model(), mean_of_means, batches)
    _, eight = found(new_model(), accumulate_gradients, batches, tokens=500)
    assert apart(means, right) > 1e-3 and apart(eight, right) > 1e-3


def test_it_adds_to_the_gradients_that_are_there():
    batch, model = ragged(5, 12), new_model()
    _, once = found(model, Accumulate(2), *batch)
    Accumulate(3)(model, *batch)
    for name, p in model.named_parameters():
        assert_close(p.grad, 2 * once[name], rtol=1e-5, atol=1e-6)


def test_tokens_says_what_to_divide_by():
    batch = ragged(5, 12)
    n = (batch[1] != -100).sum().item()
    (loss, _), grads = found(new_model(), accumulate_gradients, [batch])
    (half, _), halves = found(new_model(), accumulate_gradients, [batch], tokens=2 * n)
    assert abs(half - loss / 2) < 1e-6
    assert apart({name: 2 * g for name, g in halves.items()}, grads) < 1e-6


# Nothing is asked --------------------------------------------------------------------
class PlainMean(LossModel):
    """As torch has it: the mean over nothing is NaN, its gradient is zero."""

    def forward(self, input_ids, targets):
        return F.cross_entropy(self.model(input_ids).mT, targets)


class MaskedMean(LossModel):
    """The losses times a mask, over the mask's sum: its gradient is NaN too."""

    def forward(self, input_ids, targets):
        mask = targets != -100
        losses = F.cross_entropy(self.model(input_ids).mT, targets.clamp(0), reduction="none")
        return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", [LossModel, PlainMean, MaskedMean])
def test_a_piece_without_targets_does_no_harm(kind):
    input_ids, targets = ragged(6, 12)
    targets[2:4] = -100
    model = kind(new_model().model)
    (loss, _), grads = found(model, Accumulate(2, trim=False), input_ids, targets)
    (expected, _), same = found(new_model(), compute_gradients, input_ids, targets)
    assert abs(loss - expected) < 1e-5 and apart(grads, same) < 1e-6
    if kind is not LossModel:  # the piece would have done harm
        pieces = cut_batch(input_ids, targets, 2, trim=False)
        assert kind(model.model)(*pieces[1]).isnan()
    if kind is MaskedMean:
        _, bad = found(model, mean_of_means, pieces)
        assert all(g.isnan().any() for g in bad.values())


def test_a_batch_without_targets_is_zero_like_the_whole():
    input_ids, targets = ragged(4, 8)
    for way in (Accumulate(1), Accumulate(3, trim=False), compute_gradients):
        (loss, auxiliary), grads = found(
            new_model(), way, input_ids, torch.full_like(targets, -100))
        assert (loss, auxiliary) == (0.0, 0.0)
        assert all((g == 0).all() for g in grads.values())


# Cutting -----------------------------------------------------------------------------
@pytest.mark.parametrize("rows, length, piece", SHAPES)
def test_a_cut_loses_no_target_and_no_context(rows, length, piece):
    input_ids, targets = ragged(rows, length, seed=7)
    pieces, plain = (cut_batch(input_ids, targets, piece, trim) for trim in (True, False))
    def asked(pieces):  # each target with all that its model sees
        return sorted((x[: t + 1].tolist(), y[t].item()) for xs, ys in pieces
                      for x, y in zip(xs, ys) for t in torch.nonzero(y != -100).flatten())
    assert asked(pieces) == asked(plain) == asked([(input_ids, targets)])
    widths = [x.shape[1] for x, _ in pieces]
    assert widths == sorted(widths, reverse=True) and widths[-1] >= 1
    for _, y in pieces:
        assert (y[:, -1] != -100).any() or y.shape[1] == 1
    assert [len(x) for x, _ in pieces] == [len(x) for x, _ in plain]


def test_padding_on_the_left_stays():
    targets = torch.tensor([[-100, -100, 5, 6], [-100, 1, 2, -100]])
    (one, two) = cut_batch(torch.arange(8).view(2, 4), targets, 1)
    assert one[1].tolist() == [[-100, -100, 5, 6]] and two[0].tolist() == [[4, 5, 6]]


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 5\)"):
        cut_batch(torch.zeros(2, 6), torch.zeros(2, 5), 1)
    with pytest.raises(ValueError, match="0 batches"):
        accumulate_gradients(new_model(), [])
    for rows in (0, -1, 2.0, True, None, "2"):
        with pytest.raises(ValueError, match="whole number >= 1"):
            Accumulate(rows)


def test_embeddings_can_be_cut_too():
    model = new_model()
    input_ids, targets = ragged(5, 12)
    vectors = model.model.tok_emb(input_ids).detach()
    (loss, _), _ = found(model, Accumulate(2), vectors, targets)
    assert abs(loss - compute_gradients(model, input_ids, targets)[0]) < 1e-5


# Auxiliary losses --------------------------------------------------------------------
class Watched(nn.Module):
    """Passes through; leaves a mean square of its input, or the square of that."""

    def __init__(self, power):
        super().__init__()
        self.power, self.aux_loss = power, None

    def forward(self, x):
        self.aux_loss = x[..., :2].square().mean() ** self.power
        return x


def watched(power):
    model = new_model()
    model.model.blocks[0].mlp = nn.Sequential()
    model.model.blocks[0].mlp.forward = lambda x, positions: part(x)
    model.model.blocks[0].mlp.part = part = Watched(power)
    return model


def even(rows=6, length=12):
    ids = torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("piece", [1, 2, 4])
def test_an_auxiliary_mean_over_tokens_is_that_of_the_whole(piece):
    model = watched(1)
    (_, auxiliary), grads = found(model, Accumulate(piece), *even())
    assert model.model.blocks[0].mlp.part.aux_loss is None, "it is forgotten"
    (_, expected), same = found(watched(1), compute_gradients, *even())
    assert expected > 0.1 and abs(auxiliary - expected) < 1e-5
    assert apart(grads, same) < 1e-6


def test_an_auxiliary_loss_that_is_no_mean_is_the_mean_of_its_pieces():
    batch = even()
    (_, auxiliary), _ = found(watched(2), Accumulate(2), *batch)
    (_, whole), _ = found(watched(2), compute_gradients, *batch)
    pieces = [found(watched(2), compute_gradients, *piece)[0][1]
              for piece in cut_batch(*batch, 2)]
    assert abs(auxiliary - sum(pieces) / 3) < 1e-5 and auxiliary - whole > 1e-4


def test_auxiliary_losses_of_unequal_pieces_weigh_as_their_tokens():
    input_ids, targets = even(3)
    targets[1:, 4:] = -100
    (_, auxiliary), _ = found(watched(1), Accumulate(1), input_ids, targets)
    parts = [found(watched(1), compute_gradients, *piece)[0][1]
             for piece in cut_batch(input_ids, targets, 1)]
    assert abs(auxiliary - (12 * parts[0] + 4 * parts[1] + 4 * parts[2]) / 20) < 1e-5
    assert abs(auxiliary - sum(parts) / 3) > 1e-3


# Precision ---------------------------------------------------------------------------
@pytest.mark.parametrize("make", [BFloat16, Float16, partial(Float16, init_scale=4.0)])
def test_half_precision(make):
    batch, precision = ragged(6, 12), make(CPU)
    model = new_model()
    (loss, _), grads = found(model, Accumulate(2), *batch, precision)
    scale = precision.scaler.get_scale() if hasattr(precision, "scaler") else 1.0
    (expected, _), same = found(new_model(), compute_gradients, *batch)
    assert abs(loss - expected) < 0.03
    for name, g in same.items():  # bfloat16 has eight bits: 0.4 % for each rounding
        assert (grads[name] / scale - g).norm() < 0.06 * g.norm() + 1e-3, name
    assert apart({name: g / scale for name, g in grads.items()}, same) > 1e-4, "it is half"


def test_float16_in_a_run():
    histories = [
        train(new_model().model, dataset(), None, TrainConfig(4, 1e-3), progress=False,
              precision=Float16(CPU, init_scale=2.0**10), gradients=way)
        for way in (compute_gradients, Accumulate(2), Accumulate(1))]
    norms = [h.column("gradient_norm")[1] for h in histories]
    assert all(len(n) == 4 for n in norms) and not histories[1].column("skipped")[0]
    assert_close(norms[1], norms[0], rtol=0.02, atol=0)
    assert_close(norms[2], norms[0], rtol=0.02, atol=0)


# In the loop -------------------------------------------------------------------------
def dataset(rows=5):
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (900,), generator=rng)
    ids[torch.rand(900, generator=rng) < 0.1] = 0
    return TokenDataset(ids.numpy(), 16, rows, document_end=0)


def losses(steps=8, model=None, **options):
    history = train((model or new_model()).model, dataset(), None,
                    TrainConfig(steps, 3e-3, save_every=4), progress=False, **options)
    return history.column("loss")[1]


def test_a_run_in_pieces_is_the_same_run():
    whole = losses()
    for rows in (1, 2, 3, 5, 9):
        assert_close(losses(gradients=Accumulate(rows)), whole, rtol=0, atol=3e-5)

    def wrong(loss_model, input_ids, targets, precision):
        pieces = cut_batch(input_ids, targets, 1)
        mean_of_means(loss_model, [piece for piece in pieces if (piece[1] != -100).any()])
        return 1.0, 0.0

    a, b = new_model(), new_model()
    losses(gradients=wrong, model=a), losses(model=b)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (a, b)]
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_a_run_is_resumed_with_another_number_of_pieces(tmp_path):
    def stop(run):
        run.stopping = run.step == 4

    whole = losses()
    losses(out=tmp_path, gradients=Accumulate(5), callbacks=(stop,))
    resumed = losses(out=tmp_path, gradients=Accumulate(1), resume=True)
    assert len(resumed) == 8 and max(map(abs, map(float.__sub__, resumed, whole))) < 3e-5


def test_the_default_trains_with_as_many_rows_as_the_page_says():
    assert PRESETS["small"].batch_size == 5


def test_dropout_draws_other_masks_in_pieces():
    batch = even()
    for rate, differs in ((0.0, False), (0.3, True)):
        grads = []
        for way in (compute_gradients, Accumulate(2)):
            model = new_model(drop_rate=rate)
            torch.manual_seed(5)
            grads.append(found(model.train(), way, *batch)[1])
        assert (apart(*grads) > 1e-3) == differs


# Several processes -------------------------------------------------------------------
class Counting(LossModel):
    """Notes for each forward pass whether it was inside `no_sync`."""

    local, passes = False, ()

    @contextmanager
    def no_sync(self):
        self.local = True
        yield
        self.local = False

    def forward(self, *batch):
        self.passes = (*self.passes, self.local)
        return super().forward(*batch)


def test_only_the_last_piece_that_asks_synchronises():
    model = Counting(new_model().model)
    input_ids, targets = ragged(5, 12)  # its first row asks nothing
    Accumulate(1, trim=False)(model, input_ids, targets)
    assert model.passes == (True, True, True, False)
    model.passes = ()
    Accumulate(1)(model, input_ids[:1], targets[:1])  # nothing at all: the others wait
    assert model.passes == (False,)
    with without_sync(new_model()):
        pass  # a module of one process has nothing to hold back


def share_of(rank):
    """Ragged rows of one process: the second has fewer tokens, and an empty last piece."""
    return [(x, y) if i < 3 - rank else (x, torch.full_like(y, -100))
            for i, (x, y) in enumerate(ragged(2, 12 - 4 * rank, 10 * rank + i) for i in range(3))]


def always_syncing(ddp, batches, tokens):
    for batch in batches:
        n = (batch[1] != -100).sum().item()
        (ddp(*batch) * n / tokens).backward()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    ddp = nn.parallel.DistributedDataParallel(new_model())
    calls = []

    def count(state, bucket):
        calls.append(1)
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, count)
    batches = share_of(rank)
    tokens = torch.tensor(float(sum((y != -100).sum() for _, y in batches)))
    dist.all_reduce(tokens)
    saved = {}
    for name, way in (("ours", accumulate_gradients), ("always", always_syncing)):
        for _ in range(2):  # buckets are built anew after the first
            ddp.zero_grad()
            calls.clear()
            way(ddp, batches, tokens=tokens.item() / 2)  # the mean over two processes
        grads = {n.removeprefix("module."): p.grad.clone() for n, p in ddp.named_parameters()}
        saved[name] = len(calls), grads
    mute = [(x, torch.full_like(y, -100) if rank else y) for x, y in batches]
    n = sum((y != -100).sum().item() for _, y in share_of(0))
    for name, some, count in (("own", batches, None), ("mute", mute, n / 2)):
        ddp.zero_grad()
        accumulate_gradients(ddp, some, tokens=count)
        saved[name] = 0, {n.removeprefix("module."): p.grad.clone()
                          for n, p in ddp.named_parameters()}
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    _, first = found(new_model(), accumulate_gradients, share_of(0))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    _, alone = found(new_model(), accumulate_gradients, share_of(0) + share_of(1))
    for result in results:
        assert apart(result["ours"][1], alone) < 1e-6
        assert apart(result["always"][1], alone) < 1e-6, "the same gradients ..."
        assert result["always"][0] == 3 * result["ours"][0], "... by more reductions"
        assert result["ours"][0] >= 1
        assert apart(result["own"][1], alone) > 1e-3, "tokens= is needed here"
        assert apart(result["mute"][1], first) < 1e-6, "a process with nothing to ask"
