"""Mixed precision: what autocast leaves alone, the scaler in the loop, what stops a run."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from gptbook import training
from gptbook.checkpoints import load_state
from gptbook.core import GPTConfig, GPTModel, LossModel
from gptbook.data import TokenDataset
from gptbook.precision import BFloat16, Float16, precision_for
from gptbook.runs import NonFiniteError, TrainConfig
from gptbook.training import Precision, compute_gradients, evaluate_loss, train

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=10, learning_rate=3e-3, validate_every=5, save_every=100)
SHAPES = [(1, 3, 16, 1), (2, 8, 16, 2), (3, 5, 24, 4)]  # rows, tokens, width, heads


pytestmark = pytest.mark.usefixtures("one_thread")


def a_model(width=16, heads=2, seed=0, **sizes):
    torch.manual_seed(seed)
    return GPTModel(GPTConfig(37, 8, width, 2, heads, **sizes))


def some_data(rows=2, tokens=8):
    ids = np.random.default_rng(0).integers(0, 37, 400)
    return TokenDataset(ids, tokens, rows)


DATA = some_data()
run = partial(train, data=DATA, validation=None, config=CONFIG, progress=False)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(map(torch.equal, a.values(), b.values()))


# names -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, kind", [
    ("float32", Precision), ("bfloat16", BFloat16), ("float16", Float16)])
@pytest.mark.parametrize("device", [CPU, "cpu"])
def test_precision_for(name, kind, device):
    made = precision_for(name, device)
    assert type(made) is kind and made.name == name


@pytest.mark.parametrize("name", ["fp16", "bf16", "", None, "float64"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="is none of float32, bfloat16, float16"):
        precision_for(name, CPU)


# autocast ----------------------------------------------------------------------------

@pytest.mark.parametrize("rows, tokens, width, heads", SHAPES)
@pytest.mark.parametrize("precision", [BFloat16(CPU), Float16(CPU, 2.0**10)], ids=["bf16", "fp16"])
def test_forward_and_gradients_are_near_float32(rows, tokens, width, heads, precision):
    """Weights and gradients stay float32; values agree to what the short format keeps."""
    batch = some_data(rows, tokens).batch(0, 0)
    found = []
    for how in (Precision(), precision):
        model = a_model(width, heads)
        before = state(model)
        loss, auxiliary = compute_gradients(LossModel(model), *batch, how)
        if isinstance(how, Float16):
            how.unscale(torch.optim.SGD(model.parameters(), 0.1))
            how.adapt(True)
        assert same(before, state(model)) and auxiliary == 0
        grads = [p.grad for p in model.parameters()]
        assert all(p.dtype == g.dtype == torch.float32
                   for p, g in zip(model.parameters(), grads))
        found.append((loss, torch.cat([g.flatten() for g in grads])))
    (a, g), (b, h) = found
    assert a != b or not torch.equal(g, h), "nothing was cast: this compares a run with itself"
    eps = torch.finfo(precision.dtype).eps
    assert abs(a - b) < 4 * eps
    assert (g - h).norm() / g.norm() < 8 * eps


def test_what_is_cast():
    model, found = a_model(), {}
    for name, module in model.named_modules():
        def look(module, inputs, output, name=name):
            found[name] = output.dtype
        module.register_forward_hook(look)
    with BFloat16(CPU).autocast():
        loss = LossModel(model)(*DATA.batch(0, 0))
    assert found["blocks.0.attn.W_query"] == found["blocks.1.mlp"] == torch.bfloat16
    assert found["blocks.0"] == found["norm"] == loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_validation_computes_as_training_does(name):
    """The loss in the history is that of the same autocast, which float32 shows to differ."""
    model, precision = a_model(), precision_for(name, CPU)
    history = run(model, validation=DATA, precision=precision)
    inside = evaluate_loss(model, DATA, autocast=precision.autocast)
    assert history.column("validation_loss")[1][-1] == inside
    assert (inside == evaluate_loss(model, DATA)) == (name == "float32")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_training_follows_float32(name):
    plain = run(a_model()).column("loss")[1]
    short = run(a_model(), precision=precision_for(name, CPU)).column("loss")[1]
    torch.testing.assert_close(torch.tensor(short), torch.tensor(plain), rtol=0, atol=0.02)
    assert plain != short


# the scaler in the loop, against torch.amp.GradScaler used as its documentation says ---

def with_infinities(steps, value=math.inf):
    """`compute_gradients` that spoils a gradient at the given calls."""
    calls = iter(range(10**6))

    def gradients(loss_model, *batch):
        found = compute_gradients(loss_model, *batch)
        if next(calls) in steps:
            next(loss_model.parameters()).grad.view(-1)[3] = value
        return found

    return gradients


def by_the_manual(model, steps, infinite, init_scale, interval):
    """(scale, skipped) of each step, by scaler.step and clipping in the right place."""
    optimizer, loss_model, seen = training.make_optimizer(model, CONFIG), LossModel(model), []
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=interval)
    for step in range(steps):
        with torch.autocast("cpu", torch.float16):
            loss = loss_model(*DATA.batch(CONFIG.seed, step))
        scaler.scale(loss).backward()
        if step in infinite:
            next(model.parameters()).grad.view(-1)[3] = math.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip_norm)
        before = state(model)
        scaler.step(optimizer)
        seen.append((scaler.get_scale(), same(before, state(model))))
        scaler.update()
        optimizer.zero_grad()
    return seen


def by_the_loop(model, steps, infinite, init_scale, interval, precision=None, **kwargs):
    precision = precision or Float16(CPU, init_scale)
    precision.scaler.set_growth_interval(interval)
    scales = [init_scale]
    history = run(model, config=replace(CONFIG, steps=steps), precision=precision,
                  gradients=with_infinities(infinite),
                  callbacks=[lambda r: scales.append(precision.scaler.get_scale())], **kwargs)
    return [(scale, bool(row.get("skipped"))) for scale, row in zip(scales, history)]


@pytest.mark.parametrize("init_scale, interval, infinite", [
    (2.0**16, 2000, ()), (2.0**10, 4, (2, 3, 9)), (2.0**34, 3, (15, 17)), (1.0, 2, (0,))])
def test_the_loop_is_the_manual(init_scale, interval, infinite):
    ours, theirs = a_model(), a_model()
    steps = 24
    seen = by_the_manual(theirs, steps, infinite, init_scale, interval)
    assert by_the_loop(ours, steps, infinite, init_scale, interval) == seen
    assert same(state(ours), state(theirs))
    assert sum(skipped for _, skipped in seen) >= len(infinite)
    if infinite:  # the comparison sees one infinity more
        other = by_the_loop(a_model(), steps, (*infinite, 20), init_scale, interval)
        assert other != seen


def test_a_skipped_step_touches_nothing():
    model, seen = a_model(), []
    run(model, config=replace(CONFIG, steps=4), precision=Float16(CPU),
        gradients=with_infinities([2]),
        callbacks=[lambda r: seen.append((state(model), [
            {k: v.clone() for k, v in s.items()} for s in r.optimizer.state.values()]))])
    (w1, m1), (w2, m2), (w3, _) = seen[1:]
    assert same(w1, w2) and all(map(same, m1, m2))
    assert not same(w2, w3), "the step after it counts again"


def test_schedule_waits_for_skipped_steps():
    rates = run(a_model(), config=replace(CONFIG, steps=6), precision=Float16(CPU),
                gradients=with_infinities([0, 1, 4]), schedule=lambda step: 1 / (1 + step))
    factors = [row["learning_rate"] / CONFIG.learning_rate for row in rates]
    assert factors == pytest.approx([1, 1, 1, 1 / 2, 1 / 3, 1 / 3])


@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**16])
def test_norms_are_true(scale):
    """Clipping sees gradients without the scale; a scaler that forgets it shows."""
    plain = run(a_model()).column("gradient_norm")[1]
    short = run(a_model(), precision=Float16(CPU, scale)).column("gradient_norm")[1]
    torch.testing.assert_close(torch.tensor(short), torch.tensor(plain), rtol=0.02, atol=0)

    class ClipsFirst(Float16):
        def unscale(self, optimizer):  # too late: `update` clips before the step
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad *= scale

    wrong = run(a_model(), precision=ClipsFirst(CPU, scale)).column("gradient_norm")[1]
    assert wrong[0] == pytest.approx(scale * plain[0], rel=0.02)


def test_clipping_first():
    w = nn.Parameter(torch.zeros(4))
    w.grad = torch.full((4,), 0.01) * 2.0**16
    assert nn.utils.clip_grad_norm_([w], 1.0).item() == pytest.approx(1310.72)
    assert (w.grad / 2**16).norm().item() == pytest.approx(2**-16, rel=1e-4)


# what counts towards max_bad_steps ---------------------------------------------------

def test_a_scale_that_is_too_large_is_harmless():
    config = replace(CONFIG, steps=30, max_bad_steps=2)
    history = run(a_model(), config=config, precision=Float16(CPU, 2.0**36))
    skipped = sum(row.get("skipped", 0) for row in history)
    assert 5 < skipped < 30 and not history[-1].get("skipped")


def test_the_same_overflow_stops_a_run_whose_precision_does_not_adapt():
    class Stubborn(Float16):
        def adapt(self, good):
            super().adapt(good)
            return False

    with pytest.raises(NonFiniteError, match="in 5 steps in a row, 1 to 5"):
        run(a_model(), precision=Stubborn(CPU, 2.0**36))


@pytest.mark.parametrize("scale, harmless", [(1.0, 0), (2.0, 1), (2.0**4, 4), (2.0**-3, 0)])
def test_gradients_that_stay_infinite_stop_the_run_below_a_scale_of_one(scale, harmless):
    """Halvings down to 1 are forgiven, then `max_bad_steps` steps are the end."""
    model, last = a_model(), harmless + CONFIG.max_bad_steps
    before = state(model)
    with pytest.raises(NonFiniteError, match=f"{harmless + 1} to {last};"):
        run(model, config=replace(CONFIG, steps=40), precision=Float16(CPU, scale),
            gradients=with_infinities(range(40), math.nan))
    assert same(before, state(model))


@pytest.mark.parametrize("where", ["weights", "loss"])
def test_a_loss_that_is_not_finite_is_never_the_scale(where):
    """The scale enters after the loss: such steps count from the first one on."""
    model = a_model()
    if where == "weights":
        with torch.no_grad():
            model.blocks[1].mlp.fc_out.weight[0, 0] = math.nan

    def loss_model(model):
        inner = LossModel(model)
        if where == "loss":  # finite gradients: the scaler alone would see nothing
            inner.register_forward_hook(lambda m, args, out: out + math.inf)
        return inner

    named = "the weights blocks.1.mlp.fc_out" if where == "weights" else "1 to 5"
    with pytest.raises(NonFiniteError, match=named):
        run(model, config=replace(CONFIG, steps=40), precision=Float16(CPU),
            loss_model=loss_model)


def test_adapt_by_hand():
    """Each row: what went in, whether the step is forgiven, the scale after it."""
    w = nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([w], 0.1)
    precision = Float16(CPU, 4.0)
    for grad, loss, forgiven, scale in [
        (1.0, 1.0, False, 4.0), (math.inf, 1.0, True, 2.0), (math.nan, 1.0, True, 1.0),
        (math.inf, 1.0, False, 0.5), (1.0, 1.0, False, 0.5), (1.0, math.inf, False, 0.5),
        (1.0, math.nan, False, 0.5),
    ]:
        w.grad = None
        precision.backward(w.sum() * 0 + torch.tensor(loss))
        w.grad = torch.tensor([grad])
        precision.unscale(sgd)
        assert precision.adapt(math.isfinite(grad) and math.isfinite(loss)) is forgiven
        assert precision.scaler.get_scale() == scale


def test_one_bad_loss_of_several_micro_batches_counts():
    w = nn.Parameter(torch.ones(1))
    precision = Float16(CPU, 2.0**10)
    for loss in (math.nan, 1.0):  # the good one comes last
        precision.backward(w.sum() * loss)
    precision.unscale(torch.optim.SGD([w], 0.1))
    assert precision.adapt(False) is False
    w.grad = None
    precision.backward(w.sum())
    w.grad = torch.tensor([math.inf])
    precision.unscale(torch.optim.SGD([w], 0.1))
    assert precision.adapt(False) is True, "the next step starts afresh"


def test_weights_in_float16_are_refused():
    with pytest.raises(ValueError, match="FP16 gradients"):
        run(a_model().half(), precision=Float16(CPU))


# checkpoints -------------------------------------------------------------------------

def interrupted(folder, scaler_state_is_lost=False, stop_at=9):
    infinite, steps = (2, 5, 14), 20

    class Forgetful(Float16):
        def load_state_dict(self, state):
            pass

    def spoil(first):  # the calls begin again when a run is resumed
        return [step - first for step in infinite if step >= first]

    model = a_model(drop_rate=0.1)
    stop = lambda r: setattr(r, "stopping", r.step == stop_at)
    config = replace(CONFIG, steps=steps)
    precision = Float16(CPU, 2.0**10)
    precision.scaler.set_growth_interval(4)
    run(model, config=config, out=folder, precision=precision, callbacks=[stop],
        gradients=with_infinities(spoil(0)))
    kind = Forgetful if scaler_state_is_lost else Float16
    other, precision = a_model(seed=5, drop_rate=0.1), kind(CPU, 2.0**10)
    precision.scaler.set_growth_interval(4)
    history = run(other, config=config, out=folder, precision=precision, resume=True,
                  gradients=with_infinities(spoil(stop_at)))
    return other, history, precision.state_dict()


def straight():
    model, precision = a_model(drop_rate=0.1), Float16(CPU, 2.0**10)
    precision.scaler.set_growth_interval(4)
    history = run(model, config=replace(CONFIG, steps=20), precision=precision,
                  gradients=with_infinities((2, 5, 14)))
    return model, history, precision.state_dict()


def numbers(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("stop_at", [1, 3, 9, 19])
def test_resume_is_bit_identical(tmp_path, stop_at):
    (a, h, s), (b, i, t) = straight(), interrupted(tmp_path, stop_at=stop_at)
    assert same(state(a), state(b)) and numbers(h) == numbers(i) and s == t
    stored = load_state(tmp_path / "state")["parts"]["precision"]
    assert stored["scale"] == s["scale"] and stored["_growth_tracker"] == s["_growth_tracker"]


def test_without_the_scalers_state_it_is_another_run(tmp_path):
    (_, _, s), (_, _, t) = straight(), interrupted(tmp_path, scaler_state_is_lost=True)
    assert s != t


def test_a_lost_scale_changes_the_weights(tmp_path):
    """A search that begins anew skips other steps, and so trains other weights."""
    def resumed(kind, folder):
        stop = lambda r: setattr(r, "stopping", r.step == 16)
        config = replace(CONFIG, steps=20)
        run(a_model(), config=config, out=folder, callbacks=[stop], precision=Float16(CPU, 2.0**36))
        other = a_model(seed=5)
        run(other, config=config, out=folder, precision=kind(CPU, 2.0**36), resume=True)
        return state(other)

    class Forgetful(Float16):
        def load_state_dict(self, state):
            pass

    run(whole := a_model(), config=replace(CONFIG, steps=20), precision=Float16(CPU, 2.0**36))
    assert same(state(whole), resumed(Float16, tmp_path / "kept"))
    assert not same(state(whole), resumed(Forgetful, tmp_path / "lost"))


def test_a_run_in_another_precision_is_not_resumed(tmp_path):
    stop = lambda r: setattr(r, "stopping", r.step == 2)
    run(a_model(), out=tmp_path, precision=Float16(CPU), callbacks=[stop])
    with pytest.raises(ValueError, match="precision is bfloat16, in the saved run float16"):
        run(a_model(), out=tmp_path, precision=BFloat16(CPU), resume=True)


# CUDA, where there is one ------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_on_a_gpu(name):
    gpu = torch.device("cuda")
    plain = run(a_model().to(gpu)).column("loss")[1]
    short = run(a_model().to(gpu), precision=precision_for(name, gpu)).column("loss")[1]
    torch.testing.assert_close(torch.tensor(short), torch.tensor(plain), rtol=0, atol=0.02)


# the page's own arithmetic -----------------------------------------------------------

@pytest.mark.parametrize("dtype, exponent, p", [
    (torch.float32, 8, 23), (torch.bfloat16, 8, 7), (torch.float16, 5, 10)])
def test_limits(dtype, exponent, p):
    b, known = 2 ** (exponent - 1) - 1, torch.finfo(dtype)
    assert (2 - 2**-p) * 2.0**b == known.max and 2.0**-p == known.eps
    assert 2.0 ** (1 - b) == known.tiny
    assert torch.tensor(2.0 ** (1 - b - p), dtype=torch.float64).to(dtype) > 0
    assert torch.tensor(2.0 ** (-b - p), dtype=torch.float64).to(dtype) == 0
