"""Rows R1, R10 and R18 of the reliability scoreboard, with small counts: kills,
non-finite steps, fresh processes; the full counts run by `make reliability`."""
import math
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import reliability_training as trials  # noqa: E402

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL and fork")


# what is compared -----------------------------------------------------------------

def test_every_changed_bit_is_a_difference():
    state = {"w": torch.tensor([0.0, 1.0]), "n": [1, 2.0], "seconds": 1, "t": (1, "a")}
    same = lambda **changes: [*trials.differences(state, {**state, **changes})]
    assert same() == [] and same(seconds=2) == []
    assert same(w=torch.tensor([-0.0, 1.0])) == [".w"], "equal numbers, other bits"
    assert same(w=state["w"].double()) == [".w"]
    assert same(w=torch.tensor([math.nan, 1.0])) == [".w"]
    assert same(n=[1, 2]) == [".n.1: int for float"]
    assert same(n=[1]) and same(t=[1, "a"]) and same(new=1)


def test_the_run_needs_all_that_it_claims():
    """Loss scales that change, skipped steps, epochs, a best model: they are there."""
    reference = trials.reference_of("float16")
    last = reference.states[trials.CONFIG.steps]
    parts = [state["parts"] for state in reference.states.values()]
    assert len({part["precision"]["scale"] for part in parts}) > 4
    assert last["counters"]["skipped"] > 0
    names = {"best_model", "checkpoint_epoch_2", "checkpoint_epoch_3"}
    assert {*reference.files} == {f"{name}.safetensors" for name in names}
    assert {"parts", "rng", "optimizer"} <= {*last} and len(last["parts"]) == 3
    assert len(reference.states) == trials.CONFIG.steps == len(reference.log)


# R1: kills ------------------------------------------------------------------------

@forks
def test_r1_ten_kills():
    kills = trials.kill_trials(10)
    assert len(kills) == 10 and not any(kill.lost for kill in kills)
    assert [kill.wrong for kill in kills] == [[]] * 10
    assert sum(bool(kill.saving) for kill in kills) >= 3
    assert len({kill.name for kill in kills}) == 3


@forks
@pytest.mark.parametrize("part", [
    "rng", "optimizer", "precision", "WeightAverage 1", "skipped"])
def test_r1_turns_red_when_a_resume_forgets(part):
    (kill,) = trials.forgetful_trials(part, 1)
    assert kill.found and kill.wrong
    assert all(what.startswith("end") for what in kill.wrong), "what was saved is right"


@forks
def test_r1_turns_red_when_a_save_is_not_atomic():
    assert any(kill.lost for kill in trials.in_place_trials(3))


# R10: numbers that are not finite -------------------------------------------------

@pytest.mark.parametrize("name", trials.PRECISIONS)
def test_r10_bad_steps_touch_nothing(name):
    watch, model = trials.fault_trial(name, 120, share=0.1)
    assert watch.wrong == {}
    assert watch.skipped >= 12 == sum(watch.faults.injected.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("check", ["nothing", "the loss", "zeros"])
def test_r10_turns_red_without_the_check(check):
    update = trials.careless_update(check)
    watch, model = trials.fault_trial("float32", 60, update=update)
    assert watch.wrong["a bad step touched weights or moments"] > 0
    spoilt = [parameter.isnan().float().mean() for parameter in model.parameters()]
    if check == "nothing":
        assert min(spoilt) == 1, "every weight"
    assert any(spoilt) == (check != "zeros")


def test_r10_the_careful_twin_of_the_careless_update_is_green():
    watch, _ = trials.fault_trial("float32", 60, update=trials.careless_update("both"))
    assert watch.wrong == {} and watch.skipped == 3


def test_r10_the_plan_has_no_long_rows_of_faults():
    for seed in range(5):
        plan = trials.fault_plan(200, 0.4, 3, seed)
        assert len(plan) == 80 and set(plan.values()) == {"loss", "gradient", "layer"}
        assert not any({n, n + 1, n + 2} <= plan.keys() for n in range(200))


def test_r10_k_in_a_row_stop_and_name_the_layer():
    trials_made = trials.stop_trials(("float32",), (1, 3))
    assert len(trials_made) == 2 * len(trials.layers()) > 20
    assert {what: wrong for what, wrong in trials_made.items() if wrong} == {}


def test_r10_a_stop_that_does_not_come_or_another_name_is_noticed(monkeypatch):
    harmless = lambda layer, value: trials.spoil_output(layer, 1.0)
    assert trials.stop_trial("float32", "norm", harmless, 2) == ["it did not stop"]
    monkeypatch.setattr("gptbook.runs.find_non_finite", lambda *_: "the output of head")
    assert trials.stop_trial("float32", "norm", trials.spoil_output, 2) == ["the name"]


def test_r10_in_float16_the_loss_scale_falls_first(monkeypatch):
    """From 8 it takes three bad steps to 1; after these, three in a row are enough."""
    above = lambda name: trials.Float16("cpu", 8.0)
    monkeypatch.setattr(trials, "lowest_precision", above)
    spoil = trials.spoil_gradient
    assert trials.stop_trial("float16", "norm", spoil, 3) == ["it did not stop"]
    wrong = trials.stop_trial("float16", "norm", spoil, 3, more=3)
    assert wrong == ["the counters", "the steps"], "the right name, later"


# R18: once more -------------------------------------------------------------------

def test_r18_fresh_processes_give_the_same_bits():
    first, second, third = (trials.fresh() for _ in range(3))
    assert first == second == third and len(set(first.values())) == len(first) == 4
    assert trials.another_seed_differs(first)
    assert not trials.another_seed_differs(dict.fromkeys(first, "the same"))
