"""Rows R5 and R6 of the reliability scoreboard, with small counts: forty prompts a
variant, four batch sizes; the full counts run by `make reliability`."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import reliability_inference as trials  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = pytest.mark.parametrize("variant", trials.VARIANTS, ids=lambda v: v.name)
SOME = [v for v in trials.VARIANTS if v.name in (
    "gpt2", "mistral, window 6", "int8_dynamic, llama", "Int8Cache, mistral")]
FEW = pytest.mark.parametrize("variant", SOME, ids=lambda v: v.name)


@VARIANTS
def test_r5_forty_prompts(variant):
    found = trials.cached_trial(variant, 40, rows=20, new=4)
    assert found.prompts == found.ids == 40
    assert found.worst <= trials.BOUND and set(found.by_way) == set(trials.WAYS)


@FEW
@pytest.mark.parametrize("name", list(trials.CONTROLS))
def test_r5_turns_red(variant, name):
    kind = trials.CONTROLS[name](variant.cache)
    found = trials.cached_trial(variant, 10, rows=10, make_cache=kind, new=2)
    assert found.worst > 100 * trials.BOUND


def test_r5_what_rounds_is_equal_to_the_bit_in_float32():
    for variant in SOME:
        found = trials.cached_trial(variant, 4, rows=4, dtype=torch.float32, new=2,
                                    invariant=True)
        assert found.ids == 4 and found.bits == 0
    plain = trials.cached_trial(SOME[0], 4, rows=4, dtype=torch.float32, new=2)
    assert plain.bits > 0, "otherwise the bits were not compared"


@VARIANTS
def test_r6_four_batch_sizes(variant):
    found = trials.batch_trial(variant, (1, 3, 8, 32), (0, 17))
    assert found.rows == found.same_ids == 2 * (1 + 3 + 8 + 32)
    assert found.worst <= trials.BOUND


@FEW
def test_r6_no_bit_differs_within_batch_invariant(variant):
    found = trials.batch_trial(variant, (1, 3, 8), (0, 9), invariant=True)
    assert found.rows == found.same_ids == 24 and found.bits == 0


def test_r6_texts():
    assert trials.text_trial(SOME[1], new=3) == 0


def test_r6_turns_red():
    found = trials.control_r6()
    assert found["scale_of_the_batch"] > 100 * trials.BOUND
    assert found["padding_seen"] > 100 * trials.BOUND
    assert all(bits > 0 for bits in found["bits_without"].values())


DECODERS = pytest.mark.parametrize(
    "name,variant,options", trials.DECODERS, ids=[name for name, _, _ in trials.DECODERS])


@DECODERS
def test_decoders(name, variant, options):
    found = trials.decoder_cached(variant, options, 20, new=3)
    rows = trials.decoder_batches(variant, options, (1, 3, 8), (0, 17))
    assert found.ids == 20 and rows.same_ids == rows.rows == 24
    if options.get("quantize") != "int8_dynamic":  # where a rounding may tip over
        assert max(found.worst, rows.worst) <= trials.BOUND


@pytest.mark.parametrize("name", ["llama", "alibi", "gpt2, int8_dynamic"])
def test_deterministic_decoders(name):
    case = next(case for case in trials.DECODERS if case[0] == name)
    fixed = trials.decoder_batches(*case[1:], (3, 8), (0, 9), deterministic=True)
    assert fixed.rows == fixed.same_ids == 22 and fixed.bits == 0
    usual = trials.decoder_batches(*case[1:], (3, 8), (0, 9))
    assert usual.bits > 0, "otherwise the bits were not compared"


def test_a_decoder_that_lags_turns_red():
    _, variant, options = trials.DECODERS[1]
    found = trials.decoder_cached(variant, options, 20, new=2, spoil=trials.lagging)
    assert found.worst > 100 * trials.BOUND


def test_the_report_is_red_if_anything_is():
    r5 = dict(prompts=5, same_ids=5, worst=1e-6, rounding={}, controls=dict(
        variants=2, red={"a": 2}))
    r6 = dict(rows_compared=7, same_ids=7, worst=1e-6, wrong_texts=0, invariant_bits=0,
              controls=dict(scale_of_the_batch=1, padding_seen=1, bits_without={"a": 1}))
    one = dict(rounds=False, prompts=3, same_ids=3, rows=4, rows_same_ids=4)
    decoder = dict(forms=1, worst=1e-6, rows_worst=1e-6, deterministic_bits=0,
                   rows={"a": one}, controls=dict(red=1))
    assert all(trials.verdicts(r5, r6, decoder).values())
    for change in (dict(same_ids=4), dict(worst=2e-5),
                   dict(rounding={"x": dict(invariant_bits=1)}),
                   dict(controls=dict(variants=2, red={"a": 1}))):
        assert not trials.verdicts({**r5, **change}, r6, decoder)["R5"]
    for change in (dict(same_ids=6), dict(worst=2e-5), dict(wrong_texts=1),
                   dict(invariant_bits=1),
                   dict(controls={**r6["controls"], "bits_without": {"a": 0}})):
        assert not trials.verdicts(r5, {**r6, **change}, decoder)["R6"]
    for row, change in (
        ("R5", dict(worst=2e-5)), ("R5", dict(rows={"a": {**one, "same_ids": 2}})),
        ("R5", dict(controls=dict(red=0))), ("R6", dict(rows_worst=2e-5)),
        ("R6", dict(rows={"a": {**one, "rows_same_ids": 3}})),
        ("R6", dict(deterministic_bits=1)),
    ):
        assert not trials.verdicts(r5, r6, {**decoder, **change})[row]
