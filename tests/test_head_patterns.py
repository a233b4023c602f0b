"""Habits by brute force, relations against the story world, reports and warnings."""
import itertools
import math
from functools import partial

import pytest
import torch

from gptbook.checkpoints import load_demo
from gptbook.core import GPTConfig, GPTModel, MultiHeadAttention, set_seed
from gptbook.head_patterns import (
    RELATIONS, Relation, answers, attention_report, attention_warnings, evenly, habits,
    induction_scores, pattern_scores, relation_name, relations, token_ends, tokens_in, word_report,
    words_of)
from gptbook.stories import story
from gptbook.structured_pruning import prune_heads
from gptbook.tokenizer import train_bpe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo():
    return load_demo()


# --- habits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_habits_by_brute_force(seed):
    source = torch.Generator().manual_seed(seed)
    T = int(torch.randint(3, 20, (), generator=source))
    ids = torch.randint(4, (T,), generator=source).tolist()
    found = habits(ids)
    for q, k in itertools.product(range(T), repeat=2):
        wanted = {
            "previous token": k == q - 1, "first token": k == 0 < q, "itself": k == q,
            "same token": k < q and ids[k] == ids[q],
            "induction": 1 <= k <= q and ids[k - 1] == ids[q] and k - 1 < q,
        }
        assert {name: bool(table[q, k]) for name, table in found.items()} == wanted, (q, k)


@pytest.mark.parametrize("name", list(habits([0, 1])))
def test_a_head_with_one_habit_scores_one_in_it(name):
    ids = [0, 1, 2, 3, 0, 1, 2, 3, 0]
    table = habits(ids)[name].float()
    table[~table.bool().any(-1), 0] = 1  # nowhere to look: the first token
    weights = table / table.sum(-1, keepdim=True)
    scores = pattern_scores(weights, ids)
    assert scores[name].item() == pytest.approx(1)
    others = [scores[other].item() for other in habits(ids) if other != name]
    assert max(others) < 0.7, "no other habit has a full score"
    assert scores["even"].item() < 0.4


def test_even_attention_and_nowhere_to_look():
    weights = evenly(12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(12))
    scores = pattern_scores(weights.expand(3, 2, 12, 12), list(range(12)))
    assert scores["even"].shape == (3, 2)
    torch.testing.assert_close(scores["even"], torch.ones(3, 2))
    assert scores["same token"].isnan().all(), "no token comes twice"
    for wrong in (range(11), range(13), []):
        with pytest.raises(ValueError, match=f"are not of {len(wrong)} tokens"):
            pattern_scores(weights, list(wrong))


def by_distance(n, q_pos, k_pos):
    return 100.0 * (q_pos - k_pos == n - 1)


def test_induction_of_a_model_that_looks_there():
    config = GPTConfig(50, 100, 16, 2, 2)
    looking = GPTModel(config, attention=partial(MultiHeadAttention, bias=partial(by_distance, 20)))
    assert induction_scores(looking, 20).min() > 0.99
    set_seed(0)
    plain = induction_scores(GPTModel(config), 20)
    even = sum(1 / (q + 1) for q in range(20, 40)) / 20
    torch.testing.assert_close(plain, torch.full((2, 2), even), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="do not fit the model's 100"):
        induction_scores(looking, 51)
    assert induction_scores(looking, 20, start=7).min() > 0.99
    with pytest.raises(ValueError, match="do not fit the model's 100"):
        induction_scores(looking, 50, start=7)


def test_the_start_token_stands_before_each_row(monkeypatch):
    seen = []
    model = GPTModel(GPTConfig(50, 100, 16, 2, 2))
    model.tok_emb.register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    plain, started = induction_scores(model, 9, rows=3), induction_scores(model, 9, rows=3, start=7)
    assert (seen[1][:, 0] == 7).all() and torch.equal(seen[1][:, 1:], seen[0])
    assert torch.equal(seen[0][:, :9], seen[0][:, 9:]) and plain.shape == started.shape == (2, 2)


def test_layers_with_different_numbers_of_heads():
    """A pruned model: refused as a whole, and measured where layers are alike."""
    set_seed(0)
    model = GPTModel(GPTConfig(50, 100, 16, 3, 4)).eval()
    whole = induction_scores(model, 9)
    torch.testing.assert_close(induction_scores(model, 9, layers=[1]), whole[1:2])
    prune_heads(model, {2: [0, 3]})
    with pytest.raises(ValueError, match=r"different numbers of heads, \[4, 4, 2\]: name some"):
        induction_scores(model, 9)
    torch.testing.assert_close(induction_scores(model, 9, layers=[0, 1]), whole[:2])
    assert induction_scores(model, 9, layers=[2]).shape == (1, 2)
    with pytest.raises(ValueError, match="layer 3 is not there"):
        induction_scores(model, 9, layers=[3])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_comes_back(training):
    model = GPTModel(GPTConfig(50, 30, 16, 2, 2)).train(training)
    induction_scores(model, 12)
    assert model.training == training == model.blocks[0].attn.training


# --- questions with a right answer ---------------------------------------------------------------


def test_tokens_of_spans():
    tokenizer = train_bpe("the café on the corner " * 5, 280)
    text = "the café on"
    ids = tokenizer.encode(text)
    ends = token_ends(tokenizer, ids)
    assert ends[-1] == len(text.encode())
    for start, end in itertools.combinations(range(len(text.encode()) + 1), 2):
        inside = tokens_in(ends, start, end)
        covered = tokenizer.decode_bytes([ids[i] for i in inside])
        assert text.encode()[start:end] in covered
        for cut in (inside[1:], inside[:-1]):  # none of them is superfluous
            if cut:
                assert text.encode()[start:end] not in tokenizer.decode_bytes(
                    [ids[i] for i in cut]) or text.encode().count(text.encode()[start:end]) > 1


def test_relations_say_what_the_story_world_says(demo):
    """The world's own pronouns, told by another function, are the oracle."""
    _, tokenizer = demo
    n = {name: 0 for name in RELATIONS}
    for i in range(60):
        told = story(977, 7000 + i)
        ids, asked = relations(told, tokenizer)
        assert tokenizer.decode(ids[1:]) == told.text and ids[0] == tokenizer.end_of_text
        ends = token_ends(tokenizer, ids[1:])
        by_query = {1 + tokens_in(ends, p.start, p.end)[0]: p for p in told.pronouns}
        for name, found in asked.items():
            n[name] += len(found)
            for r in found:
                assert len(r.places) == len(r.right) > 1 and 0 < sum(r.right) < len(r.right)
                assert all(max(tokens) < r.query for tokens in r.places), "only what came before"
        for r in asked["pronoun, referent"]:
            pronoun = by_query[r.query]
            words = [tokenizer.decode([ids[t] for t in tokens]) for tokens in r.places]
            right = [w for w, ok in zip(words, r.right) if ok]
            wrong = [w for w, ok in zip(words, r.right) if not ok]
            assert all(any(name in w for name in pronoun.names) for w in right), (right, pronoun)
            assert not any(name in w.split() for name in pronoun.names for w in wrong)
            last = [1 + t for t in tokens_in(ends, *pronoun.antecedents[0])]
            assert any(set(last) <= set(tokens) for tokens, ok in zip(r.places, r.right) if ok)
    assert n["pronoun, referent"] > 100 and n["verb, subject"] > 200 and n["object, place"] > 2


@pytest.mark.parametrize("earlier", [0, 1])
def test_answers_by_brute_force(earlier):
    source = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 8, 30, 30, generator=source).tril()
    r = Relation(20, [[1, 2], [5], [7, 8, 9], [15]], [False, False, True, True])
    found = answers(weights, r, earlier)
    for layer, head in itertools.product(range(5), range(8)):
        row = weights[layer, head, 20 - earlier]
        mass = [sum(row[t].item() for t in tokens) for tokens in r.places]
        assert found[layer, head] == r.right[max(range(4), key=mass.__getitem__)]
    assert found.any() and not found.all()
    for wrong in (21, -1):  # not the last token of the text instead
        with pytest.raises(ValueError, match="token 20 has no token"):
            answers(weights, r, wrong)


def test_the_head_that_knows_and_dealt_answers(demo):
    """The page's finding on stories of its own, and a control that must fall to chance."""
    model, tokenizer = demo
    from gptbook.attention import capture_attention

    right, dealt, n, source = 0, 0, 0, torch.Generator().manual_seed(0)
    for i in range(40):
        ids, asked = relations(story(977, 8000 + i), tokenizer)
        with torch.no_grad(), capture_attention(model, [3]) as captured:
            model(torch.tensor([ids]))
        for r in asked["pronoun, referent"]:
            if len(r.right) < 4 or sum(r.right) * 2 > len(r.right):
                continue
            order = torch.randperm(len(r.right), generator=source)
            other = r._replace(right=[r.right[j] for j in order])
            right += int(answers(captured.weights[3], r, 1)[0, 0])
            dealt += int(answers(captured.weights[3], other, 1)[0, 0])
            n += 1
    assert n > 40 and right / n > 0.6 > 0.5 > dealt / n


# --- reports and warnings --------------------------------------------------------------------------


def test_words_of_any_text():
    tokenizer = train_bpe("Once upon a time, there was a café. " * 3, 290)
    text = "Zoë's café — “wow”, she said."
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    words = words_of(tokenizer, ids)
    assert words[0] == ("∅", [0])
    assert [w for w, _ in words][1:4] == ["Zoë's", "café", "—"]
    assert [w for w, _ in words][-3:] == ["she", "said", "."]
    for word, tokens in words[1:]:
        assert word.encode() in tokenizer.decode_bytes([ids[t] for t in tokens])


@pytest.mark.parametrize("text, wanted", [
    ("“It was,” she said.", "“ It was , ” she said ."), ("'Tom ran.'", "' Tom ran . '"),
    ("Tom’s dogs' «hats»… ¡hola!", "Tom’s dogs ' « hats » … ¡ hola !"),
    ("猫。它 नमस्ते a_b 3.5", "猫 。 它 नमस्ते a_b 3 . 5"), (" \n", ""),
])
def test_punctuation_stands_by_itself(demo, text, wanted):
    """Also quotation marks: the pronoun in them is a pronoun."""
    _, tokenizer = demo
    ids = tokenizer.encode(text)
    assert [word for word, _ in words_of(tokenizer, ids)] == wanted.split()
    started = [tokenizer.end_of_text, *ids]
    assert words_of(tokenizer, started) == [("∅", [0])] + [
        (word, [t + 1 for t in tokens]) for word, tokens in words_of(tokenizer, ids)]


def test_half_a_letter_is_a_word_of_its_token(demo):
    _, tokenizer = demo
    ids = tokenizer.encode("cat 😀")[:-1]  # all but the last byte
    words = words_of(tokenizer, ids)
    assert words[0][0] == "cat" and words[-1][1][-1] == len(ids) - 1
    assert "\ufffd" in words[-1][0]


def fixed(tokenizer, text, pairs, others=0):
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    weights = torch.zeros(1, 2, len(ids), len(ids))
    weights[..., others] = 1
    words = dict((w, t) for w, t in words_of(tokenizer, ids))
    for a, b, weight in pairs:
        weights[:, :, words[a][-1], words[b][0]] = weight
    return ids, {0: weights}


def test_the_report_has_the_form_that_was_promised(demo):
    _, tokenizer = demo
    text = "The cat sat on the mat. It was fluffy."
    ids, weights = fixed(tokenizer, text, [
        ("It", "∅", 0.0), ("It", "cat", 0.60), ("It", "mat", 0.25), ("It", "It", 0.15)])
    known = (
        "Layer 0:\n"
        "  'It' attends most to:\n"
        "    1. 'cat' (weight: 0.60)  # coreference\n"
        "    2. 'mat' (weight: 0.25)\n"
        "    3. 'It' (weight: 0.15)  # self-attention")
    for means in ({"It": "cat"}, {"it": "the Cat"}):
        assert attention_report(weights, tokenizer, ids, means=means) == known
    by_form = [line.partition("#")[2] for line in
               attention_report(weights, tokenizer, ids).splitlines()[2:]]
    assert by_form == [" coreference?", " coreference?", " self-attention"]
    assert "coreference?" in attention_report(weights, tokenizer, ids, means={"she": "cat"})
    ids, weights = fixed(tokenizer, text, [("fluffy", "∅", 0.2), ("fluffy", "was", 0.8)])
    said = attention_report(weights, tokenizer, ids, about=["fluffy"], head=1, top=2)
    assert said == ("Layer 0, head 1:\n  'fluffy' attends most to:\n"
                    "    1. 'was' (weight: 0.80)  # the word before\n"
                    "    2. '∅' (weight: 0.20)  # start of the text")
    with pytest.raises(ValueError, match="is a word of this text"):
        attention_report(weights, tokenizer, ids, about=["dog"])
    for head in (2, -1):
        with pytest.raises(ValueError, match=f"head {head} is not there: there are 2"):
            attention_report(weights, tokenizer, ids, head=head)


def test_what_is_not_looked_at_is_not_listed(demo):
    """Weights of zero, of words that come later and of words outside a window."""
    _, tokenizer = demo
    ids, weights = fixed(tokenizer, "The cat sat. It ran.", [("It", "∅", 0.0), ("It", "cat", 1.0)])
    assert attention_report(weights, tokenizer, ids, top=9).splitlines()[1:] == [
        "  'It' attends most to:", "    1. 'cat' (weight: 1.00)  # coreference?"]
    words = [("a", [0]), ("b", [1]), ("c", [1])]  # the last two share a token
    assert [line[7:10] for line in word_report(torch.tensor([0.2, 0.3, 0.3]), words, 1, 3, "")[1:]
            ] == ["'b'", "'a'"], "no word looks at a later one"


def test_every_pronoun_is_told_by_itself(demo):
    _, tokenizer = demo
    ids, weights = fixed(tokenizer, "Tom had a ball. He gave it to them.", [("He", "Tom", 1.0)])
    said = attention_report(weights, tokenizer, ids, top=1)
    assert [line.strip() for line in said.splitlines() if "attends" in line] == [
        f"'{word}' attends most to:" for word in ("He", "it", "them")]
    assert "    1. 'Tom' (weight: 1.00)  # coreference?" in said.splitlines()


def test_without_a_pronoun_the_last_word_is_told(demo):
    _, tokenizer = demo
    ids, weights = fixed(tokenizer, "The cat sat", [("sat", "cat", 1.0)])
    said = attention_report(weights, tokenizer, ids)
    assert "'sat' attends most to:" in said and said.count("attends") == 1


def test_words_that_a_pronoun_cannot_mean_are_not_called_coreference():
    for word in ("upon", "Once", "there", "the", "was", "∅", ",", "I", "sat", "jumped", "7"):
        assert "coreference" not in relation_name("He", word, 4)
        assert "coreference" not in relation_name("He", word, 4, "Tom")
    assert relation_name("He", "Tom", 4) == relation_name("it", "ball", 1) == "coreference?"
    assert relation_name("ran", "Tom", 4) == ""


def test_what_is_known_is_named_and_nothing_else():
    assert relation_name("He", "Tom", 4, "tom") == "coreference"
    assert relation_name("They", "Mia", 4, "Tom Mia") == "coreference"
    assert relation_name("He", "ball", 4, "Tom") == "" != relation_name("He", "ball", 4)
    assert relation_name("He", "he", 4, "Tom") == "the same word"
    assert relation_name("He", "ball", 1, "Tom") == "the word before"


def test_a_text_without_words_is_refused(demo):
    _, tokenizer = demo
    ids = tokenizer.encode(" \n ")
    with pytest.raises(ValueError, match="no words"):
        attention_report({0: torch.eye(len(ids))[None, None]}, tokenizer, ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_weights_on_another_device():
    ids, weights = torch.arange(12), evenly(12).expand(2, 3, 12, 12)
    assert attention_warnings(weights.cuda(), ids.cuda()) == attention_warnings(weights, ids)


@pytest.mark.parametrize("weights, said", [
    (evenly(20), ["uniform", "random-like"]), (torch.eye(20), ["only itself"]),
    (torch.diag(torch.ones(19), -1) + torch.eye(20)[:1].T @ torch.eye(20)[:1], []),
])
def test_warnings(weights, said):
    ids = list(range(20))
    found = attention_warnings(weights.expand(2, 3, 20, 20), ids)
    assert [w.split(":")[0] for w in found] == said


def test_warnings_of_models(demo):
    model, tokenizer = demo
    from gptbook.attention import capture_attention

    ids = [tokenizer.end_of_text, *tokenizer.encode(story(977, 9000).text)]
    for one, n in ((model, 0), (GPTModel(model.config), 2)):
        with torch.no_grad(), capture_attention(one.eval()) as captured:
            one(torch.tensor([ids]))
        weights = torch.stack([w[0] for w in captured.weights.values()])
        assert len(attention_warnings(weights, ids)) == n
    assert "too short" in attention_warnings(weights[..., :5, :5], ids[:5])[0]


def test_one_layer_without_habits_is_no_warning(demo):
    """The last layer of a trained model looks at what the text says."""
    model, tokenizer = demo
    from gptbook.attention import capture_attention

    ids = [tokenizer.end_of_text, *tokenizer.encode(story(977, 9000).text)]
    with torch.no_grad(), capture_attention(model, [3]) as captured:
        model(torch.tensor([ids]))
    assert attention_warnings(captured.weights[3], ids)[0].startswith("random-like")
    assert attention_warnings(captured.weights[3], ids, whole=False) == []
    still = attention_warnings(evenly(20).expand(1, 2, 20, 20), range(20), whole=False)
    assert [w.split(":")[0] for w in still] == ["uniform"]


def test_sharp_noise_is_random_like():
    set_seed(0)
    scores = 3 * torch.randn(2, 4, 60, 60)
    weights = scores.masked_fill(~torch.ones(60, 60).tril().bool(), -math.inf).softmax(-1)
    assert [w.split(":")[0] for w in attention_warnings(weights, list(range(60)))] == ["random-like"]
