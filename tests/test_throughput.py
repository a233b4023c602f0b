"""Counted operations against torch's counter, timings that change nothing, durations."""
import math
from copy import deepcopy

import pytest
import torch

from torch.utils.flop_counter import FlopCounterMode

from gptbook.core import LossModel
from gptbook.runs import KERNELS, History, TrainConfig, kernels_of, use_kernel
from gptbook.throughput import (
    faster_precision, flops_per_token, matmul_peak, seconds_per_step, steps_for_minutes,
    time_parts, tokens_per_second, use_one_product, utilisation,
)
from tiny_runs import DATA, a_model

CONFIG = TrainConfig(steps=12, learning_rate=3e-3)


@pytest.mark.parametrize("sizes", [
    dict(), dict(n_layers=5, emb_dim=24, n_heads=3), dict(tied=False, vocab_size=101),
    dict(emb_dim=32, n_heads=4, n_kv_heads=2), dict(bias=False)])
def test_operations_are_those_that_torch_counts(sizes):
    model = a_model(**sizes)
    use_kernel(model, "naive_attention")
    with FlopCounterMode(display=False) as counter:
        LossModel(model)(*DATA.batch(0, 0)).backward()
    assert counter.get_total_flops() == flops_per_token(model, 16) * 4 * 16
    assert counter.get_total_flops() != flops_per_token(model, 17) * 4 * 16


def test_utilisation_is_a_share_of_the_peak():
    model = a_model()
    work = flops_per_token(model, 16)
    assert utilisation(model, 16, 1000, 4000 * work) == pytest.approx(0.25)


def test_speed_is_a_median_of_the_last_steps():
    rows = [dict(step=i, tokens=100, seconds=s) for i, s in enumerate([50, 2, 2, 9, 2])]
    assert tokens_per_second(History(rows), last=3) == 50
    assert tokens_per_second(History(rows[1:2])) == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_more_than_a_python_loop_and_less_than_a_cluster(dtype):
    peak = matmul_peak(torch.device("cpu"), dtype, size=128, seconds=0.02)
    assert 1e7 < peak < 1e15


def test_timing_changes_nothing():
    model, before = a_model(), a_model()
    rng = torch.get_rng_state()
    times = seconds_per_step(model, DATA, CONFIG, steps=3)
    assert len(times) == 3 and times == sorted(times) and times[0] > 0
    parts = time_parts(model, DATA, CONFIG, steps=2)
    assert set(parts) == {(p, k) for p in ("float32", "bfloat16") for k in KERNELS}
    assert list(parts.values()) == sorted(parts.values())
    assert kernels_of(model) == ["sdpa"], "time_parts looks at copies"
    assert faster_precision(model, DATA, CONFIG) in ("float32", "bfloat16")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_steps_for_minutes():
    assert steps_for_minutes(2, 0.1, reserve=0.0) == 1200
    assert steps_for_minutes(2, 0.1, reserve=0.25) == 900
    for minutes, seconds in ((0, 1), (-1, 1), (math.nan, 1), (math.inf, 1), (0.1, 60)):
        with pytest.raises(ValueError, match=f"minutes={minutes}"):
            steps_for_minutes(minutes, seconds)


@pytest.mark.parametrize("sizes", [dict(), dict(bias=False), dict(emb_dim=32, n_heads=4, n_kv_heads=2)])
def test_one_product_is_three(sizes):
    three, one = a_model(**sizes, drop_rate=0.0), a_model(**sizes, drop_rate=0.0)
    assert use_one_product(one) == 2
    for model in (three, one):
        LossModel(model)(*DATA.batch(0, 0)).backward()
    assert three.state_dict().keys() == one.state_dict().keys()
    for (name, p), q in zip(three.named_parameters(), one.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    copied = deepcopy(one)  # computes with its own weights
    with torch.no_grad():
        copied.blocks[0].attn.W_value.weight.zero_()
    x = DATA.batch(0, 0)[0]
    torch.testing.assert_close(one(x), three(x), rtol=1e-4, atol=1e-5)
    assert (copied(x) - one(x)).abs().max() > 1e-3


def test_one_product_leaves_what_is_wrapped():
    class Wrapped(torch.nn.Linear):
        """Computes more than its weight says."""

    model = a_model()
    model.blocks[0].attn.W_query.__class__ = Wrapped
    assert use_one_product(model) == 1
    with pytest.raises(ValueError, match="three plain linears"):
        use_one_product(model)
