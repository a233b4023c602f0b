"""The data page: corpora, streams, windows and batches, and bad input."""
import codecs
import hashlib
import inspect
import subprocess
import sys
import sysconfig
import time
import tracemalloc
import unicodedata
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbook import data, tokenizer as tokens
from gptbook.data import (
    BOMS, CHUNK, Corpus, TokenDataset, Windows, between_words, cache_folder, check_ids,
    check_split, cut_windows, download, epoch_starts, file_encoding, file_part, listed,
    python_stdlib, read_chunks, shakespeare, source_files, text_file, tokenize, window_starts,
)
from gptbook.tokenizer import END_OF_TEXT, DataError, Tokenizer, gpt2_tokenizer, train_bpe

few = settings(max_examples=20, deadline=None, derandomize=True)
COVERED = set()  # public names that a property test below exercises


def covers(*things):
    COVERED.update(thing.__name__ for thing in things)
    return lambda test: test


odd = st.one_of(  # what a careless caller, or a file, might give
    st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text(max_size=5),
    st.binary(max_size=5), st.lists(st.integers(), max_size=3),
    st.just(np.array(3)), st.just(np.array([])), st.just(torch.tensor(float("nan"))),
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(python_stdlib(max_bytes=300_000).documents("train"), 1000)


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


CACHE = []


def python_tokens():
    """A tokenizer for property tests, which take no fixtures; trained once."""
    if not CACHE:
        CACHE.append(train_bpe(python_stdlib(200_000).documents("train"), 800))
    return CACHE[0]


BYTES = {bytes([b]): b for b in range(256)}
plain = Tokenizer("bytes", BYTES, {END_OF_TEXT: 256})
KNOWN = st.characters(codec="utf-8").filter(  # letters that every Unicode table knows
    lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")


# corpora

@covers(check_split)
@given(odd)
@few
def test_unknown_splits_are_value_errors(name):
    with pytest.raises(ValueError, match="unknown split"):
        check_split(name)
    for split in ("train", "validation"):
        assert check_split(split) == split


def test_names_of_the_tokens_page_are_the_same_here():
    for name in ("DataError", "END_OF_TEXT", "Tokenizer", "gpt2_tokenizer", "train_bpe"):
        assert getattr(data, name) is getattr(tokens, name)


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
    path = Path(gettempdir()) / "gptbook_test_data_any.txt"
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
    t = python_tokens()
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
        assert inputs.shape == targets.shape and inputs.shape[1] <= dataset.context_length
        if dataset.document_end is None:
            assert inputs.shape[1] == dataset.context_length
        else:  # no column is there for nothing
            assert (targets != -100).any(0).all()
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
            n = int((y != -100).sum())
            assert (y[n:] == -100).all() and 99 not in y[:n - 1]  # one document a row
            windows.add((tuple(x[:n].tolist()), tuple(y[:n].tolist())))
    for begin, end in zip(begins, [*begins[1:], len(ids) - 1]):
        if end - begin <= context:  # it fits: some window holds it whole, start and end
            whole, answer = tuple(ids[begin:end]), tuple(ids[begin + 1 : end + 1])
            assert (whole, answer) in windows
    for start in data_.starts:  # a window begins at a document, or goes on in a long one
        assert start in begins or any(
            b < start < e and e - b > context and (start - b) % context == 0
            for b, e in zip(begins, [*begins[1:], len(ids) - 1]))


def test_a_batch_of_documents_is_as_wide_as_its_longest():
    data_ = TokenDataset([9, 1, 2, 9], 6, 2, document_end=9)
    inputs, targets = data_.batch(0, 0)
    assert inputs.tolist() == [[9, 1, 2]] * 2 and targets.tolist() == [[1, 2, 9]] * 2
    assert data_.n_windows == data_.steps_per_epoch == 1
    data_ = TokenDataset([9, 1, 9, 2, 2, 2, 9], 6, 2, document_end=9)
    rows = sorted(data_.batch(0, 0)[1].tolist())
    assert rows == [[1, 9, -100, -100], [2, 2, 2, 9]]


def test_no_row_holds_two_documents_and_a_long_one_goes_on():
    data_ = TokenDataset([9, 1, 1, 9, 2, 2, 2, 2, 2, 2, 9], 5, 1, document_end=9)
    assert [t.tolist()[0] for _, t in data_.windows()] == [[1, 1, 9], [2] * 5, [2, 9]]
    trained = [data_.batch(0, step)[1].tolist()[0] for step in range(3)]
    assert sorted(trained) == [[1, 1, 9], [2, 2, 2, 2, 2], [2, 9]]


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
              or inspect.isclass(getattr(data, name))}
    assert public <= COVERED, public - COVERED
