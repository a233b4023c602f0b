"""`Sampler` against a float64 oracle and transformers' processors, each and in a chain."""
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import oracle_kept

from gptbook import sampler as module
from gptbook.checkpoints import load_demo
from gptbook.generation import generate_text
from gptbook.sampler import Sampler, repeated
from gptbook.sampling import candidates

INF = math.inf


def normal(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(ids, probs, n):
    """Candidates as rows of probabilities (B, n), in float64."""
    return torch.zeros(len(ids), n + 1).double().scatter_add(1, ids % (n + 1), probs.double())[:, :n]


def found(logits, **options):
    """{id: probability} of one row."""
    ids, probs = Sampler(**options).candidates(logits)
    return {i: p for i, p in zip(ids[0].tolist(), probs[0].tolist()) if i >= 0}


# --- filters -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 64, 1500, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_sets_equal_the_oracle(n, dtype):
    grid = itertools.product((0.5, 1.7), (None, 3, 40), (None, 0.8), (None, 0, 0.02, 0.3, 1),
                             (None, 0.05, 0.5, 0.95, 1))
    for seed, (t, k, p, m, y) in enumerate(itertools.islice(grid, n % 3, None, 3)):
        logits = normal(2, n, seed=seed, scale=1 + seed % 4).to(dtype)
        options = dict(temperature=t, top_k=k, top_p=p, min_p=m, typical_p=y)
        ids, probs = Sampler(**options).candidates(logits)
        assert torch.allclose(probs.double().sum(1), torch.ones(2).double(), atol=1e-5)
        for b in range(2):
            due = oracle_kept(logits[b].double().numpy(), **options)
            ours = {i: q for i, q in zip(ids[b].tolist(), probs[b].tolist()) if i >= 0}
            assert set(ours) == set(due), (n, dtype, options)
            assert max(abs(ours[i] - due[i]) for i in due) < 2e-6  # float32 where uncut


def test_the_oracle_notices_a_wrong_filter(monkeypatch):
    """Negative controls: each turns the comparison above red."""
    logits = normal(300)
    for name, wrong, options in (
        ("near_the_peak", lambda d, m: torch.from_numpy(d).neg().exp().numpy() >= m / 2,
         dict(min_p=0.1)),
        ("typical", lambda d, mass: d.argsort()[:3], dict(typical_p=0.5)),
    ):
        due = set(oracle_kept(logits.numpy(), **options))
        assert set(found(logits, **options)) == due
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            assert set(found(logits, **options)) != due, name


def test_typical_may_drop_the_most_likely():
    z = torch.tensor([3.0, 2, 1, 0, -1])
    assert set(found(z, typical_p=0.2)) == {1}
    assert set(found(z, typical_p=0.2, top_k=1)) == {0}  # top-k comes first


def test_a_ban_stays_a_ban_through_every_filter():
    logits = normal(1, 3000).masked_fill(torch.arange(3000) % 7 != 3, -INF)
    for options in (dict(min_p=0.01), dict(typical_p=0.9999999), dict(top_k=2999, typical_p=0.99),
                    dict(min_p=0, top_p=0.9999999), dict(temperature=1e9, min_p=0.9)):
        assert all(i % 7 == 3 for i in found(logits, **options)), options


@pytest.mark.parametrize("options", [
    dict(min_p=0.05), dict(temperature=1.4, min_p=0.02), dict(typical_p=0.4), dict(typical_p=0.9),
    dict(temperature=1.2, top_k=20, top_p=0.95, min_p=0.03, typical_p=0.8),
    dict(repetition_penalty=1.5, presence_penalty=0.4, banned=[3]),
])
def test_frequencies_of_100_000_draws(options):
    logits, n, texts = normal(40, seed=1), 100_000, [[1, 2, 2, 5]]
    one = Sampler(**options)
    ids, probs = one.candidates(logits[None], texts, step=2)
    luck = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    from gptbook.sampling import draw
    drawn = draw(ids.expand(n, -1), probs.expand(n, -1), luck)
    due = oracle_kept(one.adjust(logits[None], texts, 2)[0], **{
        k: v for k, v in options.items() if k in ("temperature", "top_k", "top_p", "min_p", "typical_p")})
    seen, expected = torch.bincount(drawn, minlength=40).double(), torch.zeros(40).double()
    expected[list(due)] = n * torch.tensor(list(due.values()), dtype=torch.double)
    assert seen[expected == 0].sum() == 0
    common = expected > 5
    chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum()
    dof = max(1, int(common.sum()) - 1)
    assert chi2 < dof + 4.5 * math.sqrt(2 * dof) + 5
    wrong = expected.roll(1).clamp(min=1)  # negative control
    assert ((seen - wrong) ** 2 / wrong).sum() > 10 * dof


# --- transformers --------------------------------------------------------------------------


def theirs(**options):
    """transformers' processors in the order of its `_get_logits_processor`."""
    from transformers.generation import logits_process as t
    order = (
        ("repetition_penalty", t.RepetitionPenaltyLogitsProcessor),
        ("no_repeat_ngram", t.NoRepeatNGramLogitsProcessor),
        ("banned", lambda ids: t.SuppressTokensLogitsProcessor(ids, device="cpu")),
        ("temperature", t.TemperatureLogitsWarper), ("top_k", t.TopKLogitsWarper),
        ("top_p", t.TopPLogitsWarper), ("min_p", t.MinPLogitsWarper),
        ("typical_p", t.TypicalLogitsWarper))
    chain = [make(options[name]) for name, make in order if name in options]

    def scores(ids, logits):
        for processor in chain:
            logits = processor(ids, logits.clone())
        return logits.double().softmax(-1)
    return scores


ONE_BY_ONE = [
    dict(repetition_penalty=1.7), dict(repetition_penalty=0.6), dict(no_repeat_ngram=1),
    dict(no_repeat_ngram=2), dict(no_repeat_ngram=3), dict(banned=[0, 7]), dict(temperature=0.6),
    dict(top_k=9), dict(top_p=0.7), dict(min_p=0.1), dict(typical_p=0.3), dict(typical_p=0.9),
]
CHAINS = [
    dict(repetition_penalty=1.3, no_repeat_ngram=2, banned=[1, 5], temperature=1.5, top_k=60,
         top_p=0.9, min_p=0.1, typical_p=0.7),
    dict(repetition_penalty=2.0, temperature=0.7, top_p=0.95), dict(top_k=30, typical_p=0.6),
    dict(no_repeat_ngram=3, min_p=0.05, typical_p=0.95), dict(temperature=2.0, min_p=0.2),
]


@pytest.mark.parametrize("options", ONE_BY_ONE + CHAINS, ids=str)
@pytest.mark.parametrize("n", [12, 400])
def test_equal_to_transformers(options, n):
    generator = torch.Generator().manual_seed(n)
    for length in (1, 2, 3, 17, 60):
        logits = 2 * torch.randn(3, n, generator=generator)
        texts = torch.randint(min(n, 20), (3, length), generator=generator)
        if options.get("no_repeat_ngram") == 1 and n == 12:
            texts = texts % 8  # leave some
        due = theirs(**options)(texts, logits)
        ours = spread(*Sampler(**options).candidates(logits, texts, step=0), n)
        torch.testing.assert_close(ours, due, atol=2e-6, rtol=2e-5)


def test_the_order_matters_to_the_oracle():
    """Negative control: the chain in another order is not equal."""
    logits, texts = normal(4, 60), torch.randint(10, (4, 20), generator=torch.Generator().manual_seed(1))
    options = dict(temperature=2.0, top_p=0.6)
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper
    due = theirs(**options)(texts, logits)
    other = TemperatureLogitsWarper(2.0)(texts, TopPLogitsWarper(0.6)(texts, logits)).softmax(-1)
    ours = spread(*Sampler(**options).candidates(logits), 60)
    assert (ours - due).abs().max() < 1e-5 < 0.01 < (ours - other).abs().max()


# --- penalties -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 20), st.floats(0.5, 3),
       st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 9))
def test_penalties_equal_a_loop(text, step, theta, presence, frequency, seed):
    step, logits = min(step, len(text)), normal(1, 10, seed=seed)
    new = text[len(text) - step :]
    due = logits[0].double().clone()
    for i in set(text):
        due[i] = due[i] / theta if due[i] > 0 else due[i] * theta
    for i in set(new):
        due[i] -= new.count(i) * frequency + presence
    one = Sampler(repetition_penalty=theta, presence_penalty=presence, frequency_penalty=frequency)
    before = logits.clone()
    torch.testing.assert_close(one.adjust(logits, [text], step)[0].double(), due, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits, before)


def test_once_for_each_distinct_token():
    z = torch.tensor([[3.0, -1, 2, 0]])
    one = Sampler(repetition_penalty=2)
    assert one.adjust(z, [[0, 0, 0, 1]]).tolist() == [[1.5, -2, 2, 0]]
    assert (one.adjust(z, [[0, 1, 2, 3]]) <= z).all()  # none becomes likelier
    assert Sampler(frequency_penalty=1).adjust(z, [[0, 0, 0, 1]], 2).tolist() == [[2, -2, 2, 0]]
    assert Sampler(presence_penalty=1).adjust(z, [[0, 0, 0, 1]], 0).tolist() == z.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=15), st.integers(1, 5))
def test_repeated_is_exactly_what_would_repeat(text, n):
    def has_twice(t):
        grams = [tuple(t[i : i + n]) for i in range(len(t) - n + 1)]
        return grams[-1] in grams[:-1] if grams else False
    assert repeated(text, n) == [i for i in range(4) if has_twice([*text, i])]
    assert repeated(tuple(text), n) == repeated(text, n)


def test_forced_beats_a_ban_and_holds_at_its_step_only():
    one = Sampler(forced={1: 2}, banned=[2], top_k=3)
    logits = normal(2, 8)
    for step in (0, 2):
        ids, _ = one.candidates(logits, step=step)
        assert 2 not in ids.tolist()[0] + ids.tolist()[1]
    assert one(logits, torch.tensor([0.1, 0.9]).double(), step=1).tolist() == [2, 2]
    assert one.adjust(logits, step=0) is not logits and 2 in one.forced.values()


def test_all_banned_says_so():
    for one, texts in ((Sampler(banned=range(4)), None), (Sampler(no_repeat_ngram=1), [[0, 1, 2, 3]])):
        with pytest.raises(ValueError, match="no token is left"):
            one.candidates(normal(1, 4), texts)
    constrained = torch.tensor([[-INF, -INF, 1.0]])
    with pytest.raises(ValueError, match="no token is left"):
        Sampler(banned=[2]).candidates(constrained)


# --- settings and errors -------------------------------------------------------------------

BAD = [
    ("temperature", -1), ("temperature", math.nan), ("top_k", 0), ("top_k", 2.0), ("top_p", 0),
    ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan), ("min_p", "x"),
    ("min_p", True), ("typical_p", 0), ("typical_p", 1.01), ("typical_p", math.nan),
    ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", INF),
    ("repetition_penalty", None), ("presence_penalty", math.nan), ("presence_penalty", None),
    ("frequency_penalty", INF), ("frequency_penalty", "1"), ("no_repeat_ngram", 0),
    ("no_repeat_ngram", 1.5), ("no_repeat_ngram", True), ("banned", [-1]), ("banned", [1.5]),
    ("banned", 3), ("banned", ["a"]), ("forced", {-1: 2}), ("forced", {0: -2}), ("forced", {0.5: 1}),
    ("forced", [1, 2]), ("forced", 4),
]


@pytest.mark.parametrize("name, value", BAD, ids=str)
def test_bad_settings_are_value_errors_that_name_them(name, value):
    with pytest.raises(ValueError, match=name):
        Sampler(**{name: value})


def test_bad_texts_and_ids_are_value_errors():
    logits = normal(2, 6)
    for one, texts, step in (
        (Sampler(repetition_penalty=2), None, 0), (Sampler(no_repeat_ngram=2), [[1]], 0),
        (Sampler(repetition_penalty=2), [[1], [6]], 0), (Sampler(repetition_penalty=2), [[1], [-1]], 0),
        (Sampler(presence_penalty=2), [[1], [1]], 2), (Sampler(banned=[6]), None, 0),
        (Sampler(forced={3: 9}), [[1], [1]], 3),
    ):
        with pytest.raises(ValueError):
            one.candidates(logits, texts, step)
    for bad in (math.nan, INF):
        broken = logits.clone()
        broken[1, 2] = bad
        for one in (Sampler(), Sampler(banned=[2]), Sampler(forced={0: 1}), Sampler(min_p=0.1)):
            with pytest.raises(ValueError, match="row 1"):
                one.candidates(broken)


def test_logits_are_never_changed_and_rows_are_alone():
    logits, texts = normal(5, 300), [[1, 2, 3] * n for n in range(1, 6)]
    one = Sampler(temperature=1.2, top_p=0.95, min_p=0.01, typical_p=0.9, repetition_penalty=1.2,
                  presence_penalty=0.1, frequency_penalty=0.1, no_repeat_ngram=3, banned=[4])
    before, luck = logits.clone(), torch.rand(5, dtype=torch.double)
    together = one(logits, luck, texts, 2)
    assert torch.equal(logits, before)
    alone = [one(logits[b : b + 1], luck[b : b + 1], texts[b : b + 1], 2) for b in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()
    double = logits.double()
    before = double.clone()
    one.candidates(double, texts, 2)
    assert torch.equal(double, before)


def test_a_plain_sampler_is_the_plain_function():
    logits = normal(3, 200)
    for options in (dict(), dict(temperature=0), dict(temperature=0.7, top_k=5), dict(top_p=0.8)):
        for ours, due in zip(Sampler(**options).candidates(logits), candidates(logits, **options)):
            assert torch.equal(ours, due)
    assert Sampler(temperature=0, min_p=0.5, typical_p=0.1).candidates(logits)[0].shape == (3, 1)


def test_settings_are_values():
    banned, forced = [1, 2], {0: 3}
    one = Sampler(banned=torch.tensor(banned), forced=forced)
    forced[0] = 5
    assert one == Sampler(banned=(1, 2), forced={0: 3}) and one.forced == {0: 3}
    assert hash(one) == hash(Sampler(banned=(1, 2), forced={0: 3}))
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(AttributeError):
        one.temperature = 2


def test_it_writes_stories():
    model, tokenizer = load_demo()
    end = tokenizer.end_of_text
    one = Sampler(min_p=0.1, no_repeat_ngram=4, banned=[end], forced={0: tokenizer.encode("The")[0]})
    rows = generate_text(model, [[end]] * 2, 24, sampler=one, seed=0)
    again = generate_text(model, [[end]], 24, sampler=one, seed=1)
    assert rows[1] == again[0] and rows[0] != rows[1]
    for row in rows:
        assert row[1] == one.forced[0] and end not in row[1:]
        assert len({tuple(row[i : i + 4]) for i in range(len(row) - 3)}) == len(row) - 3
