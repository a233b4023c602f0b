"""Schedules: closed forms against torch's schedulers, shapes of the curves, errors."""
import math
import random
from copy import copy, deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset
from gptbook.runs import TrainConfig
from gptbook.schedules import (constant, cosine, linear, one_cycle, warmup, warmup_cosine,
                               warmup_stable_decay)
from gptbook.training import compute_gradients, train

rate = torch.optim.lr_scheduler


def torch_rates(make, steps):
    """The rate that each of `steps` updates used under one of torch's schedulers."""
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, used = make(adamw), []
    for _ in range(steps):
        used.append(adamw.param_groups[0]["lr"])
        adamw.step()
        scheduler.step()
    return used


def worst(ours, theirs):
    return max(abs(ours(s) - r) for s, r in enumerate(theirs))


@pytest.mark.parametrize("W", [2, 7, 50, 300])
def test_warmup_is_linear_lr(W):
    make = lambda o: rate.LinearLR(o, 1 / W, 1.0, total_iters=W - 1)
    assert worst(warmup(W), torch_rates(make, 200)) < 1e-12
    late = lambda o: rate.LinearLR(o, 1 / W, 1.0, total_iters=W)   # the fence post
    assert worst(warmup(W), torch_rates(late, 200)) > 1e-4


@pytest.mark.parametrize("steps, floor", [(1, 0.0), (10, 0.0), (237, 0.1), (500, 1.0)])
def test_cosine_is_cosine_annealing(steps, floor):
    make = lambda o: rate.CosineAnnealingLR(o, steps, floor)
    assert worst(cosine(steps, floor), torch_rates(make, steps)) < 1e-11


@pytest.mark.parametrize("steps, floor", [(1, 0.0), (10, 0.0), (237, 0.1), (500, 1.0)])
def test_linear_is_linear_lr(steps, floor):
    make = lambda o: rate.LinearLR(o, 1.0, floor, total_iters=steps)
    assert worst(linear(steps, floor), torch_rates(make, steps + 5)) < 1e-12


def test_constant_is_constant_lr():
    assert worst(constant(), torch_rates(lambda o: rate.ConstantLR(o, 1.0), 50)) == 0


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("S, W, D, floor", [
    (100, 10, 20, 0.0), (57, 2, 55, 0.1), (300, 7, 1, 0.5), (40, 20, 20, 0.0)])
def test_warmup_stable_decay_is_torchs_sequence(S, W, D, floor, shape):
    fall = {"linear": lambda o, n: rate.LinearLR(o, 1.0, floor, total_iters=n),
            "cosine": lambda o, n: rate.CosineAnnealingLR(o, n, floor)}[shape]

    def make(o, late=0):
        climb = rate.LinearLR(o, 1 / W, 1.0, total_iters=W - 1)
        parts, ends = [climb, rate.ConstantLR(o, 1.0), fall(o, D)], [W, S - D + late]
        if W == S - D:
            del parts[1], ends[1]
        return rate.SequentialLR(o, parts, milestones=ends)
    ours = warmup_stable_decay(S, W, D, floor, {"linear": linear, "cosine": cosine}[shape])
    assert worst(ours, torch_rates(make, S)) < 1e-12
    if W < S - D and D > 1:
        assert worst(ours, torch_rates(lambda o: make(o, 1), S)) > 1e-4  # the fence post


@pytest.mark.parametrize("S", [1, 2, 3, 7, 10, 100, 333])
@pytest.mark.parametrize("climb", [0.0, 0.25, 0.3, 0.77])
@pytest.mark.parametrize("first, final", [(25.0, 1e4), (10.0, 100.0), (1.0, 1.0)])
def test_one_cycle_is_one_cycle_lr(S, climb, first, final):
    make = lambda o: rate.OneCycleLR(o, 1.0, total_steps=S, pct_start=climb,
                                     div_factor=first, final_div_factor=final)
    ours = one_cycle(S, climb, 1 / first, 1 / first / final)
    assert worst(ours, torch_rates(make, S)) < 1e-12
    if S > 10 and final > 1:   # three phases are another curve; so is an end below the peak
        other = lambda o: rate.OneCycleLR(o, 1.0, total_steps=S, three_phase=True)
        assert worst(ours, torch_rates(other, S)) > 0.01
        assert abs(ours(S - 1) - 1 / final) > 1e-5


def test_one_cycle_defaults_are_torchs_and_it_stays_at_its_end():
    make = lambda o: rate.OneCycleLR(o, 1.0, total_steps=90)
    assert worst(one_cycle(90), torch_rates(make, 90)) < 1e-12
    assert one_cycle(90)(89) == one_cycle(90)(90) == one_cycle(90)(10**6) == 4e-6
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    torchs = make(adamw)
    for _ in range(90):
        adamw.step()
        torchs.step()
    assert adamw.param_groups[0]["lr"] > 100 * 4e-6, "torch climbs again"
    with pytest.raises(ValueError, match="Tried to step 91 times"):
        torchs.step()


def test_one_cycle_where_torch_divides_by_zero():
    with pytest.raises(ZeroDivisionError):   # the climb ends at step 0
        rate.OneCycleLR(torch.optim.SGD([torch.zeros(1)], 1.0, 0.9), 1.0, total_steps=2,
                        pct_start=0.5)
    assert [one_cycle(2, 0.5)(s) for s in range(4)] == [1.0, 4e-6, 4e-6, 4e-6]
    assert one_cycle(10, 1.0)(9) == 1.0 and one_cycle(1, 1.0)(0) == 1.0


def test_one_cycle_lr_replaces_beta_1():
    adamw = torch.optim.AdamW([torch.zeros(1)], lr=1.0, betas=(0.9, 0.95))
    rate.OneCycleLR(adamw, 1.0, total_steps=10)
    assert adamw.param_groups[0]["betas"] == (0.95, 0.95)


@pytest.mark.parametrize("steps, W, floor", [(100, 10, 0.1), (57, 2, 0.0), (300, 299, 0.5)])
def test_warmup_cosine_is_torchs_sequence(steps, W, floor):
    def make(o):
        climb = rate.LinearLR(o, 1 / W, 1.0, total_iters=W - 1)
        fall = rate.CosineAnnealingLR(o, steps - W, floor)
        return rate.SequentialLR(o, [climb, fall], milestones=[W])
    assert worst(warmup_cosine(steps, W, floor), torch_rates(make, steps)) < 1e-11


@pytest.mark.parametrize("steps, W, floor", [(100, 10, 0.1), (57, 1, 0.0), (300, 299, 0.5)])
def test_warmup_cosine_is_its_two_parts(steps, W, floor):
    curve = warmup_cosine(steps, W, floor)
    parts = [warmup(W)(s) for s in range(W)]
    parts += torch_rates(lambda o: rate.CosineAnnealingLR(o, steps - W, floor), steps - W)
    assert worst(curve, parts) < 1e-11


def test_ends():
    curve = warmup_cosine(1000, 100, 0.1)
    assert curve(0) == 0.01 and curve(99) == 1.0 and curve(100) == 1.0
    assert math.isclose(curve(550), 0.55)
    assert curve(999) > 0.1 and curve(1000) == pytest.approx(0.1)
    assert curve(5000) == pytest.approx(0.1), "past the end it stays at the floor"
    assert warmup_cosine(10, 0)(0) == 1.0 and warmup(0)(0) == 1.0
    assert {constant()(s) for s in (0, 1, 10**9)} == {1.0}


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 200), st.data())
def test_stable_decay_has_three_parts(S, data):
    W = data.draw(st.integers(0, S - 1))
    D = data.draw(st.integers(1, S - W))
    floor = data.draw(st.floats(0, 1))
    curve, fall = warmup_stable_decay(S, W, D, floor), linear(D, floor)
    assert [curve(s) for s in range(S - D)] == [warmup(W)(s) for s in range(S - D)]
    assert [curve(s) for s in range(S - D, S + 3)] == [fall(s) for s in range(D + 3)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_one_cycle_climbs_then_falls(S, climb, start, end):
    f = [one_cycle(S, climb, start, end)(s) for s in range(S)]
    top = f.index(max(f))
    assert all(-1e-12 <= x <= 1 + 1e-12 for x in f)
    assert all(a <= b + 1e-12 for a, b in zip(f[:top], f[1:top + 1]))
    assert all(a >= b - 1e-12 for a, b in zip(f[top:], f[top + 1:]))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 400), st.data())
def test_every_curve_climbs_then_falls_between_floor_and_one(steps, data):
    W = data.draw(st.integers(0, steps - 1))
    floor = data.draw(st.floats(0, 1))
    curve = warmup_cosine(steps, W, floor)
    f = [curve(s) for s in range(steps + 3)]
    assert all(0 < x <= 1 + 1e-12 for x in f[:-3]) and f[0] > 0
    assert f[:W] == sorted(f[:W])
    assert all(a >= b - 1e-12 for a, b in zip(f[W:], f[W + 1:]))
    assert all(x >= floor - 1e-12 for x in f[W:])
    order = data.draw(st.permutations(range(steps)))
    assert [curve(s) for s in order] == [f[s] for s in order], "no memory"


@pytest.mark.parametrize("make, names", [
    (lambda: warmup(-1), ("warmup_steps=-1", "0")),
    (lambda: warmup(2.5), ("warmup_steps=2.5", "0")),
    (lambda: warmup(True), ("warmup_steps=True", "0")),
    (lambda: cosine(0), ("steps=0", "1")),
    (lambda: cosine(10, -0.1), ("floor=-0.1", "[0, 1]")),
    (lambda: cosine(10, 1.1), ("floor=1.1", "[0, 1]")),
    (lambda: cosine(10, math.nan), ("floor=nan", "[0, 1]")),
    (lambda: warmup_cosine(10, 10), ("warmup_steps=10", "steps=10")),
    (lambda: warmup_cosine(10, 11), ("warmup_steps=11", "steps=10")),
    (lambda: linear(0), ("steps=0", "1")),
    (lambda: linear(10, 2), ("floor=2", "[0, 1]")),
    (lambda: warmup_stable_decay(10, 4, 7), ("warmup_steps=4", "decay_steps=7", "steps=10")),
    (lambda: warmup_stable_decay(10, 4, 0), ("decay_steps=0", "1")),
    (lambda: warmup_stable_decay(10, 4, 2.0), ("decay_steps=2.0", "1")),
    (lambda: warmup_stable_decay(10, 10, 1), ("warmup_steps=10", "steps=10")),
    (lambda: one_cycle(0), ("steps=0", "1")),
    (lambda: one_cycle(10, 1.5), ("climb=1.5", "[0, 1]")),
    (lambda: one_cycle(10, 0.3, 25), ("start=25", "[0, 1]")),
    (lambda: one_cycle(10, end=-0.1), ("end=-0.1", "[0, 1]")),
])
def test_errors_name_both_values(make, names):
    with pytest.raises(ValueError) as error:
        make()
    assert all(name in str(error.value) for name in names)


# In the loop -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data():
    draw = random.Random(0)
    return TokenDataset(torch.tensor([draw.randrange(20) for _ in range(600)]), 8, 2)


def tiny():
    set_seed(0)
    model = GPTModel(GPTConfig(20, 8, 8, n_layers=1, n_heads=1))
    init_weights(model, 0.2)
    return model


def skipping(bad, how):
    """A `gradients` whose batches of these numbers have a loss or gradients that are bad."""
    calls = iter(range(10**6))

    def gradients(loss_model, *batch):
        loss, auxiliary = compute_gradients(loss_model, *batch)
        if next(calls) not in bad:
            return loss, auxiliary
        if how == "gradient":
            next(loss_model.parameters()).grad.fill_(math.inf)
        return (math.nan if how == "loss" else loss), auxiliary

    return gradients


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [{0}, {3, 4}, {1, 5, 9}, set()])
@pytest.mark.parametrize("make", [lambda: warmup_cosine(12, 4), lambda: one_cycle(12),
                                  lambda: warmup_stable_decay(12, 3, 4)])
def test_the_rate_waits_for_a_skipped_step(data, how, bad, make):
    curve, config = make(), TrainConfig(12, learning_rate=0.01)
    history = train(tiny(), data, None, config, schedule=curve, progress=False,
                    gradients=skipping(bad, how))
    updates, expected = 0, []
    for batch in range(12):
        expected.append(0.01 * curve(updates))
        updates += batch not in bad
    assert history.column("learning_rate")[1] == expected
    by_batch = [0.01 * curve(batch) for batch in range(12)]
    assert (expected == by_batch) == (not bad), "the control: a clock of batches runs ahead"


def test_an_interrupted_run_goes_on_along_the_same_curve(data, tmp_path):
    curve = warmup_stable_decay(20, 5, 6)
    config = TrainConfig(20, learning_rate=0.01, save_every=8)
    bad = skipping({2, 11}, "loss")

    def stop(run):
        run.stopping = run.step == 8

    whole = train(tiny(), data, None, config, schedule=curve, gradients=bad, progress=False)
    args = dict(schedule=curve, progress=False, out=tmp_path / "run")
    train(tiny(), data, None, config, gradients=skipping({2}, "loss"), callbacks=[stop], **args)
    rest = train(tiny(), data, None, config, gradients=skipping({3}, "loss"), resume=True, **args)
    assert rest.column("learning_rate") == whole.column("learning_rate")
    assert rest.column("loss") == whole.column("loss")
    with pytest.raises(ValueError, match="cannot resume: schedule"):
        train(tiny(), data, None, config, resume=True, out=tmp_path / "run", progress=False,
              schedule=warmup_stable_decay(20, 5, 12))


@pytest.mark.parametrize("start, length", [(6, 4), (12, 6)])
def test_a_branch_is_the_run_that_had_planned_it(data, start, length):
    kept = {}

    def keep(run):
        kept[run.step] = deepcopy((run.model, run.optimizer))

    train(tiny(), data, None, TrainConfig(15), schedule=warmup(4), callbacks=[keep], progress=False)
    planned = tiny()
    train(planned, data, None, TrainConfig(start + length), progress=False,
          schedule=warmup_stable_decay(start + length, 4, length))

    def branch(first, moments=True):
        model, adamw = deepcopy(kept[start])
        later = copy(data)
        later.batch = lambda seed, step: data.batch(seed, first + step)
        more = dict(optimizer=lambda model, config: adamw) if moments else {}
        train(model, later, None, TrainConfig(length), schedule=linear(length), progress=False,
              **more)
        return all(torch.equal(a, b) for a, b in zip(model.parameters(), planned.parameters()))

    assert branch(start)
    assert not branch(0), "the control: batches from the beginning"
    assert not branch(start, moments=False), "the control: new moments"
