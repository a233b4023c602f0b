"""The learning-rate finder: its losses against a plain loop, what it leaves alone, its rules."""
import math
import random
from copy import deepcopy

import pytest
import torch

from gptbook.core import GPTConfig, GPTModel, LossModel, init_weights, set_seed
from gptbook.data import TokenDataset
from gptbook.rate_finder import exploded, find_learning_rate, smooth, suggest_rates
from gptbook.runs import History, TrainConfig
from gptbook.training import Precision, compute_gradients


@pytest.fixture(scope="module")
def data():
    draw = random.Random(0)  # a text that can be learnt: each id is followed by its successor
    ids, at = [], 0
    for _ in range(4000):
        at = (at + 1) % 20 if draw.random() < 0.9 else draw.randrange(20)
        ids.append(at)
    return TokenDataset(torch.tensor(ids), 16, 4)


def small_model(seed=0, **more):
    set_seed(seed)
    model = GPTModel(GPTConfig(20, 16, 16, n_layers=1, n_heads=2, **more))
    init_weights(model, 0.2)
    return model


def history(losses, rates=None):
    """As the finder writes it; None is a skipped step."""
    rates = rates or [1e-4 * 10 ** (i / 10) for i in range(len(losses))]
    rows = [dict(step=i + 1, learning_rate=r) for i, r in enumerate(rates)]
    for row, loss in zip(rows, losses):
        row.update(dict(skipped=1) if loss is None else dict(loss=loss))
    return History(rows)


def bowl(n=60, at=40):
    """Losses that fall most steeply half way to `at`, and turn there."""
    return [3 + math.cos(math.pi * i / at) for i in range(n)]


@pytest.mark.parametrize("low, high, steps, seed", [
    (1e-4, 1e-1, 12, 0), (1e-5, 1.0, 30, 3), (1e-3, 1e-2, 2, 1)])
def test_losses_and_rates_are_those_of_a_plain_loop(data, low, high, steps, seed):
    config = TrainConfig(clip_norm=0.5, weight_decay=0.0, betas=(0.8, 0.9), seed=seed)
    found = find_learning_rate(small_model(seed), data, config, low=low, high=high, steps=steps,
                               worse=math.inf)
    model, losses, rates = small_model(seed), [], []
    adamw = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9), weight_decay=0.0)
    for s in range(steps):
        loss = LossModel(model)(*data.batch(seed, s))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rates.append(low * (high / low) ** (s / (steps - 1)))
        adamw.param_groups[0]["lr"] = rates[-1]
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert found.column("learning_rate")[1] == pytest.approx(rates, rel=1e-12)
    assert rates[0] == low and rates[-1] == pytest.approx(high)
    ours = torch.tensor(found.column("loss")[1])
    torch.testing.assert_close(ours, torch.tensor(losses), rtol=0, atol=2e-3)
    if steps > 2:   # a control: the tolerance is far below what another seed changes
        other = find_learning_rate(small_model(seed + 7), data, config, low=low, high=high,
                                   steps=steps, worse=math.inf)
        assert (torch.tensor(other.column("loss")[1]) - ours).abs().max() > 0.02


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_model_or_the_process_changes(data, mode):
    model = small_model(drop_rate=0.3).train(mode)
    compute_gradients(LossModel(model), *data.batch(0, 0))
    state = {name: w.clone() for name, w in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    drawn, python = torch.get_rng_state(), random.getstate()
    model.train(mode)
    first = find_learning_rate(model, data, steps=8)
    assert all(torch.equal(state[name], w) for name, w in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters()))
    assert model.training is mode
    assert torch.equal(drawn, torch.get_rng_state()) and python == random.getstate()
    torch.rand(5)
    again = find_learning_rate(model, data, steps=8)
    assert first.column("loss") == again.column("loss"), "dropout depends on the seed alone"


def test_without_the_copy_it_would_change(data):
    model = small_model()
    before = deepcopy(model.state_dict())
    from gptbook.training import train
    train(model, data, None, TrainConfig(3), progress=False)
    assert any(not torch.equal(before[name], w) for name, w in model.state_dict().items())


def test_the_sockets_are_used_and_a_precision_keeps_its_state(data):
    class Counting(Precision):
        seen = 0

        def adapt(self, good):
            self.seen += 1
            return False

    calls, precision = [], Counting()

    def gradients(*batch):
        calls.append(batch[-1])
        return compute_gradients(*batch)

    def sgd(model, config):
        calls.append(config.learning_rate)
        return torch.optim.SGD(model.parameters(), lr=config.learning_rate)

    find_learning_rate(small_model(), data, steps=5, gradients=gradients, optimizer=sgd,
                       precision=precision)
    assert calls[0] == 1e-5 and len(calls) == 6
    assert calls[1].seen == 5 and precision.seen == 0


def test_it_stops_when_the_loss_explodes_or_is_not_finite(data):
    much = dict(low=1e-3, high=1e3, steps=40)
    short, patient = (find_learning_rate(small_model(), data, **much, worse=worse)
                      for worse in (1.25, 1e9))
    assert 7 < len(short) < len(patient) and short == [
        dict(row, seconds=mine["seconds"]) for row, mine in zip(patient, short)]
    losses = iter([3.0, 2.9, math.nan, 2.8, 2.7])

    def bad(*batch):
        compute_gradients(*batch)
        return next(losses), 0.0

    found = find_learning_rate(small_model(), data, steps=5, gradients=bad)
    assert len(found) == 3 and "loss" not in found[-1] and found[-1]["skipped"] == 1


def test_smooth():
    assert smooth([], 7) == [] and smooth([2.0]) == [2.0]
    assert smooth([4.0, 1.0, 1.0, 1.0, 7.0], 3) == [4, 2, 1, 3, 7]
    line = [0.5 * i for i in range(20)]
    assert smooth(line, 7) == pytest.approx(line), "a centred mean has no lag"
    late = [sum(line[max(0, i - 6):i + 1]) / len(line[max(0, i - 6):i + 1]) for i in range(20)]
    assert max(abs(a - b) for a, b in zip(late, line)) == 1.5, "the control: a trailing one has"


def test_exploded():
    assert not exploded(History(), 1.25) and not exploded(history([5.0] * 6 + [50.0] * 0), 1.25)
    assert not exploded(history([5.0] * 30), 1.25)
    assert not exploded(history([5.0] * 10 + [8.0]), 1.25), "one bad batch is no explosion"
    assert exploded(history([5.0] * 10 + [8.0] * 7), 1.25)
    assert not exploded(history([5.0] * 10 + [8.0] * 7), 2.0)
    assert exploded(history([5.0, None]), 1.25)


def test_both_rules_on_a_curve_whose_answer_is_known():
    found = history(bowl())
    rates = found.column("learning_rate")[1]
    rules = suggest_rates(found)
    assert rules["a tenth of the turn"] == pytest.approx(rates[40] / 10)
    assert rates[18] <= rules["steepest fall"] <= rates[22]
    assert suggest_rates(history([*bowl(50), None])) == suggest_rates(history(bowl(50)))


def test_a_picture_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="still falling at 0.25: raise high="):
        suggest_rates(history(bowl()[:35]))
    with pytest.raises(ValueError, match="low= is too high"):
        suggest_rates(history([3 + 0.1 * i for i in range(30)]))
    assert suggest_rates(history([*bowl()[:35], None])), "ended by an overflow: that is a turn"


@pytest.mark.parametrize("more", [dict(low=0.0), dict(low=1.0, high=1.0), dict(high=math.inf),
                                  dict(low=math.nan), dict(steps=1), dict(low=-1.0)])
def test_rates_that_do_not_grow(data, more):
    with pytest.raises(ValueError, match="do not grow"):
        find_learning_rate(small_model(), data, **more)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_random_numbers_come_back(data):
    drawn = torch.cuda.get_rng_state_all()
    found = find_learning_rate(small_model(drop_rate=0.2).cuda(), data, steps=5)
    assert len(found) == 5
    assert all(map(torch.equal, drawn, torch.cuda.get_rng_state_all()))
