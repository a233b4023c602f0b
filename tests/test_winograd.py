"""Schemas that decide by their last word, and what a model and its heads make of them."""
import pytest
import torch

from gptbook.attention import capture_attention
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.head_patterns import words_of
from gptbook.tokenizer import train_bpe
from gptbook.winograd import SCHEMAS, head_shift, knows, last_word_log_prob

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
