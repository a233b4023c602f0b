"""Averages of weights: closed forms, torch's AveragedModel, exact resume, skipped steps, ties,
dtypes, and what does not fit."""
import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gptbook.averages import (
    WeightAverage, check_weights, decay_ramp, put_weights, trained_weights,
)
from gptbook.checkpoints import load_model, load_state, save_model
from gptbook.precision import BFloat16
from gptbook.runs import TrainConfig
from gptbook.training import compute_gradients, evaluate_loss, train
from tiny_runs import DATA, HELD_OUT, a_model

CONFIG = TrainConfig(steps=12, learning_rate=1e-2, validate_every=4, save_every=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(model, *callbacks, config=CONFIG, validation=None, **options):
    return train(model, DATA, validation, config, callbacks=callbacks, progress=False, **options)


class Step:
    """As much of a run as an average looks at."""

    def __init__(self, model, **row):
        self.model, self.history = model, [row]


class Path:
    """A callback that keeps the weights of each step."""

    def __init__(self, model):
        self.weights = [deepcopy(trained_weights(model))]

    def __call__(self, run):
        self.weights.append(deepcopy(trained_weights(run.model)))


def shares(decay, n):
    """Of w_0 ... w_n: what each got when it came, times all decays after it."""
    share, left = [], 1.0
    for k in range(n, 0, -1):
        share.append(left * (1 - decay(k)))
        left *= decay(k)
    return [left, *reversed(share)]


def mix(share, states, name):
    """The average that these shares of the states make, in double precision."""
    stacked = torch.stack([weights[name] for weights in states]).double()
    return torch.tensordot(torch.tensor(share, dtype=torch.double), stacked, dims=1)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# The decay ---------------------------------------------------------------------------
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.999])
def test_ramp(decay):
    ramp = decay_ramp(decay)
    assert [ramp(n) for n in range(1, 400)] == [
        min(decay, (n + 1) / (n + 10)) for n in range(1, 400)]
    assert decay_ramp(0.999)(1) == 2 / 11 and decay_ramp(0.1)(1) == 0.1
    assert ramp(10**9) == decay


@pytest.mark.parametrize("n", [50, 300, 3000])
def test_the_ramp_remembers_a_tenth_of_the_run(n):
    share = shares(decay_ramp(0.99999), n)
    age = sum(s * (n - k) for k, s in enumerate(share))
    assert abs(sum(share) - 1) < 1e-9 and abs(age / n - 0.1) < 0.01
    corrected = shares(lambda k: (0.999 - 0.999**k) / (1 - 0.999**k), n)
    assert corrected[0] == 0 and sum(s * (n - k) for k, s in enumerate(corrected)) / n > 0.2


@given(d=st.floats(0.01, 0.999), values=st.lists(st.floats(-9, 9), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_corrected_decay_is_adams_correction(d, values):
    average = m = 0.0
    for n, w in enumerate(values, 1):
        keep = (d - d**n) / (1 - d**n)
        average, m = keep * average + (1 - keep) * w, d * m + (1 - d) * w
    assert abs(average - m / (1 - d ** len(values))) < 1e-9


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=r"decay=.* is outside \[0, 1\)"):
        decay_ramp(decay)
    with pytest.raises(ValueError, match="outside"):
        WeightAverage(nn.Linear(2, 2), decay)


# The numbers -------------------------------------------------------------------------
@pytest.mark.parametrize("decay", [
    0.9, 0.999, lambda n: 0.9, lambda n: 1 - 1 / n, lambda n: (0.9 - 0.9**n) / (1 - 0.9**n)])
@pytest.mark.parametrize("tied", [True, False])
def test_closed_form(decay, tied):
    model = a_model(tied=tied)
    average, path = WeightAverage(model, decay), Path(model)
    run(model, average, path)
    assert average.updates == 12 and average.weights.keys() == path.weights[0].keys()
    share, late = shares(average.decay, 12), shares(average.decay, 11)
    off = 0.0
    for name, ours in average.weights.items():
        expected = mix(share, path.weights, name)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
        off = max(off, (ours - mix(late, path.weights[1:], name)).abs().max().item())
    if average.decay(1):                                     # one update off is seen, unless
        assert off > 1e-4                                    # the first decay forgets w_0


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_torchs_averaged_model(decay):
    model = a_model()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs.update_parameters(model)
    ours = WeightAverage(model, lambda n: decay)
    run(model, ours, lambda run: theirs.update_parameters(run.model))
    for name, weight in trained_weights(theirs.module).items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-6, atol=1e-7)
    assert not same(trained_weights(theirs.module), trained_weights(model))


def test_equal_weights_are_torchs_default():
    model = a_model()
    theirs, ours = AveragedModel(model), WeightAverage(model, lambda n: 1 - 1 / n)
    run(model, ours, lambda run: theirs.update_parameters(run.model))
    for name, weight in trained_weights(theirs.module).items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-5, atol=1e-6)


def test_the_run_does_not_feel_the_average():
    alone, watched = a_model(), a_model()
    average = WeightAverage(watched)

    def look(run):
        with average.applied(run.model):
            evaluate_loss(run.model, HELD_OUT)

    run(alone)
    run(watched, average, look)
    assert same(alone.state_dict(), watched.state_dict())


# What is averaged --------------------------------------------------------------------
def test_tied_once_and_frozen_never():
    model = a_model(tied=True)
    model.blocks[0].requires_grad_(False)
    names = WeightAverage(model).weights.keys()
    assert "tok_emb.weight" in names and "head.weight" not in names
    assert not any(name.startswith("blocks.0.") for name in names)
    assert any(name.startswith("blocks.1.") for name in names)


def test_ties_hold_while_applied():
    model = a_model(tied=True)
    average = WeightAverage(model, 0.5)
    run(model, average)
    with average.applied(model):
        assert model.head.weight is model.tok_emb.weight
        assert torch.equal(model.head.weight, average.weights["tok_emb.weight"])
    assert model.head.weight is model.tok_emb.weight


def test_buffers_stay_the_models():
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model)
    model(torch.randn(8, 3) + 5)
    after = deepcopy(dict(model.named_buffers()))
    average(Step(model))
    with average.applied(model):
        assert same(dict(model.named_buffers()), after)
    assert average.weights.keys() == {"weight", "bias"}


@pytest.mark.parametrize("dtype, kept", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_at_least_float32(dtype, kept):
    model = nn.Linear(4, 4).to(dtype)
    nn.init.ones_(model.weight)
    average = WeightAverage(model, lambda n: 0.999)
    assert {w.dtype for w in average.weights.values()} == {kept}
    nn.init.constant_(model.weight, 2.0)
    for _ in range(1000):
        average(Step(model))
    expected = 2 - 0.999**1000
    assert (average.weights["weight"] - expected).abs().max() < 1e-3
    with average.applied(model):
        assert model.weight.dtype == dtype and abs(model.weight.mean() - expected) < 0.01
    stuck = torch.ones(4, dtype=torch.bfloat16)                # the control
    for _ in range(1000):
        stuck.lerp_(torch.full_like(stuck, 2.0), 1 - 0.999)
    assert (stuck == 1).all()


def test_the_average_shares_no_memory():
    model = a_model()
    average, first = WeightAverage(model), deepcopy(trained_weights(model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert same(average.weights, first)
    alias = WeightAverage(model)
    alias.weights = trained_weights(model)                     # the control
    with torch.no_grad():
        model.tok_emb.weight.add_(1)
    assert same(alias.weights, trained_weights(model))


def test_an_average_that_arrived_stays():
    model = a_model()
    average, first = WeightAverage(model), deepcopy(trained_weights(model))
    for _ in range(20):
        average(Step(model))
    assert same(average.weights, first) and average.updates == 20


# Skipped steps -----------------------------------------------------------------------
def bad_at(*steps):
    """Gradients with a loss that is no number at these steps, counted from 1."""
    seen = [0]

    def gradients(*inputs):
        seen[0] += 1
        loss, auxiliary = compute_gradients(*inputs)
        return (math.nan if seen[0] in steps else loss), auxiliary

    return gradients


def test_skipped_steps_do_not_count():
    model = a_model()
    average, path = WeightAverage(model, lambda n: 0.9), Path(model)
    history = run(model, average, path, gradients=bad_at(3, 7, 8))
    assert [row["step"] for row in history if "skipped" in row] == [3, 7, 8]
    assert average.updates == 9
    kept = [w for i, w in enumerate(path.weights) if i not in (3, 7, 8)]
    off = 0.0
    for name, ours in average.weights.items():
        expected = mix(shares(lambda n: 0.9, 9), kept, name)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
        twice = mix(shares(lambda n: 0.9, 12), path.weights, name)
        off = max(off, (ours - twice).abs().max().item())
    assert off > 1e-3                                        # the control: counted twice


# In and out --------------------------------------------------------------------------
def test_applied_gives_everything_back_after_an_error():
    model = a_model()
    average = WeightAverage(model, 0.5)
    run(model, average)
    own, places = deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        with average.applied(model) as inside:
            assert inside is model and not same(model.state_dict(), own)
            assert same(trained_weights(model), average.weights)
            raise KeyboardInterrupt
    assert same(model.state_dict(), own)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_applied_inside_itself():
    model = a_model()
    average = WeightAverage(model, 0.5)
    run(model, average)
    own = deepcopy(model.state_dict())
    with average.applied(model), average.applied(model):
        assert same(trained_weights(model), average.weights)
    assert same(model.state_dict(), own)


def test_applied_to_another_model(tmp_path):
    model = a_model()
    average = WeightAverage(model, 0.5)
    run(model, average)
    with average.applied(a_model(seed=9)) as other:
        path = save_model(tmp_path / "average.safetensors", other)
    with average.applied(model):
        assert same(load_model(path).model.state_dict(), model.state_dict())
    assert not same(load_model(path).model.state_dict(), model.state_dict())


@pytest.mark.parametrize("other, said", [
    (dict(emb_dim=32), r"tok_emb.weight: \[37, 16\] in the average, \[37, 32\] in the model"),
    (dict(n_layers=1), r"blocks.1.*: \[.*\] in the average, missing or frozen in the model")])
def test_what_does_not_fit_changes_nothing(other, said):
    average, model = WeightAverage(a_model()), a_model(**other)
    own = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        with average.applied(model):
            pass
    with pytest.raises(ValueError, match=said):
        average(Step(model))
    assert same(model.state_dict(), own) and average.updates == 0


def test_weights_that_begin_to_train_are_seen():
    model = a_model()
    model.blocks[1].requires_grad_(False)
    average = WeightAverage(model)
    average(Step(model))
    model.blocks[1].requires_grad_(True)
    with pytest.raises(ValueError, match="blocks.1.*: missing or frozen in the average"):
        average(Step(model))
    assert average.updates == 1


def test_a_row_is_not_spread_over_a_matrix():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"weight: \[3\] in the average, \[3, 3\]"):
        put_weights(model, {"weight": torch.zeros(3)})
    check_weights(trained_weights(model), trained_weights(model))


# Resume ------------------------------------------------------------------------------
def pause_after(step):
    def callback(run):
        run.stopping = run.step == step
    return callback


@pytest.mark.parametrize("step, precision, decay", [
    (1, None, 0.9), (5, None, lambda n: 1 - 1 / n), (11, None, 0.999),
    (5, BFloat16("cpu"), 0.9)])
def test_resumed_to_the_last_bit(tmp_path, step, precision, decay):
    whole, first, second = a_model(), a_model(), a_model()
    averages = [WeightAverage(model, decay) for model in (whole, first, second)]
    run(whole, averages[0], precision=precision)
    run(first, averages[1], pause_after(step), out=tmp_path, precision=precision)
    assert averages[1].updates == step
    run(second, averages[2], out=tmp_path, resume=True, precision=precision)
    assert same(whole.state_dict(), second.state_dict())
    assert same(averages[0].weights, averages[2].weights) and averages[2].updates == 12
    assert not same(averages[0].weights, averages[1].weights)


def test_resume_after_skipped_steps(tmp_path):
    whole, second = a_model(), a_model()
    run(whole, kept := WeightAverage(whole), gradients=bad_at(2, 3))
    run(model := a_model(), WeightAverage(model), pause_after(3), out=tmp_path,
        gradients=bad_at(2, 3))
    run(second, resumed := WeightAverage(second), out=tmp_path, resume=True)
    assert same(kept.weights, resumed.weights) and resumed.updates == 10


def test_a_lost_average_is_another_one(tmp_path):
    """The control: an average that begins anew in the resumed run differs."""
    class Forgetful(WeightAverage):
        def load_state_dict(self, state):
            pass

    whole, second = a_model(), a_model()
    run(whole, kept := WeightAverage(whole))
    run(model := a_model(), Forgetful(model), pause_after(5), out=tmp_path)
    run(second, lost := Forgetful(second), out=tmp_path, resume=True)
    assert same(whole.state_dict(), second.state_dict())
    assert not same(kept.weights, lost.weights)


def test_resume_with_another_average(tmp_path):
    run(model := a_model(), WeightAverage(model, 0.5), pause_after(4), out=tmp_path)
    saved = load_state(tmp_path / "state")
    assert saved["parts"]["WeightAverage 0"]["updates"] == 4
    with pytest.raises(ValueError, match="the decay was .*0.5.*, now it is .*0.9"):
        run(model := a_model(), WeightAverage(model, 0.9), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="parts"):
        run(a_model(), out=tmp_path, resume=True)


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_state_of_other_weights(change):
    average, own = WeightAverage(nn.Linear(3, 3)), WeightAverage(nn.Linear(3, 3))
    own(Step(model := nn.Linear(3, 3)))
    state = deepcopy(own.state_dict())
    weight = state["weights"].pop("weight")
    state["weights"] |= {"weight": weight[0]} if change == "shape" else {"other": weight}
    before = deepcopy(average.weights)
    with pytest.raises(ValueError, match="weight: |other: "):
        average.load_state_dict(state)
    assert same(average.weights, before) and average.updates == 0
    average.load_state_dict(own.state_dict())
    assert same(average.weights, own.weights) and average.updates == 1


# What it is for ----------------------------------------------------------------------
def test_nearer_to_the_minimum_than_the_last_weights():
    """SGD on w**2 / 2 with noise: both standard deviations have closed forms."""
    rate, d, rho = 0.2, 0.95, 0.8
    model = nn.Linear(20_000, 1, bias=False)
    average = WeightAverage(model, lambda n: d)
    torch.manual_seed(0)
    for _ in range(300):
        with torch.no_grad():
            model.weight -= rate * (model.weight + torch.randn_like(model.weight))
        average(Step(model))
    variance = rate / (2 - rate)
    ratio = (1 - d) * (1 + d * rho) / ((1 + d) * (1 - d * rho))
    assert abs(model.weight.var().item() / variance - 1) < 0.05
    assert abs(average.weights["weight"].var().item() / (variance * ratio) - 1) < 0.05
