"""Schedules: closed forms against torch's schedulers, shapes of the curves, errors."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbook.schedules import constant, cosine, warmup, warmup_cosine

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
])
def test_errors_name_both_values(make, names):
    with pytest.raises(ValueError) as error:
        make()
    assert all(name in str(error.value) for name in names)
