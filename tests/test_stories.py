"""The story world: exact probability, ground truth, critic, corpus."""
import hashlib
import math
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptbook.stories import (
    CORRUPTIONS, GRAMMAR, LEXICON, PRONOUNS, SLOTS, WORDS, Grammar, check_story, corrupt_story,
    names, probability, questions, read_story, sentences, stem, stories, story, story_bits,
    story_text, subjects, summary, tell, translate, word_bits,
)

LITTLE = Grammar("""
story = {A} had {a T}.[T.held=A] (|| Hm.)(| {She A} gave {it T} to {B}.[T.held=B])<end>
end = [T.held==A] {A} kept the {T}.
  | [T.held==B] Now {B} had {B's} {T}.
  | [T.held==B] Now {B} had {B's} (|old ){T.}.
""", {"girl": ("Mia", "Ada"), "boy": ("Leo", "Tom"), "thing": ("drum", "kite"),
      "color": ("old", "red")}, {"A": "person", "B": "person", "T": "color thing"})


def every_derivation(grammar):
    """(text, probability) of each way through a small grammar."""
    todo = [()]
    while todo:
        path, counts = todo.pop(), []

        def choose(n):
            counts.append(n)
            return path[len(counts) - 1] if len(counts) <= len(path) else 0
        yield tell(grammar, choose), 1 / math.prod(counts)
        todo += [path + (0,) * (i - len(path)) + (k,)
                 for i in range(len(path), len(counts)) for k in range(1, counts[i])]


@pytest.fixture(scope="module")
def texts():
    return [story_text(7, index) for index in range(400)]


# Probability -----------------------------------------------------------------------
def test_probability_equals_brute_force():
    chances, longest = Counter(), Counter()
    for text, chance in every_derivation(LITTLE):
        chances[text] += chance
        longest[text] = max(longest[text], chance)
    assert math.isclose(sum(chances.values()), 1)
    assert sum(longest.values()) < 0.9              # the bug: one derivation for the text
    for text, chance in chances.items():
        assert math.isclose(probability(LITTLE, text), chance)
    for prefix in ("", "Mia", "Leo had an old ", "Ada had a red kite. Hm. She gave it to "):
        begins = sum(c for text, c in chances.items() if text.startswith(prefix))
        assert math.isclose(probability(LITTLE, prefix, prefix=True), begins)
    assert probability(LITTLE, "Mia had an red kite.", prefix=True) == 0
    assert probability(LITTLE, "Mia had a red kite. Hm.") == 0        # no whole text


def test_monte_carlo_agrees():
    draw = random.Random(0).randrange
    counts = Counter(tell(LITTLE, draw) for _ in range(20_000))
    for text, count in counts.most_common(40):
        expected = 20_000 * probability(LITTLE, text)
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_story_bits_agree_with_the_choices():
    """The text is as likely as its derivation, or likelier where an option is empty twice."""
    equal = 0
    for index in range(300):
        counts, draw = [], random.Random(index).randrange
        text = tell(GRAMMAR, lambda n: counts.append(n) or draw(n))
        gap = sum(map(math.log2, counts)) - story_bits(text)
        assert gap > -1e-6
        equal += abs(gap) < 1e-6
        shares = 2 ** -gap                          # 1/k, k derivations of equal chance
        assert math.isclose(round(1 / shares), 1 / shares, rel_tol=1e-6)
    assert 0 < equal < 300


def test_word_bits_add_up(texts):
    for text in texts[:10]:
        words = word_bits(text)
        assert [word for word, _ in words] == text.split()
        assert all(bits > -1e-9 for _, bits in words)
        assert math.isclose(sum(bits for _, bits in words), story_bits(text))


def test_next_words_add_up_to_one(texts):
    vocabulary = {word for text in texts for word in text.split()} | {
        a + " " + b for a in ("a", "an") for b in WORDS["color"]}
    for before in ("Once upon a time there was a ", "The cat sat on the mat. It was "):
        total = sum(2 ** -story_bits(before + word + end, prefix=True) for end in (" ",)
                    for word in vocabulary if " " not in word)
        assert math.isclose(total, 2 ** -story_bits(before, prefix=True))


@pytest.mark.parametrize("prefix", [
    "Once upon a time", "Once upon a time there was a little girl",
    "The cat sat on the mat. It was fluffy."])
def test_the_prompts_of_the_book_begin_stories(prefix):
    assert story_bits(prefix, prefix=True) < 12
    assert story_bits(prefix) == math.inf            # but are none
    draw = random.Random(0).random
    found = next(text for text in (tell(GRAMMAR, lambda n: int(draw() * n))
                                   for _ in range(20_000)) if text.startswith(prefix))
    assert story_bits(found) < math.inf and check_story(found) == []


@pytest.mark.parametrize("change", [
    lambda t: t + " The end.", lambda t: t[:-1], lambda t: t.replace(" the ", " the the ", 1),
    lambda t: t.lower(), lambda t: " " + t, lambda t: t + "\n", lambda t: ""])
def test_what_is_no_story_has_infinite_bits(change, texts):
    assert all(story_bits(change(text)) == math.inf for text in texts[:20])


# Variety and form ------------------------------------------------------------------
def test_stories_are_many_and_short(texts):
    bits = [story_bits(text) for text in texts]
    assert sum(bits) / len(bits) > 80                 # > 10^24 texts; see the page
    assert len({word for text in texts for word in re.findall(r"[a-z']+", text.lower())}) > 400
    assert len(set(texts)) == len(texts)
    words = [len(text.split()) for text in texts]
    assert 40 <= min(words) and max(words) <= 150 and 60 <= sum(words) / len(words) <= 110


def test_form(texts):
    for text in texts:
        assert not re.search(r"\ba [aeiou]|\ban (?!hour)[^aeiou]|  | [.,!?]|\.\.|\.,|,\.", text), text
        assert text[0] in '"' or text[0].isupper()
        assert text[-1] in '.!"' and text.count('"') % 2 == 0
        assert not re.search(r"[.!?] [a-z]", text), text
        assert not re.search(r"[{}<>\[\]|()^_]", text)
        for start, end in sentences(text):
            assert text[start] == '"' or text[start].isupper(), text[start:end]


def test_no_option_is_rare():
    """Each word form occurs in one of 400 stories at least (names by far)."""
    many = [story_text(8, index) for index in range(4000)]
    seen = Counter(word for text in many for word in set(re.findall(r"[\w']+", text)))
    rare = {word: count for word, count in seen.items()
            if count < 4000 / 400 / 2 and not word.endswith("'s")}
    assert not rare, rare


def test_the_same_everywhere():
    """A stored hash is right here: no floating-point number decides a text."""
    digest = hashlib.sha256("\n".join(story_text(0, i) for i in range(200)).encode())
    assert digest.hexdigest()[:16] == "f7979625d9cd34ac"
    code = "from gptbook.stories import story_text; print(hash('a')); print(story_text(3, 4))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env={"PYTHONHASHSEED": seed, "PATH": ""}, check=True).stdout
            for seed in ("1", "2")]
    assert runs[0] != runs[1] and runs[0].split("\n")[1:] == runs[1].split("\n")[1:]


def test_seeds_have_no_twins():
    assert random.Random(2).random() == random.Random(2**32 + 2).random()      # the trap
    assert story_text(0, 2) != story_text(0, 2**32 + 2)


# Ground truth ----------------------------------------------------------------------
def test_story_is_its_text(texts):
    for index in (0, 5, 77):
        told = story(7, index)
        assert told.text == texts[index] and told.bits == story_bits(told.text)
        assert read_story(told.text).notes[0] == told.notes[0]
    with pytest.raises(ValueError, match="Once upon a time there"):
        read_story("Once upon a time there was nobody.")


def test_pronouns_mean_whom_they_say():
    forms, far = Counter(), 0
    for index in range(300):
        told = story(9, index)
        world, text = told.notes[0], told.text
        for start, end, who, spans in told.pronouns:
            assert [text[a:b] for a, b in spans] == list(who)
            assert all(b <= start for _, b in spans)
            word = text[start:end].lower()
            forms[word] += 1
            far += start - spans[0][1] > 60
            if len(who) == 1 and word in {w for pair in PRONOUNS.values() for w in pair}:
                kind = next((world[f"{s}.kind"] for s in "AB"
                             if world.get(s) == who[0]), who[0])
                female = kind in ("girl", "mom", "grandma", "aunt")
                assert (word in ("she", "her")) == female, (word, who, text)
            else:
                assert (len(who) == 2) == (word == "they")
    assert set(forms) == {"she", "he", "her", "his", "him", "it", "they"} and far > 50


def test_names_and_mentions(texts):
    for index in range(50):
        told = story(7, index)
        for name, spans in names(told).items():
            assert [told.text[a:b] for a, b in spans] == [name] * len(spans)
            assert len(spans) == len(re.findall(rf"\b{name}\b", told.text))


def test_subjects():
    odd = Counter()
    for index in range(300):
        told = story(9, index)
        for (a, b), (c, d) in subjects(told):
            subject, verb = told.text[a:b], told.text[c:d]
            assert re.fullmatch(r"[\w']+", verb) and subject.strip() == subject and subject
            odd[subject] += not re.search(r"[A-Za-z]", subject)
            if verb == "were":
                assert " and " in subject
    assert not any(odd.values())
    told = next(t for t in (story(9, i) for i in range(99)) if "gave it back" in t.text)
    pairs = {(told.text[slice(*s)], told.text[slice(*v)]) for s, v in subjects(told)}
    assert (told.notes[0]["B"], "gave") in pairs


def test_facts_and_questions():
    asked = Counter()
    for index in range(300):
        told = story(9, index)
        world = told.notes[0]
        for question, answer in questions(told):
            assert question.endswith("?") and answer and "{" not in question + answer
            asked[question.split()[0]] += 1
            words = answer.removeprefix("to ").removeprefix("a ").removeprefix("an ")
            assert words in told.text or words.split()[-1] in told.text
            if question.startswith("Who has"):
                holder = [f.value for f in told.facts if f.key == "T.held"][-1]
                assert world[holder] in answer
        assert 1 <= len(sentences(summary(told))) <= 2
        assert world["A"] in summary(told)
    assert set(asked) >= {"Whose", "Who", "Where", "What", "Which"}


def test_three_people_and_five_objects():
    people = objects = 0
    for index in range(300):
        world = story(9, index).notes[0]
        people = max(people, sum(slot in world for slot in "ABCYZ"))
        objects = max(objects, sum(slot in world for slot in "TUVSRFX"))
    assert people >= 3 and objects >= 4


@pytest.mark.xfail(reason="open: fails today, see the closing note")
def test_translation():
    assert len(set(LEXICON.values())) == len(LEXICON)
    assert (stem("found"), stem("hurried"), stem("danced"), stem("stopped")) == (
        "find", "hurry", "dance", "stop")
    for index in range(100):
        told = story(9, index)
        other = translate(told)
        assert re.findall(r"[.!?,\"]", other) == re.findall(r"[.!?,\"]", told.text)
        strange = set(re.findall(r"[a-z]+", other)) - set(LEXICON.values())
        assert all(word.endswith(("ta", "na")) for word in strange)
        assert not re.search(r"  | [.,!?]", other)
    told = next(t for t in (story(9, i) for i in range(99)) if "The cat sat" in t.text)
    first = translate(told).split(".")[0].split()
    assert first[0].lower() == LEXICON["cat"] and first[-1] == LEXICON["sit"] + "ta"


# Critic ----------------------------------------------------------------------------
def test_critic_passes_every_story():
    wrong = [text for text in (story_text(10, index) for index in range(2000))
             if check_story(text)]
    assert not wrong, wrong[:2]


NAMED = {"dropped_sentence": "unknown_sentence"}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_critic_flags_corruptions(kind):
    n = flagged = named = 0
    for index in range(400):
        try:
            bad = corrupt_story(story(11, index), kind, index)
        except ValueError as error:
            assert kind in str(error)
            continue
        n += 1
        found = check_story(bad.text)
        flagged += bool(found)
        named += any(p.kind == NAMED.get(kind, kind) and p.start <= bad.end
                     and bad.start <= p.end for p in found)
        assert all(0 <= p.start <= p.end <= len(bad.text) and p.message for p in found)
        if n == 150:
            break
    assert n >= 100
    assert flagged >= (0.9 if kind == "dropped_sentence" else 0.98) * n
    assert named >= 0.85 * n


def test_critic_agrees_with_the_probability(texts):
    """It is content with exactly the texts that the grammar can say."""
    draw = random.Random(0)
    for text in texts[:150]:
        words = text.split(" ")
        i, j = draw.randrange(len(words)), draw.randrange(len(words))
        words[i], words[j] = words[j], words[i]
        mixed = " ".join(words)
        assert (check_story(mixed) == []) == (story_bits(mixed) < math.inf), mixed


@pytest.mark.xfail(reason="open: fails today, see the closing note")
def test_critic_finds_two_faults_and_an_alien_sentence():
    told = next(t for t in (story(12, i) for i in range(99)) if t.notes[0]["plot"] == "lost")
    spans = names(told)[told.notes[0]["A"]]
    pronoun = next(p for p in told.pronouns if p.names == (told.notes[0]["B"],))
    text = told.text
    start, end = spans[-1]
    wrong = text[:start] + "Zarathustra" + text[end:]
    fix = {"she": "he", "he": "she", "She": "He", "He": "She", "her": "his", "his": "her",
           "him": "her", "Her": "His", "His": "Her"}[text[pronoun.start:pronoun.end]]
    wrong = wrong[:pronoun.start] + fix + wrong[pronoun.end:]
    assert {p.kind for p in check_story(wrong)} == {"unknown_name", "wrong_pronoun"}
    cut = sentences(text)[2][0]
    alien = text[:cut] + "The tax office wrote a letter. " + text[cut:]
    problems = check_story(alien)
    assert [p.kind for p in problems] == ["unknown_sentence"]
    assert alien[problems[0].start:problems[0].end] == "The tax office wrote a letter. "


def test_unfinished_is_all_that_an_early_end_is(texts):
    for text in texts[:40]:
        for share in (0.2, 0.5, 0.9):
            cut = text[:int(share * len(text))]
            assert [p.kind for p in check_story(cut)] == ["unfinished"], cut
    assert [p.kind for p in check_story("")] == ["unfinished"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
@example("\0" * 50)
@example('"' * 50 + "\n.!?")
@example("Once upon a time there was a little girl named ")
def test_any_text_gets_an_answer(text):
    problems = check_story(text)
    assert (problems == []) == (story_bits(text) < math.inf)
    assert all(0 <= p.start <= p.end <= len(text) for p in problems)


def test_corrupting_needs_a_known_kind_and_a_story():
    with pytest.raises(ValueError, match="'bad' is none of wrong_pronoun"):
        corrupt_story(story(0, 0), "bad")
    with pytest.raises(ValueError, match="no story"):
        corrupt_story("Nonsense.", "wrong_pronoun")
    assert corrupt_story(story_text(0, 0), "wrong_pronoun", 3) == corrupt_story(
        story(0, 0), "wrong_pronoun", 3)


# Grammar and corpus ----------------------------------------------------------------
@pytest.mark.parametrize("source, message", [
    ("story = {a thing}.", "cannot be read"), pytest.param(
        "story = (a|b.))", "not open", marks=pytest.mark.xfail(reason="open: fails today"))])
def test_a_wrong_grammar_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        Grammar(source, WORDS, SLOTS)


def test_corpus():
    corpus = stories(60, seed=5, validation=30)
    train, held_out = (list(corpus.documents(s)) for s in ("train", "validation"))
    assert len(train) == 60 and len(held_out) == 30 and not set(train) & set(held_out)
    assert train == [story_text(5, index) for index in range(60)]
    assert corpus.separator_is_end_of_text and corpus.text("train").startswith(train[0])
    assert stories(60, seed=5, validation=30).sha256 == corpus.sha256
    assert stories(60, seed=6, validation=30).sha256 != corpus.sha256
    assert list(stories(90, seed=5, validation=30).documents("validation")) == held_out
    for n, validation in ((0, 1), (1, 0), (-3, 5)):
        with pytest.raises(ValueError, match=f"n={n} and validation={validation}"):
            stories(n, validation=validation)
    with pytest.raises(ValueError, match="test"):
        corpus.documents("test")


def test_writing_takes_no_notes():
    """A story costs its text alone until its truth is asked for."""
    told = story(0, 0)
    assert "notes" not in told.__dict__
    assert told.pronouns and "notes" in told.__dict__
