"""Beam search: brute force, transformers, the definition of groups, and every edge."""
import itertools
import math
import random
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch

import gptbook.beam as beam
import gptbook.recipes  # noqa: F401, they register themselves
from gptbook.beam import BeamRules, Beams, Hypothesis, beam_search, beam_steps, best_of
from gptbook.checkpoints import load_demo
from gptbook.constrained import Constraint
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.quantized_cache import Int8Cache
from gptbook.sampler import Sampler, repeated


def loud(vocab=61, context=48, seed=1, scale=4, recipe="gpt2", **options):
    """A random model with opinions: equal probabilities would be ordered by rounding."""
    set_seed(seed)
    model = GPTModel(GPTConfig(vocab, context, 24, 2, 4, recipe=recipe, options=options))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model.eval()


@pytest.fixture(scope="module")
def writer():
    return loud()


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8], [9, 7, 9, 3, 2]]


@torch.no_grad()
def next_log_probs(model, text):
    return model(torch.tensor([list(text)]))[0, -1].float().log_softmax(-1)


def told(model, one: Hypothesis) -> float:
    """The model's own log-probability of a text, without any cache."""
    with torch.no_grad():
        log_probs = model(torch.tensor([one.ids]))[0].float().log_softmax(-1)
    return sum(log_probs[i - 1, one.ids[i]].item()
               for i in range(one.n_prompt, len(one.ids)))


def every_text(model, prompt, length, end=None):
    """(new ids, log-probability) of all texts, each cut at its end."""
    done, going = [], [((), 0.0)]
    for step in range(length):
        longer = []
        for new, total in going:
            for token, x in enumerate(next_log_probs(model, [*prompt, *new]).tolist()):
                ends = token == end or step == length - 1
                (done if ends else longer).append(((*new, token), total + x))
        going = longer
    return done


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
def test_a_full_width_equals_brute_force(end, penalty):
    model, prompt = loud(4, 8, scale=6), [1, 3]
    want = [(list(new), total / len(new) ** penalty)
            for new, total in every_text(model, prompt, 4, end)]
    want.sort(key=lambda pair: -pair[1])
    for early in (False, True, "never"):
        found = beam_search(model, prompt, 4**4, 4, penalty, end_of_text=end,
                            early_stopping=early)
        assert [one.new_ids for one in found] == [new for new, _ in want]
        assert [one.score for one in found] == pytest.approx([s for _, s in want], rel=1e-5, abs=1e-4)
        assert all(one.ids == prompt + one.new_ids for one in found)
        assert all(one.finished == (one.new_ids[-1] == end) for one in found)


def test_a_narrow_search_may_miss_the_best():
    """The control of the test above: brute force is not what every width finds."""
    missed = 0
    for seed in range(8):
        model = loud(4, 8, seed=seed, scale=2.5)
        best = max(every_text(model, [1, 3], 4), key=lambda pair: pair[1])[0]
        missed += beam_search(model, [1, 3], 1, 4)[0].new_ids != list(best)
    assert 0 < missed < 8


@pytest.mark.parametrize("recipe", ["gpt2", "llama"])
def test_width_one_is_greedy(recipe):
    model = loud(recipe=recipe)
    for end in (None, 17):
        texts = generate_text(model, PROMPTS, 25, temperature=0, end_of_text=end)
        found = beam_search(model, PROMPTS, 1, 25, end_of_text=end, early_stopping=True)
        assert [one.ids for one, in found] == texts


def exported(model, folder):
    transformers = pytest.importorskip("transformers")
    from gptbook.pretrained import export_transformers

    path = export_transformers(model, folder / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def transformers_search(theirs, rows, width, length, penalty, end, early, shortest=0, n=None):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = theirs.generate(
        ids, attention_mask=mask, num_beams=width, max_new_tokens=length, do_sample=False,
        length_penalty=penalty, eos_token_id=end, pad_token_id=0, early_stopping=early,
        num_return_sequences=width, min_new_tokens=shortest or None,
        no_repeat_ngram_size=n or 0, return_dict_in_generate=True, output_scores=True)
    found = []
    for text, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
        new = text[longest:]
        if end in new:
            new = new[: new.index(end) + 1]
        found.append((new, score))
    return [found[i : i + width] for i in range(0, len(found), width)]


def common_token(model) -> int:
    """A token that the model writes often, to end texts with."""
    text = generate_text(model, [[3], [5], [8], [13]], 40, seed=0)
    ids = [i for row in text for i in row[1:] if i]
    return max(set(ids), key=ids.count)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("recipe", ["gpt2", "llama"])
def test_transformers_finds_the_same(recipe, tmp_path):
    model = loud(recipe=recipe, scale=4 if recipe == "gpt2" else 3)
    theirs, often, ended, lengths = exported(model, tmp_path), common_token(model), 0, set()
    grid = list(itertools.product((2, 3, 5), (0.0, 1.0, 2.0, -0.5), (False, True, "never"),
                                  (often, often, None), ((0, None), (5, None), (0, 2), (4, 3))))
    random.Random(recipe).shuffle(grid)
    for i, (width, penalty, early, end, (shortest, n)) in enumerate(grid[:40]):
        shortest = shortest if end is not None else 0
        rows = PROMPTS[:2] if i % 4 else PROMPTS[1:]
        if n:  # transformers also bans n-grams that only its padding holds
            rows = rows[:1]
        ours = beam_search(model, rows, width, 12, penalty, end_of_text=end,
                           early_stopping=early, min_length=shortest, no_repeat_ngram=n)
        want = transformers_search(theirs, rows, width, 12, penalty, end, early, shortest, n)
        for found, other in zip(ours, want):
            assert [one.new_ids for one in found] == [new for new, _ in other]
            scores = torch.tensor([s for _, s in other])
            torch.testing.assert_close(torch.tensor([one.score for one in found]), scores,
                                       atol=1e-4, rtol=1e-5)
            ended += sum(one.finished for one in found)
            lengths |= {len(one.new_ids) for one in found}
    assert ended > 8 and len(lengths) > 2, "the grid must hold texts that end"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ten_beams_on_the_stories_are_those_of_transformers(tmp_path):
    model, tokenizer = load_demo()
    theirs, end = exported(model, tmp_path), tokenizer.end_of_text
    prompt = [end, *tokenizer.encode("Once upon a time")]
    found = beam_search(model, prompt, 10, 40, 0.0, end_of_text=end)
    (want,) = transformers_search(theirs, [prompt], 10, 40, 0.0, end, False)
    assert [one.new_ids for one in found] == [new for new, _ in want]
    assert [one.score for one in found] == pytest.approx([x for _, x in want], rel=1e-4)


def naive_groups(model, prompt, width, length, groups, diversity):
    """Vijayakumar et al. 2018, algorithm 1, one text at a time; no text ends."""
    search = [[(0.0, tuple(prompt))] for _ in range(groups)]
    for _ in range(length):
        used = []
        for g, beams in enumerate(search):
            options = []
            for total, text in beams:
                for token, x in enumerate(next_log_probs(model, text).tolist()):
                    cost = diversity * used.count(token)
                    options.append((total + x - cost, total + x, (*text, token)))
            options.sort(reverse=True)
            search[g] = [(total, text) for _, total, text in options[: width // groups]]
            used += [text[-1] for _, text in search[g]]
    return search


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("diversity", [0.3, 2.0, 50.0])
def test_groups_follow_the_definition(writer, groups, diversity):
    want = naive_groups(writer, [3, 5, 8], 6, 7, groups, diversity)
    found = beam_search(writer, [3, 5, 8], 6, 7, 0.0, groups=groups, diversity=diversity)
    expected = sorted({text: total for beams in want for total, text in beams}.items(),
                      key=lambda pair: -pair[1])
    assert [one.ids for one in found] == [list(text) for text, _ in expected]
    assert [one.log_prob for one in found] == pytest.approx(
        [total for _, total in expected], abs=1e-4)
    plain = beam_search(writer, [3, 5, 8], 6, 7, 0.0)
    assert [one.ids for one in found] != [one.ids for one in plain]  # the control


def test_groups_in_a_batch_equal_groups_alone(writer):
    options = dict(beam_width=6, max_length=12, groups=3, diversity=1.5, end_of_text=17)
    together = beam_search(writer, PROMPTS, **options)
    for found, prompt in zip(together, PROMPTS):
        alone = beam_search(writer, prompt, **options)
        assert [one.ids for one in found] == [one.ids for one in alone]


def test_a_batch_equals_its_rows(writer):
    for end, n in ((None, None), (common_token(writer), None), (None, 2)):
        options = dict(beam_width=4, max_length=15, end_of_text=end, no_repeat_ngram=n)
        for found, prompt in zip(beam_search(writer, PROMPTS, **options), PROMPTS):
            alone = beam_search(writer, prompt, **options)
            assert [one.ids for one in found] == [one.ids for one in alone]
            assert [one.score for one in found] == pytest.approx(
                [one.score for one in alone], abs=1e-4)


@pytest.mark.parametrize("recipe", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("forget", [False, True])
def test_scores_are_those_of_the_texts(recipe, forget):
    """The cache goes with the beams: the model, read without one, says the same."""
    options = {"window": 6} if recipe == "mistral" else {}
    model = loud(recipe=recipe, scale=3, **options)

    def keep(decoder, parents, shared):
        if shared is None:
            decoder.reorder(parents)

    with patch.object(beam, "follow", keep if forget else beam.follow):
        found = beam_search(model, PROMPTS, 5, 25)
    off = max(abs(told(model, one) - one.log_prob) for row in found for one in row)
    assert (off > 0.1) if forget else (off < 2e-3)


def test_decoders(writer):
    want = [one.ids for one in beam_search(writer, [3, 5], 5, 15)]
    decoder = Decoder(writer, 5)
    for _ in range(2):  # a second search begins from nothing
        assert [one.ids for one in beam_search(decoder, [3, 5], 5, 15)] == want
    generate_text(decoder, [9, 9], 5)
    assert [one.ids for one in beam_search(decoder, [3, 5], 5, 15)] == want
    small = beam_search(Decoder(writer, 5, cache=Int8Cache), [3, 5], 5, 15)
    assert abs(told(writer, small[0]) - small[0].log_prob) < 1
    with pytest.raises(ValueError, match="10 rows do not fit"):
        beam_search(decoder, [[3, 5], [4]], 5, 15)


@pytest.mark.parametrize("convert", [
    torch.tensor, lambda x: torch.tensor(x).numpy(), list, tuple])
def test_a_row_gives_a_list_and_rows_give_lists(writer, convert):
    one = beam_search(writer, convert([3, 5]), 2, 4)
    many = beam_search(writer, convert([[3, 5], [3, 6]]), 2, 4)
    assert isinstance(one[0], Hypothesis) and len(many) == 2
    assert [h.ids for h in many[0]] == [h.ids for h in one]
    assert len(beam_search(writer, [[3, 5]], 2, 4)) == 1


def test_the_best_comes_first_and_the_prompt_does_not_count(writer):
    for penalty in (0.0, 1.0, 2.0):
        found = beam_search(writer, PROMPTS[0], 5, 10, penalty, end_of_text=17)
        scores = [one.score for one in found]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
        for one in found:
            n = len(one.new_ids)
            assert one.score == pytest.approx(one.log_prob / n**penalty)
    assert beam_search(writer, PROMPTS[0], 5, 10, n_best=2) == beam_search(
        writer, PROMPTS[0], 5, 10)[:2]


def test_bans(writer):
    end = common_token(writer)
    for one in beam_search(writer, [3, 5], 4, 20, end_of_text=end, min_length=9):
        assert len(one.new_ids) > 9 and end not in one.new_ids[:-1]
    looping = beam_search(writer, [3, 5], 4, 30)[0].ids
    free = beam_search(writer, [3, 5], 4, 30, no_repeat_ngram=2)[0].ids
    pairs = lambda ids: len(set(zip(ids, ids[1:]))) == len(ids) - 1
    assert pairs(free) and not pairs(looping)


def test_adjust_sees_log_probs_and_texts(writer):
    seen = []

    def only_even(log_probs, rows, texts, step):
        assert len(rows) == len(texts) == len(log_probs)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(rows)))
        seen.append((step, texts[0]))
        log_probs[:, 1::2] = -math.inf
        return log_probs

    found = beam_search(writer, [3, 5], 3, 6, adjust=only_even)
    assert all(i % 2 == 0 for one in found for i in one.new_ids)
    assert [step for step, _ in seen] == list(range(6))
    assert all(text[:2] == [3, 5] and len(text) == 2 + step for step, text in seen)
    assert found[0].log_prob == pytest.approx(told(writer, found[0]), abs=1e-4)


def test_adjust_takes_a_sampler(writer):
    sampler = Sampler(no_repeat_ngram=2)
    found = beam_search(writer, [3, 5], 4, 25,
                        adjust=lambda x, rows, texts, step: sampler.adjust(x, texts, step))
    same = beam_search(writer, [3, 5], 4, 25, no_repeat_ngram=2)
    assert [one.ids for one in found] == [one.ids for one in same]


def test_adjust_takes_a_constraint():
    """A pattern holds in every beam, though beams change places at each step."""
    model, tokenizer = load_demo()
    end = tokenizer.end_of_text
    pattern = "(?:Lily|Jack) (?:sat|ran) [a-z]{3,9}\\."
    found = beam_search(model, [end], 5, 25, end_of_text=end,
                        adjust=Constraint(pattern, tokenizer))
    texts = [tokenizer.decode(one.new_ids[:-1]) for one in found]
    assert all(one.finished for one in found) and len(set(texts)) > 1
    assert all(re.fullmatch(pattern, text) for text in texts), texts


def test_a_dead_end_stops_the_text(writer):
    def close(log_probs, rows, texts, step):
        return log_probs.fill_(-math.inf) if step == 3 else log_probs

    found = beam_search(writer, [3, 5], 3, 10, adjust=close)
    assert [len(one.new_ids) for one in found] == [3, 3, 3]
    assert not any(one.finished for one in found)
    want = beam_search(writer, [3, 5], 3, 3)
    assert [one.ids for one in found] == [one.ids for one in want]
    with pytest.raises(ValueError, match="is banned"):
        beam_search(writer, [3, 5], 3, 10, adjust=lambda x, *_: x.fill_(-math.inf))
    with pytest.raises(ValueError, match="adjust returned NaN"):
        beam_search(writer, [3, 5], 3, 10, adjust=lambda x, *_: x.fill_(math.nan))


def test_an_end_that_the_model_does_not_have_never_comes(writer):
    want = beam_search(writer, [3, 5], 3, 6)
    for end in (61, -1, 10**20):
        assert beam_search(writer, [3, 5], 3, 6, end_of_text=end, min_length=2) == want


def test_numbers_of_numpy_are_whole_numbers_too(writer):
    want = beam_search(writer, [3, 5], 3, 6, n_best=2)
    assert beam_search(writer, [3, 5], np.int64(3), np.int64(6), n_best=np.int64(2)) == want


def test_fewer_tokens_than_beams():
    """Two tokens, seven beams: the search holds what there is."""
    model = loud(2, 16, scale=6)
    assert len(beam_search(model, [1], 7, 2)) == 4
    assert len(beam_search(model, [1], 7, 1)) == 2
    found = beam_search(model, [1], 7, 5)
    assert len({tuple(one.ids) for one in found}) == 7


def test_steps_can_be_watched_and_left(writer):
    rules = BeamRules(3, 8)
    seen = []
    for searches in beam_steps(writer, [3, 5], rules):
        seen.append([one.new_ids for one in searches[0][0].live])
        if len(seen) == 4:
            break
    assert [len(texts[0]) for texts in seen] == [1, 2, 3, 4]
    for before, after in zip(seen, seen[1:]):
        assert all(text[:-1] in before for text in after)
    *_, searches = beam_steps(writer, [3, 5], rules)
    assert best_of(searches[0]) == beam_search(writer, [3, 5], 3, 8)
    assert searches[0][0].done and not searches[0][0].live


def options_of(*pairs):
    return [(log_prob, beam, token) for log_prob, beam, token in pairs]


def test_bookkeeping_by_hand():
    search = Beams([7], BeamRules(2, 9, 1.0, end_of_text=0))
    search.advance(options_of((-0.5, 0, 3), (-0.9, 0, 0), (-1.1, 0, 4), (-1.2, 0, 5)))
    assert [one.new_ids for one in search.live] == [[3], [4]] and search.parents == [0, 0]
    assert [one.score for one in search.ended] == [-0.9]
    # a third-best end does not count: only those that would have been beams may end
    search.advance(options_of((-0.6, 0, 3), (-0.7, 1, 3), (-0.8, 0, 0), (-0.9, 1, 0)))
    assert len(search.ended) == 1 and search.parents == [0, 1] and not search.done
    # the second end is worse than the hope of the best beam: the search goes on
    search.advance(options_of((-1.8, 0, 0), (-2.0, 1, 5), (-2.1, 0, 5)))
    assert [one.score for one in search.ended] == [pytest.approx(-0.6), -0.9]
    assert not search.done  # -2.0 / 3 beats -0.9
    search.advance(options_of((-3.9, 0, 5), (-4.0, 1, 5)))
    assert search.done and not search.live  # -3.9 / 4 does not


@pytest.mark.parametrize(("early", "penalty", "n", "best", "want"), [
    (True, 1.0, 3, -0.1, True), (False, 1.0, 3, -2.9, False), (False, 1.0, 3, -3.1, True),
    ("never", 1.0, 3, -9.9, False), ("never", 1.0, 3, -10.1, True),
    ("never", 0.0, 3, -1.1, True), ("never", -1.0, 3, -0.4, True)])
def test_when_a_search_has_settled(early, penalty, n, best, want):
    rules = BeamRules(2, 10, penalty, 0, early)
    full = [Hypothesis([1, 0], 1, -0.5, -0.5, True), Hypothesis([1, 0], 1, -1.0, -1.0, True)]
    assert rules.settled(best, n, full) is want
    assert not rules.settled(best, n, full[:1])


@pytest.mark.parametrize(("parents", "want"), [
    ([0, 0, 1, 2, 3], [0, 4, 1, 2, 3]), ([3, 3, 3, 3, 3], [3, 0, 1, 2, 4]),
    ([4, 3, 2, 1, 0], [4, 3, 2, 1, 0]), ([1, 0, 0], [1, 0, 2])])
def test_most_rows_stay_where_they_are(parents, want):
    rows = beam.places(parents)
    assert rows == want and sorted(rows) == list(range(len(parents)))


def test_equal_probabilities_keep_the_lower_ids():
    model = GPTModel(GPTConfig(5, 16, 8, 1, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = beam_search(model, [1], 3, 3)
    assert [one.new_ids for one in found] == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


def test_nothing_is_left_behind(writer):
    before = {name: x.clone() for name, x in writer.state_dict().items()}
    prompt = torch.tensor([[3, 5], [4, 6]])
    beam_search(writer, prompt, 3, 6, end_of_text=2, no_repeat_ngram=2)
    assert prompt.tolist() == [[3, 5], [4, 6]] and torch.is_grad_enabled()
    assert all(torch.equal(x, before[name]) for name, x in writer.state_dict().items())
    with torch.inference_mode():
        inside = beam_search(writer, [3, 5], 3, 6)
    assert inside == beam_search(writer, [3, 5], 3, 6)


def test_not_a_number_is_an_error():
    model = loud()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="nan"):
        beam_search(model, [3, 5], 3, 6)


@pytest.mark.parametrize(("options", "message"), [
    (dict(beam_width=0), "beam_width=0"), (dict(beam_width=2.0), "beam_width=2.0"),
    (dict(beam_width=True), "beam_width=True"), (dict(max_length=0), "max_length=0"),
    (dict(max_length=47), "46"), (dict(length_penalty=math.nan), "length_penalty=nan"),
    (dict(length_penalty=500), "length_penalty=500"),
    (dict(end_of_text="end"), "end_of_text='end'"),
    (dict(early_stopping="always"), "early_stopping='always'"),
    (dict(early_stopping=1), "early_stopping=1"), (dict(n_best=6), "n_best=6"),
    (dict(n_best=0), "n_best=0"), (dict(min_length=-1), "min_length=-1"),
    (dict(no_repeat_ngram=0), "no_repeat_ngram=0"), (dict(groups=5), "diversity=0.0"),
    (dict(diversity=1.0), "diversity=1.0"), (dict(groups=0), "groups=0"),
    (dict(groups=2, diversity=1.0), "beam_width=5"),
    (dict(groups=5, diversity=-1.0), "diversity=-1.0"),
    (dict(groups=5, diversity=math.inf), "diversity=inf"),
    (dict(groups=5, diversity=True), "diversity=True"),
    (dict(length_penalty=True), "length_penalty=True"),
    (dict(length_penalty=10**400), "length_penalty=1000"), (dict(adjust=[1]), r"adjust=\[1\]"),
    (dict(adjust=lambda x, *_: None), "adjust returned None"),
    (dict(adjust=lambda x, *_: x[:, :5]), r"adjust returned \(1, 5\)"),
])
def test_errors_name_the_value(writer, options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(writer, [3, 5], **{"max_length": 10, **options})


@pytest.mark.parametrize("prompt", [[], [[]], [61], [-1], [[3], []], [1.5]])
def test_bad_prompts(writer, prompt):
    with pytest.raises(ValueError, match="prompt"):
        beam_search(writer, prompt, 2, 4)


def test_repeated_bans_what_brute_force_bans(writer):
    """The rule that the search leans on, over random texts."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 4):
        text = torch.randint(3, (30,), generator=generator).tolist()
        grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        tail = tuple(text[len(text) - n + 1 :])
        assert repeated(text, n) == [t for t in range(3) if (*tail, t) in grams]
