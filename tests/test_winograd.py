"""Schemas that decide by their last word, and what a model and its heads make of them."""
import pytest
import torch

from gptbook.attention import capture_attention
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.head_patterns import words_of
from gptbook.tokenizer import train_bpe
from gptbook.winograd import (
    SCHEMAS, Schema, head_shift, knows, last_word_log_prob, schema_words, without_story)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reader():
    text = " ".join(f"{s.text} {w}." for s in SCHEMAS for w in s.words)
    tokenizer = train_bpe(text, 420)
    set_seed(0)
    model = GPTModel(GPTConfig(tokenizer.n_vocab, 96, 32, 2, 4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model, tokenizer


def test_schemas_are_of_their_form():
    assert len({s.text for s in SCHEMAS}) == len(SCHEMAS) == 24
    for s in SCHEMAS:
        words = s.text.split()
        first, second, pronoun = (words.index(w) for w in (*s.nouns, s.pronoun))
        assert first < second < pronoun and s.words[0] != s.words[1]
        for noun in s.nouns:
            assert [w.strip(",").lower() for w in words].count(noun) == 1, s.text
        assert [w.lower() for w in words].count(s.pronoun) == 1, s.text
        assert not set(s.words) & set(words), "the deciding word comes last and once"


def test_the_probability_of_a_word_is_that_of_its_tokens(reader):
    model, tokenizer = reader
    text, word = "The truck passed the bus because it was so", "fast"
    start, whole = tokenizer.encode(text), tokenizer.encode(f"{text} {word}")
    total = 0.0
    for t in range(len(start), len(whole)):
        with torch.no_grad():
            total += model(torch.tensor([whole[:t]]))[0, -1].log_softmax(-1)[whole[t]].item()
    assert last_word_log_prob(model, tokenizer, text, word) == pytest.approx(total, abs=1e-4)


def test_the_odds_by_hand_and_turned_round(reader):
    model, tokenizer = reader
    for s in SCHEMAS[:6]:
        odds = []
        for word in s.words:
            told = [last_word_log_prob(model, tokenizer,
                                       s.text.replace(f" {s.pronoun} ", f" the {noun} "), word)
                    for noun in s.nouns]
            odds.append(told[0] - told[1])
        assert knows(model, tokenizer, s) == pytest.approx(odds[0] - odds[1], abs=1e-4)
        turned = s._replace(words=s.words[::-1])
        assert knows(model, tokenizer, turned) == pytest.approx(-knows(model, tokenizer, s), abs=1e-4)


@pytest.mark.parametrize("schema", SCHEMAS[::5])
def test_the_shift_of_heads_by_hand(reader, schema):
    model, tokenizer = reader
    wanted = []
    for word in schema.words:
        ids = tokenizer.encode(f"{schema.text} {word}")
        with torch.no_grad(), capture_attention(model) as captured:
            model(torch.tensor([ids]))
        places = {w.lower(): tokens for w, tokens in words_of(tokenizer, ids)}
        rows = [w[0, :, -1] for w in captured.weights.values()]
        a, b = ([sum(row[:, t] for t in places[noun]) for row in rows] for noun in schema.nouns)
        wanted.append(torch.stack(a) - torch.stack(b))
    found = head_shift(model, tokenizer, schema)
    torch.testing.assert_close(found, wanted[0] - wanted[1], atol=1e-6, rtol=0)
    assert (found != 0).all()
    turned = head_shift(model, tokenizer, schema._replace(words=schema.words[::-1]))
    torch.testing.assert_close(turned, -found)


def test_at_the_pronoun_nothing_can_be_known(reader):
    model, tokenizer = reader
    for s in SCHEMAS:
        if len(tokenizer.encode(f"{s.text} {s.words[0]}")) == len(
                tokenizer.encode(f"{s.text} {s.words[1]}")):
            assert not head_shift(model, tokenizer, s, "pronoun").abs().max() > 1e-6


@pytest.mark.parametrize("text", [
    "The ball broke because it was so",                        # the second noun is missing
    "The ball broke the table and the table fell as it was",   # one stands twice
    "Because it was so weak the ball broke the table, so",     # the pronoun comes first
    "The table broke the ball because it was so",              # the nouns the other way round
    "The ball broke the table because it said it was so",      # two pronouns
])
def test_what_is_not_of_the_form_is_refused(reader, text):
    wrong = Schema(text, ("hard", "soft"), ("ball", "table"))
    for ask in (schema_words, without_story, lambda s: knows(*reader, s), lambda s: head_shift(*reader, s)):
        with pytest.raises(ValueError, match="once each, in this order"):
            ask(wrong)
    with pytest.raises(ValueError, match="place='noun'"):
        head_shift(*reader, SCHEMAS[0], "noun")


def test_capitals_and_marks_make_no_difference(reader):
    plain = Schema("The ball broke the table because it was made of", ("steel", "glass"), ("ball", "table"))
    marked = plain._replace(text="The ball broke the table, because it was made of")
    shouted = plain._replace(nouns=("Ball", "Table"), pronoun="It")
    assert schema_words(marked) == schema_words(plain) == schema_words(shouted)
    torch.testing.assert_close(head_shift(*reader, shouted), head_shift(*reader, plain))
    assert (head_shift(*reader, marked) != 0).all()
    assert knows(*reader, marked._replace(words=("glass", "steel"))) == pytest.approx(-knows(*reader, marked))


def test_without_the_story_the_rest_stays():
    found = [without_story(s) for s in SCHEMAS]
    assert found[4].text == "There was a fish and there was a worm, and it was"
    assert found[18].text == "There was a letter and there was an envelope, and it was too"
    for bare, s in zip(found, SCHEMAS):
        assert bare[1:] == s[1:] and len(schema_words(bare)) < 16
        assert bare.text.split()[-2:] == s.text.split()[-2:]
        story = {*schema_words(s)[: schema_words(s).index(s.pronoun)]} - {"the", "was", *s.nouns}
        assert not story & {*schema_words(bare)} - {"and", "a"}, "nothing of what happened"


def test_modes_stay(reader):
    model, tokenizer = reader
    model.train().blocks[0].eval()
    modes = [part.training for part in model.modules()]
    for ask in (knows, head_shift):
        ask(model, tokenizer, SCHEMAS[1])
        assert [part.training for part in model.modules()] == modes
    model.eval()
