"""Samplers at every edge, against a float64 oracle."""
import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import oracle_kept

from gptbook import sampling
from gptbook.sampling import (
    candidates, draw, largest, sample, sampling_view, temperature_sampling, top_k_sampling,
    top_p_sampling,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import reliability_sampling as trials  # noqa: E402


# --- R4: the grid ------------------------------------------------------------------------


def faults(cells) -> list:
    """Those cells in which something is wrong; the benchmark says what a cell asks."""
    model = trials.small_model()
    return [cell for cell in cells if trials.fault(model, cell)]


def test_grid_small():
    assert len(trials.GRID) == 11_760
    assert faults(random.Random(0).sample(trials.GRID, 600)) == []


@pytest.mark.slow
def test_grid_full():
    assert faults(trials.GRID) == []


@pytest.mark.parametrize("bug", trials.BUGS)
def test_grid_notices_a_wrong_sampler(bug):
    """Negative controls: each known bug turns the grid red, and it is green again after."""
    cells = random.Random(1).sample(trials.GRID, 300)
    with bug():
        assert faults(cells)
    assert faults(cells) == []


def test_grid_notices_changed_logits_and_foreign_errors(monkeypatch):
    def spoils(model, *args, **options):
        model.head.logits += 1
        return trials_generate(model, *args, **options)

    def torchs_own(*args, **options):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    trials_generate, cell = trials.generate_text, (1.0, 2, 0.9, 1, "normal")
    assert trials.fault(trials.small_model(), cell) is None
    for wrong, said in ((spoils, "wrong"), (torchs_own, "untyped")):
        monkeypatch.setattr(trials, "generate_text", wrong)
        assert trials.fault(trials.small_model(), cell) == said


# --- kept sets over many shapes ------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 50, 1024, 1025, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_sets_equal_the_oracle(n, dtype):
    generator = torch.Generator().manual_seed(n)
    settings_grid = list(itertools.product(
        (0.5, 4.0), (0.7, 1.0), (None, 1, 2, n // 2 or 1, n, n + 1), (None, 0.05, 0.9, 0.999, 1)))
    for scale, temperature, k, p in settings_grid[:: 7 if n > 1000 else 1]:
        logits = (scale * torch.randn(3, n, generator=generator)).to(dtype)
        settings_ = dict(temperature=temperature, top_k=k, top_p=p)
        ids, probs = candidates(logits, **settings_)
        assert torch.allclose(probs.double().sum(1), torch.ones(3).double(), atol=1e-5)
        for row in range(3):
            kept = oracle_kept(logits[row].double().numpy(), **settings_)
            ours = {i: q for i, q in zip(ids[row].tolist(), probs[row].tolist()) if i >= 0}
            assert set(ours) == set(kept), (n, dtype, settings_)
            assert max(abs(ours[i] - kept[i]) for i in kept) < 1e-6


def test_flat_rows_reach_beyond_the_shortlist():
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    logits[1] *= 8
    ids, _ = candidates(logits, top_p=0.9)
    sizes = (ids >= 0).sum(1).tolist()
    assert sizes[0] > 1024 > sizes[1]
    for row in range(2):
        kept = set(ids[row][ids[row] >= 0].tolist())
        assert kept == set(oracle_kept(logits[row].double().numpy(), top_p=0.9))


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_exactly_k_and_the_lower_id_wins(k):
    logits = torch.tensor([2.0, 5, 5, 1, 5, 5, 2, 2, 5, 5, 0, 5, 5]).repeat(2, 1)
    logits[1] = logits[1].flip(0)
    ids, _ = candidates(logits, top_k=k)
    for row in range(2):
        order = sorted(range(13), key=lambda i: (-logits[row, i], i))
        assert ids[row].tolist() == sorted(order[:k])
    values, ids = largest(torch.zeros(1, 13), k)
    assert ids.tolist() == [list(range(k))]


def test_kept_sets_equal_transformers():
    """Ties are left out: theirs keep all that are equal to the k-th."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    for seed, (t, k, p) in enumerate(itertools.product((0.5, 1.0, 2.0), (None, 3, 40), (None, 0.3, 0.95))):
        logits = 2 * torch.randn(4, 300, generator=torch.Generator().manual_seed(seed))
        theirs = TemperatureLogitsWarper(t)(None, logits.clone())
        theirs = TopKLogitsWarper(k)(None, theirs) if k else theirs
        theirs = (TopPLogitsWarper(p)(None, theirs) if p else theirs).softmax(-1)
        ids, probs = candidates(logits, t, k, p)
        ours = torch.zeros(4, 301).scatter(1, ids % 301, probs.float())[:, :300]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings_", [
    dict(temperature=0.7), dict(temperature=1.3, top_k=5), dict(top_p=0.8),
    dict(temperature=0.9, top_k=12, top_p=0.9),
])
def test_frequencies_of_100_000_draws(settings_):
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    n = 100_000
    draws = sample(logits.expand(n, -1), **settings_, generator=torch.Generator().manual_seed(2))
    assert draws.shape == (n,)
    seen, kept = torch.bincount(draws, minlength=40).double(), oracle_kept(logits, **settings_)
    expected = torch.zeros(40).double()
    expected[list(kept)] = n * torch.tensor(list(kept.values()), dtype=torch.double)
    assert seen[expected == 0].sum() == 0
    common = expected > 5
    chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum()
    dof = int(common.sum()) - 1
    assert chi2 < dof + 4.5 * math.sqrt(2 * dof) + 5, "not the distribution that was asked for"
    wrong = expected.roll(1).clamp(min=1)  # negative control: the test sees a shifted one
    assert ((seen - wrong) ** 2 / wrong).sum() > 10 * dof


def test_draw_takes_the_share_in_which_the_number_falls():
    ids, probs = torch.tensor([[-1, 4, 7, 9]]), torch.tensor([[0.0, 0.5, 0.0, 0.5]])
    for u, want in ((0.0, 4), (0.4999, 4), (0.5, 9), (1 - 2**-53, 9)):
        assert draw(ids, probs, torch.tensor([u], dtype=torch.double)).item() == want


# --- properties (R12) ----------------------------------------------------------------------

edge = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, math.inf, -math.inf, math.nan])
rows = st.lists(st.one_of(st.floats(-20, 20, width=32), edge), max_size=12)
anything = st.one_of(st.none(), st.integers(-2, 15), st.floats(), st.booleans(), st.text(max_size=2))


def valid(row, temperature, top_k, top_p):
    """Whether the settings and the logits define a distribution."""
    number = (int, float)
    return (bool(row) and not any(math.isnan(x) or x == math.inf for x in row)
            and max(row) > -math.inf
            and type(temperature) in number and 0 <= temperature < math.inf
            and (top_k is None or type(top_k) is int and top_k >= 1)
            and (top_p is None or type(top_p) in number and 0 < top_p <= 1))


@settings(max_examples=300, deadline=None)
@given(rows, anything, anything, anything, st.booleans())
def test_candidates_are_right_or_a_value_error(row, temperature, top_k, top_p, flat):
    logits = torch.tensor(row, dtype=torch.float32)
    logits = logits if flat else logits.expand(2, -1)
    before = logits.clone()
    try:
        ids, probs = candidates(logits, temperature, top_k, top_p)
    except ValueError:
        assert not valid(row, temperature, top_k, top_p)
    else:
        assert valid(row, temperature, top_k, top_p)
        kept = oracle_kept(row, temperature, top_k, top_p)
        ours = trials.kept_set(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        assert set(ours) == set(kept)
        assert probs.isfinite().all() and (probs >= 0).all()
        if top_k is not None and temperature != 0 and top_p in (None, 1):
            assert len(ours) == min(top_k, sum(x > -math.inf for x in row))
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7)), "the logits were changed"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**40))
def test_rows_of_a_batch_do_not_see_each_other(n_rows, n, seed):
    g = torch.Generator().manual_seed(seed)
    logits, luck = 3 * torch.randn(n_rows, n, generator=g), torch.rand(n_rows, generator=g).double()
    for options in (dict(), dict(top_k=3), dict(top_p=0.7), dict(temperature=0.4, top_k=5, top_p=0.5)):
        together = draw(*candidates(logits, **options), luck)
        alone = [draw(*candidates(logits[b], **options), luck[b : b + 1]) for b in range(n_rows)]
        assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("logits", [
    torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 0), torch.zeros(0, 5), torch.zeros(3).long(),
    [1.0, 2.0], torch.tensor([1.0, math.nan]), torch.tensor([[0.0, 1], [0, math.inf]]),
    torch.full((1, 4), -math.inf),
])
@pytest.mark.parametrize("sampler", [temperature_sampling, top_k_sampling, top_p_sampling])
def test_bad_logits_are_value_errors(logits, sampler):
    with pytest.raises(ValueError):
        sampler(logits)


def test_the_plain_functions():
    logits = torch.tensor([[0.0, 5, 1, 2], [9, 0, 0, 0]])
    assert temperature_sampling(logits, 0).tolist() == [1, 0]
    assert top_k_sampling(logits, 1).tolist() == [1, 0]
    assert top_p_sampling(logits, 1e-9).tolist() == [1, 0]
    assert top_k_sampling(logits[0], 2, generator=torch.Generator().manual_seed(0)).shape == ()
    for sampler, bad in ((temperature_sampling, -1), (top_k_sampling, 0), (top_k_sampling, 2.5),
                         (top_p_sampling, 0), (top_p_sampling, 1.01), (temperature_sampling, math.inf)):
        with pytest.raises(ValueError, match=str(bad)):
            sampler(logits, bad)


def test_the_view_is_self_contained_and_small():
    logits = torch.randn(50257, generator=torch.Generator().manual_seed(0))
    body = sampling_view(logits, lambda i: f"<b>{i}</b>", title="a < b")._repr_html_()
    assert len(body) < 60_000 and "<noscript>" in body and "http" not in body
    assert "<b>1" not in body and "a &lt; b" in body  # a token's text is no markup
    with pytest.raises(ValueError):
        sampling_view(torch.tensor([0.0, math.nan]), str)
    body = sampling_view(torch.tensor([0.0, -math.inf, 3]), "token {}".format)._repr_html_()
    assert ["token 2", "token 0"] == json.loads(body.split('"tokens": ')[1].split("}")[0])


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e300, 10**400])
@pytest.mark.parametrize("cut", [dict(), dict(top_k=3), dict(top_p=0.5)])
def test_any_heat_draws_among_those_that_are_allowed(temperature, cut):
    """A temperature past float32's largest number made -inf / inf, that is NaN."""
    logits = torch.randn(2, 1500, generator=torch.Generator().manual_seed(0))
    logits[:, 3:1400] = -math.inf
    ids, probs = candidates(logits, temperature, **cut)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.double().sum(1), torch.ones(2).double())
    kept = [set(row[row >= 0].tolist()) for row in ids]
    allowed = {0, 1, 2, *range(1400, 1500)}
    assert all(row <= allowed for row in kept)
    assert len(kept[0]) == {(): 103, ("top_k",): 3, ("top_p",): 52}[tuple(cut)]


def test_the_histogram_equals_the_definition_at_its_edges():
    """Ties across the crossing bin, all tokens in one bin, and a far tail."""
    g = torch.Generator().manual_seed(1)
    flat = torch.zeros(1, 3000)
    tied = torch.randint(3, (1, 3000), generator=g) / 4
    tail = torch.cat([0.01 * torch.randn(1, 1500, generator=g), torch.full((1, 1500), -90.0)], 1)
    for logits in (flat, tied, tail):
        for p in (0.4, 0.5, 0.9, 0.999):
            ids, _ = candidates(logits, top_p=p)
            order = logits[0].sort(descending=True, stable=True).indices
            own = logits[0].double().softmax(0)[order]
            n = int((own.cumsum(0) - own < p - 1e-12).sum())
            kept = set(ids[0][ids[0] >= 0].tolist())
            assert abs(len(kept) - n) <= 1  # a sum of equal shares may meet p exactly
            assert kept == set(order[: len(kept)].tolist())


# --- the tournament --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1024, 2048, 4096, 49152, 50257, 50304, 50261])
@pytest.mark.parametrize("k", [1, 50, 256, 1500])
def test_the_tournament_finds_the_largest(n, k):
    """With and without a table of exact size, with ties, for k below and above its width."""
    for seed, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16)):
        logits = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
        order = np.argsort(-logits.double().numpy(), axis=1, kind="stable")[:, :k]
        values, ids = largest(logits, k)
        assert ids.tolist() == order.tolist()
        assert torch.equal(values, logits.gather(1, ids).to(values.dtype))


def test_a_tournament_with_too_few_columns_is_noticed(monkeypatch):
    """Negative control: a final of half the columns loses some of the largest."""
    logits = torch.randn(1, 50257, generator=torch.Generator().manual_seed(0))
    right = sampling.tournament
    due = largest(logits, 200)[1].tolist()

    def half(row, width, k):
        values, ids = right(row, width, k // 2)
        return np.resize(values, k), np.resize(ids, k)

    monkeypatch.setattr(sampling, "tournament", half)
    assert largest(logits, 200)[1].tolist() != due


@pytest.mark.parametrize("place", [0, 1733, 30_000, 50_256])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_logit_is_found_anywhere(place, bad):
    logits = torch.randn(2, 50257, generator=torch.Generator().manual_seed(0))
    logits[1, place] = bad
    for cut in (dict(), dict(top_k=50), dict(top_k=5000), dict(top_p=0.9), dict(temperature=0)):
        with pytest.raises(ValueError, match="row 1"):
            candidates(logits, **cut)
    tied = torch.zeros(1, 50257)  # NaN before a tie at the edge
    tied[0, place] = bad
    with pytest.raises(ValueError, match="row 0"):
        candidates(tied, top_k=50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [30, 50257])
def test_large_logits_are_never_changed(dtype, n):
    logits = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    before = logits.clone()
    for cut in (dict(), dict(top_k=5), dict(top_p=0.9), dict(top_k=20, top_p=0.5), dict(temperature=0)):
        candidates(logits, 0.7 if cut != dict(temperature=0) else 0, **{
            k: v for k, v in cut.items() if k != "temperature"})
        assert torch.equal(logits, before)


def test_logits_of_a_model_that_trains():
    logits = torch.randn(2, 3000, requires_grad=True)
    assert sample(logits, top_p=0.9).shape == sample(logits, top_k=5).shape == (2,)
