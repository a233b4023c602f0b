"""Speculative decoding: the law of the rule is the model's, and greedy text is plain text."""

import math
from collections import Counter

import pytest
import torch

from gptbook import speculative as module
from gptbook.checkpoints import load_demo
from gptbook.core import RECIPES, GPTConfig, GPTModel, set_seed
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.sampler import Sampler
from gptbook.sampling import candidates
from gptbook.speculative import (
    Draft, Guess, ModelDraft, PromptLookup, residual, speculative_steps, speculative_text, verify,
)

V = 61
RECIPE = {
    "gpt2": {}, "llama": {}, "alibi": {}, "strided": {}, "switch": {}, "mixtral": {},
    "mistral": {"window": 8}, "longformer": {"window": 8}, "bigbird": {"window": 4},
}


def make(recipe="gpt2", seed=1, n_layers=2, scale=3.0, **sizes):
    set_seed(seed)
    config = GPTConfig(**{**dict(vocab_size=V, context_length=64, emb_dim=32, n_layers=n_layers,
                                 n_heads=2), **sizes}, recipe=recipe, options=RECIPE[recipe])
    model = GPTModel(config).eval()
    for p in model.parameters():
        p.data.mul_(scale if p.dim() > 1 else 1)  # so that a wrong key shows
    return model


class Wrong(Draft):
    """Right for some tokens, then wrong, as a cycle of counts says."""

    def __init__(self, text, counts=(0, 3, 1, 4, 2), n_tokens=4):
        self.text, self.counts, self.n_tokens, self.turn = text, counts, n_tokens, 0

    def propose(self, text, n):
        known = self.text[len(text) : len(text) + n]
        right = self.counts[self.turn % len(self.counts)]
        self.turn += 1
        return Guess([x if i < right else (x + 1) % V for i, x in enumerate(known)])


# The rule, exactly --------------------------------------------------------------------
def boundary(holds) -> float:
    """The largest number in [0, 1) for which a falling condition holds, to 2^-44; 0 if never."""
    low, high = 0.0, 1.0
    if not holds(0.0):
        return 0.0
    for _ in range(44):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def exact_law(p, q, rule=verify):
    """The law of the first token, from the implementation: its thresholds found by bisection."""
    size, law = len(p), torch.zeros(len(p), dtype=torch.double)
    rows = torch.stack((p, p))

    def first(x, accept, number):
        luck = torch.tensor([[accept, 0.0], [number, 0.0]], dtype=torch.double)
        found = rule(rows, q[None], [x], luck)
        return found[0], len(found)

    for x in q.nonzero()[:, 0].tolist():
        chance = boundary(lambda u: first(x, u, 0.0)[1] == 2)
        law[x] += q[x] * chance
        if chance > 1 - 1e-12:
            continue
        above, done = (1 + chance) / 2, 0.0
        for y in range(size):  # the draw's ids ascend with its number
            edge = boundary(lambda v: first(x, above, v)[0] <= y)
            law[y] += q[x] * (1 - chance) * (edge - done)
            done = edge
    return law


def pairs():
    random = torch.Generator().manual_seed(3)
    for size in (2, 3, 5, 8):
        for keep in (1.0, 0.5):
            shares = torch.rand(2, size, generator=random, dtype=torch.double) ** 2
            shares *= torch.rand(2, size, generator=random) <= keep
            shares += 1e-3 * torch.eye(size, dtype=torch.double)[:2]
            yield shares / shares.sum(1, keepdim=True)
    one, two = torch.eye(4, dtype=torch.double)[[0, 2]]
    even = torch.full((4,), 0.25, dtype=torch.double)
    yield from ([one, two], [one, one], [even, one], [one, even], [even, even])


def test_the_law_is_the_models_to_rounding():
    for p, q in pairs():
        assert (exact_law(p, q) - p).abs().max() < 1e-12, (p, q)


def resample(p, q, ids, luck):
    """Wrong: after a refusal from p."""
    found = verify(p, q, ids, luck)
    if len(found) == 1:
        found = [int(torch.searchsorted(p[0].cumsum(0), luck[1, :1], right=True).clamp(max=len(p[0]) - 1))]
    return found


def threshold(p, q, ids, luck):
    """Wrong: without chance."""
    sure = torch.where(p[0, ids[0]] >= q[0, ids[0]], 0.0, 1 - 1e-12)
    return verify(p, q, ids, torch.stack((luck[0] * 0 + sure, luck[1])))


def one_number(p, q, ids, luck):
    """Wrong: the number that refused draws as well."""
    return verify(p, q, ids, torch.stack((luck[0], luck[0])))


@pytest.mark.parametrize("rule", [resample, threshold])
def test_the_check_sees_a_wrong_rule(rule):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    q = torch.tensor([0.2, 0.7, 0.1], dtype=torch.double)
    assert (exact_law(p, q, rule) - p).abs().max() > 0.03


def chi_squared(counts, p, n):
    expected = n * p
    common = expected > 5
    seen = torch.zeros_like(p)
    seen[list(counts)] = torch.tensor([float(c) for c in counts.values()], dtype=p.dtype)
    rest = (seen[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum().clamp(min=5)
    chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum() + rest
    dof = int(common.sum())
    return chi2.item(), dof + 4.5 * math.sqrt(2 * dof) + 5


@pytest.mark.parametrize("rule, right", [
    (verify, True), (resample, False), (threshold, False), (one_number, False)])
def test_frequencies_with_random_numbers(rule, right):
    """The implementation drawn from: guesses of the draft too."""
    p = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05], dtype=torch.double)
    q = torch.tensor([0.1, 0.5, 0.1, 0.05, 0.25], dtype=torch.double)
    n, random = 3_000, torch.Generator().manual_seed(5)
    guesses = torch.multinomial(q, n, replacement=True, generator=random).tolist()
    luck = torch.rand(n, 2, 2, generator=random, dtype=torch.double)
    rows, draft = torch.stack((p, p)), q[None]
    counts = Counter(rule(rows, draft, [x], u)[0] for x, u in zip(guesses, luck))
    chi2, limit = chi_squared(counts, p, n)
    assert (chi2 < limit) == right, (chi2, limit)


def draws(target, draft, prompt, n, settings):
    """The first new token of n texts: it is drafted too, and goes all through the loop."""
    counts = Counter()
    for seed in range(n):
        text = speculative_text(target, prompt, 2, *settings, draft=draft, seed=seed)[0]
        counts[text[len(prompt)]] += 1
    return counts


@pytest.mark.parametrize("settings", [(1.0, None, None), (0.8, 6, 0.9)])
def test_frequencies_of_the_loop_with_a_real_draft(settings, monkeypatch):
    """Texts by a model with another model as its draft: the first token's law is p, filtered."""
    small = dict(vocab_size=12, context_length=16, emb_dim=16)
    model, other = make(n_layers=1, **small), make(n_layers=1, seed=2, **small)
    prompt = [3, 1, 4]
    with torch.no_grad():
        ids, probs = candidates(model(torch.tensor([prompt]))[:, -1], *settings)
    p = torch.zeros(12, dtype=torch.double)
    p[ids[ids >= 0]] = probs[ids >= 0].double()
    decoder, draft, n = Decoder(model, 1), ModelDraft(other, 1), 500
    chi2, limit = chi_squared(draws(decoder, draft, prompt, n, settings), p, n)
    assert chi2 < limit, (chi2, limit)
    if settings[1]:
        return
    monkeypatch.setattr(module, "verify", lambda p, q, ids, luck: verify(
        p, q, ids, torch.stack((0 * luck[0], luck[1]))))
    chi2, limit = chi_squared(draws(decoder, draft, prompt, n, settings), p, n)
    assert chi2 > limit, "the control: a rule that accepts all that can be passed"


def test_a_hundred_thousand_draws_from_a_real_draft():
    """The stories model, with itself in 4 bits and cooler as the draft."""
    model, tokenizer = load_demo()
    ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("The cat sat on the mat. It was")]])
    with torch.no_grad():
        p = model(ids)[0, -1].double().softmax(0)
        q = (Decoder(model, quantize="int4").read(ids)[0].double() / 0.3).softmax(0)
    n, random = 100_000, torch.Generator().manual_seed(11)
    guesses = torch.multinomial(q, n, replacement=True, generator=random)
    luck = torch.rand(2, n, generator=random, dtype=torch.double)
    refused = luck[0] * q[guesses] >= p[guesses]
    rest = residual(p, q).cumsum(0)
    drawn = torch.searchsorted(rest, luck[1] * rest[-1], right=True)
    found = torch.where(refused, drawn, guesses)
    for i in range(0, n, 997):  # the same as `verify`, number by number
        one = verify(torch.stack((p, p)), q[None], [int(guesses[i])],
                     torch.stack((luck[:, i], luck[:, 0]), 1))
        assert one[0] == found[i]
    chi2, limit = chi_squared(Counter(found.tolist()), p, n)
    assert chi2 < limit
    wrong = torch.where(refused, torch.multinomial(p, n, replacement=True, generator=random), guesses)
    chi2, limit = chi_squared(Counter(wrong.tolist()), p, n)
    assert chi2 > limit, "the control"


def test_nothing_is_drawn_from_nothing():
    p = torch.tensor([0.5, 0.5], dtype=torch.double)
    assert torch.equal(residual(p, p), p)
    assert torch.equal(residual(p, p + torch.tensor([1e-17, 0])), p)


def test_a_later_refusal_keeps_what_came_before():
    p = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.double)
    q, luck = p[:3].flip(1), torch.zeros(2, 4, dtype=torch.double)
    assert verify(p, p[:3], [0, 1, 2], luck) == [0, 1, 2, 0], "and the bonus"
    assert verify(p, q, [2, 1, 0], luck) == [0], "the first is refused: all behind it is void"
    assert verify(p, torch.stack((p[0], p[1], q[2])), [0, 1, 0], luck) == [0, 1, 2]
    assert verify(p[:1], p[:0], [], luck[:, :1]) == [0], "no guess: one of the model's own"


# The same text ------------------------------------------------------------------------
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("recipe", RECIPE)
def test_greedy_text_is_plain_text(recipe, deterministic):
    model, other = make(recipe), make(seed=4, n_layers=1)
    prompt, options = [5, 6, 7, 5, 6], dict(deterministic=deterministic)
    length = 45 if model.max_positions is None or model.max_positions >= 50 else 40
    plain = generate_text(model, prompt, length, 0, **options)
    for draft in (Wrong(plain[0]), PromptLookup(4), ModelDraft(other, 4), ModelDraft(model, 3)):
        found = []
        got = speculative_text(model, prompt, length, 0, draft=draft, **options,
                               callback=lambda row, one: found.append(one))
        assert got == plain, type(draft).__name__
        assert sum(len(one.ids) for one in found) == length
        assert all(0 <= one.n_accepted <= one.n_drafted <= draft.n_tokens for one in found)


def test_all_recipes_are_here():
    assert set(RECIPE) == set(RECIPES)


@pytest.mark.parametrize("form", [dict(quantize="int8"), dict(quantize="int4"),
                                  dict(dtype=torch.bfloat16)])
def test_greedy_text_of_quantized_models(form):
    decoder, prompt = Decoder(make(), 1, 60, **form), [1, 2, 3]
    plain = generate_text(decoder, prompt, 40, 0)
    for draft in (Wrong(plain[0]), PromptLookup(), ModelDraft(make(), 3)):
        assert speculative_text(decoder, prompt, 40, 0, draft=draft) == plain


def test_the_check_sees_a_cache_that_keeps_refused_tokens():
    class Forgetful(Decoder):
        def truncate(self, length):
            pass

    model, prompt = make(), [5, 6, 7]
    plain = generate_text(model, prompt, 12, 0)
    assert speculative_text(Decoder(model, 1, 60), prompt, 12, 0, draft=Wrong(plain[0])) == plain
    assert speculative_text(Forgetful(model, 1), prompt, 12, 0, draft=Wrong(plain[0])) != plain


@pytest.mark.parametrize("settings", [(1.0, None, None), (0.7, 5, None), (1.2, None, 0.8)])
def test_a_seed_gives_the_text_of_generate_text(settings):
    model, prompts = make(scale=1.0), [[5, 6, 7], [9, 8, 9, 8], [4]]
    plain = generate_text(model, prompts, 40, *settings, seed=3, deterministic=True)
    for draft in (PromptLookup(), PromptLookup(5, 2, adaptive=False)):
        got = speculative_text(model, prompts, 40, *settings, draft=draft, seed=3, deterministic=True)
        assert got == plain
    assert plain != generate_text(model, prompts, 40, *settings, seed=4, deterministic=True)


@pytest.mark.parametrize("sampler", [
    Sampler(0.8, repetition_penalty=1.4), Sampler(0, frequency_penalty=2.0, presence_penalty=1.0),
    Sampler(1.0, no_repeat_ngram=2), Sampler(0.9, forced={2: 7, 9: 7}, banned=(3, 4)),
    Sampler(1.0, min_p=0.1, typical_p=0.9),
])
def test_penalties_see_the_guess(sampler):
    model, prompt = make(scale=1.0), [5, 6, 7, 5, 6, 7]
    options = dict(sampler=sampler, seed=2, deterministic=True)
    plain = generate_text(model, prompt, 40, **options)
    for draft in (PromptLookup(5), Wrong(plain[0])):
        assert speculative_text(model, prompt, 40, draft=draft, **options) == plain


def test_the_check_sees_penalties_that_miss_the_guess(monkeypatch):
    right = module.filtered
    monkeypatch.setattr(module, "filtered", lambda logits, text, guessed, *rest: right(
        logits, text, [guessed[0]] * len(guessed) if guessed else [], *rest))
    model, prompt = make(scale=1.0), [5, 6, 7, 5, 6, 7]
    options = dict(sampler=Sampler(0, frequency_penalty=2.0), seed=2, deterministic=True)
    plain = generate_text(model, prompt, 40, **options)
    assert speculative_text(model, prompt, 40, draft=Wrong(plain[0], (4,)), **options) != plain


def test_a_model_as_its_own_draft_is_never_refused():
    model, found = make(scale=1.0), []
    speculative_text(model, [1, 2], 41, 0.9, 20, 0.95, draft=ModelDraft(model, 4), seed=1,
                     callback=lambda row, one: found.append(one))
    assert all(one.n_accepted == one.n_drafted for one in found)
    assert len(found) == math.ceil(41 / 5)


def test_ends_and_lengths():
    model, prompt = make(), [5, 6, 7]
    plain = generate_text(model, prompt, 30, 0)[0]
    stop = plain[3 + 7]
    want = generate_text(model, prompt, 30, 0, end_of_text=stop)
    for draft in (Wrong(plain, (4,)), Wrong(plain, (0,)), PromptLookup()):
        assert speculative_text(model, prompt, 30, 0, draft=draft, end_of_text=stop) == want
    for length in range(8):
        for draft in (Wrong(plain, (4,)), ModelDraft(model, 4)):
            got = speculative_text(model, prompt, length, 0, draft=draft)
            assert got == [plain[: 3 + length]]
    full = speculative_text(model, prompt, 61, 0, draft=PromptLookup())[0]
    assert len(full) == 64, "to the last position"
    assert full == generate_text(model, prompt, 61, 0)[0]


def test_a_draft_with_a_shorter_context_falls_silent():
    model, small, found = make(), make(n_layers=1, seed=3, context_length=20), []
    plain = generate_text(model, [1, 2, 3], 50, 0)
    got = speculative_text(model, [1, 2, 3], 50, 0, draft=ModelDraft(small, 4),
                           callback=lambda row, one: found.append(one.n_drafted))
    assert got == plain and found[0] == 4 and found[-1] == 0


def test_rows_are_written_one_after_the_other():
    model, prompts = make(scale=1.0), [[1, 2, 3], [4], [5, 6]]
    draft, rows = ModelDraft(make(seed=5, scale=1.0), 3), []
    options = dict(length=20, draft=draft, temperature=0.8, deterministic=True)
    together = speculative_text(model, prompts, seed=9, **options,
                                callback=lambda row, one: rows.append(row))
    alone = [speculative_text(model, prompt, seed=9 + b, **options)[0]
             for b, prompt in enumerate(prompts)]
    assert together == alone and rows == sorted(rows)


# Lookup -------------------------------------------------------------------------------
def naive_lookup(text, n, ngram):
    for size in range(min(ngram, len(text)), 0, -1):
        for at in range(len(text) - 1, size - 1, -1):  # the latest first
            if text[at - size : at] == text[-size:]:
                longer = text[at:]
                while len(longer) < n:
                    longer = longer + text[at:]
                return longer[:n]
    return []


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
def test_lookup_finds_the_latest_of_the_longest(ngram):
    random = torch.Generator().manual_seed(ngram)
    lookup = PromptLookup(7, ngram)
    for _ in range(20):
        text = torch.randint(4, (60,), generator=random).tolist()
        lookup.start(None, 0, None, None)
        for end in sorted(set(torch.randint(1, 60, (15,), generator=random).tolist())):
            assert lookup.propose(text[:end], 7).ids == naive_lookup(text[:end], 7, ngram)


def test_lookup_learns_how_much_to_guess():
    lookup, text = PromptLookup(8), [1, 2, 3] * 5
    lookup.start(None, 0, None, None)
    sizes = []
    for drafted, accepted in [(8, 0), (1, 1), (3, 3), (7, 2), (5, 5), (8, 8)]:
        lookup.learn(drafted, accepted)
        sizes.append(len(lookup.propose(text, 8).ids))
    assert sizes == [1, 3, 7, 5, 8, 8]
    lookup.learn(0, 0)
    assert len(lookup.propose(text, 8).ids) == 8, "no guess, nothing learned"
    fixed = PromptLookup(8, adaptive=False)
    fixed.start(None, 0, None, None)
    fixed.learn(8, 0)
    assert len(fixed.propose(text, 8).ids) == 8


def test_text_that_repeats_takes_fewer_readings():
    model = make()
    loop = generate_text(model, [5, 6, 7], 50, 0)[0]
    found = []
    speculative_text(model, loop[:30], 30, 0, draft=PromptLookup(8),
                     callback=lambda row, one: found.append(one))
    n_known = sum(loop[i] in loop[:i] for i in range(30, 53))
    assert n_known > 15 and len(found) < 15


# Errors -------------------------------------------------------------------------------
@pytest.mark.parametrize("options, what", [
    (dict(input_ids=[[1], [2]]), "2 prompts"), (dict(input_ids=[]), "prompt"),
    (dict(input_ids=[1, 99]), "99"), (dict(length=-1), "length=-1"),
    (dict(length=70), "ask for length=61"), (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(sampler=Sampler(), top_k=3), "belong to the sampler"), (dict(seed=[1, 2]), "seed"),
])
def test_errors_at_the_call(options, what):
    given = {**dict(input_ids=[1, 2, 3], length=5, draft=PromptLookup()), **options}
    with pytest.raises(ValueError, match=what):
        speculative_steps(make(), **given)


@pytest.mark.parametrize("options, what", [
    (dict(draft=GPTModel(GPTConfig(V, 8, 8, 1, 1))), "draft=GPTModel is no `Draft`: ModelDraft"),
    (dict(end_of_text="."), "end_of_text='.'"), (dict(sampler=5), "sampler=5"),
    (dict(sampler=lambda *given: 1), "must be a `Sampler`"),
    (dict(sampler=Sampler(banned=(99,))), "id 99"),
])
def test_what_is_no_draft_no_end_and_no_sampler(options, what):
    given = {**dict(input_ids=[1, 2, 3], length=5, draft=PromptLookup()), **options}
    for write in (speculative_steps, speculative_text):
        with pytest.raises(ValueError, match=what):
            write(make(), **given)


def test_errors_of_drafts():
    with pytest.raises(ValueError, match="n_tokens=0"):
        PromptLookup(0)
    with pytest.raises(ValueError, match="ngram=True"):
        PromptLookup(ngram=True)
    with pytest.raises(ValueError, match="n_tokens=-1"):
        ModelDraft(make(), -1)
    other = ModelDraft(make(vocab_size=60))
    with pytest.raises(ValueError, match="60 tokens, the model 61"):
        speculative_text(make(), [1], 5, draft=other)
    decoder = Decoder(make(), 1)
    with pytest.raises(ValueError, match="share one decoder"):
        speculative_text(decoder, [1], 5, draft=ModelDraft(decoder))
    with pytest.raises(NotImplementedError):
        speculative_text(make(), [1], 5, draft=Draft())


def test_a_ring_without_spare_slots_is_refused():
    model = make("mistral")
    with pytest.raises(ValueError, match="spare=4"):
        speculative_text(Decoder(model, 1, 60), [1, 2], 40, 0, draft=ModelDraft(make(), 4))
    decoder = Decoder(model, 1, 60, spare=4)
    plain = generate_text(model, [1, 2], 40, 0)
    assert speculative_text(decoder, [1, 2], 40, 0, draft=ModelDraft(make(), 4)) == plain
    short = Decoder(model, 1, 60)  # a text that fits the window takes nothing back from a ring
    assert len(speculative_text(short, [1, 2], 5, 0, draft=PromptLookup())[0]) == 7
