"""Masks against their definition, texts against `re`, JSON against `json` and `jsonschema`."""
import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from gptbook.beam import beam_search
from gptbook.constrained import (
    FAR, Constraint, TokenTrie, json_pattern, tokens_as_bytes, tokens_to_finish,
)
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.generation import generate_steps, generate_text, stream_text
from gptbook.patterns import DEAD, START, Automaton
from gptbook.sampler import Sampler
from gptbook.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

BYTES = [bytes([b]) for b in range(256)]
MORE = [b'", "', b'{"', b'"}', b"ab", b"abc", b"bc", b"12", b"true", b"tru", "é".encode(), b"\xa9x",
        "中".encode(), "中".encode()[:2], b"a,", b": ", b"\\n", b"\\u00", b'\\"', b"e-", b".5"]
TOKENIZER = Tokenizer("few", {token: i for i, token in enumerate(BYTES + MORE)},
                      {END_OF_TEXT: len(BYTES + MORE)})
END, V = TOKENIZER.end_of_text, TOKENIZER.n_vocab
TRIE = TokenTrie(TOKENIZER)


@pytest.fixture(scope="module")
def noise():
    """A model to which all tokens are nearly alike: it finds each hole of a mask."""
    set_seed(0)
    return GPTModel(GPTConfig(V, 128, 8, 1, 1)).eval()


def naive(automaton, tokens, state):
    return [automaton.run(token, state) if token else DEAD for token in tokens]


def written(model, adjust, n=64, length=60, seed=0, **options):
    rows = generate_text(model, [END], length, n=n, seed=seed, end_of_text=END, adjust=adjust,
                         **options)
    return [TOKENIZER.decode_bytes(i for i in row[1:] if i != END) for row in rows]


PATTERNS = ["-?[0-9]+", "a(b|c)*", "(ab|abc|bc){2,4}", "[é-中]{1,3}x?", r"[^\"\\]*", "", ".{0,5}",
            r'\{("a": (true|12)(, )?)*\}', "(a|b)*a(a|b){4}", "[中😀]+"]


# Masks -------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_walk_is_the_definition_in_every_state(pattern):
    automaton, queue = Automaton(pattern), [START]
    for state in queue:
        reached = TRIE.walk(automaton, state)
        assert reached.tolist() == naive(automaton, TRIE.tokens, state)
        queue += [s for s in np.unique(reached).tolist() if s != DEAD and s not in queue]
        if len(queue) > 60:
            break
    assert not TRIE.walk(automaton, DEAD).any()


def test_a_walk_with_odd_vocabularies():
    automaton = Automaton("ab*")
    tokens = [None, b"a", b"", b"ab", b"a", b"b" * 300, b"a" + b"b" * 300]
    trie = TokenTrie(tokens)
    assert trie.walk(automaton, START).tolist() == naive(automaton, tokens, START)
    assert TokenTrie([]).walk(automaton, START).tolist() == []
    assert TokenTrie([None, b""]).walk(automaton, START).tolist() == [DEAD, DEAD]


def test_masks_of_a_trained_vocabulary():
    tokenizer = train_bpe("the cat sat on the mat, and 12 é or 中 more. " * 30, 330)
    trie = TokenTrie(tokenizer)
    for pattern in PATTERNS:
        automaton = Automaton(pattern)
        assert trie.walk(automaton, START).tolist() == naive(automaton, trie.tokens, START)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_end_is_allowed_exactly_where_the_text_fits(pattern):
    constraint, rng = Constraint(pattern, TRIE), random.Random(0)
    state, text = START, b""
    for _ in range(40):
        mask = constraint.mask(state)
        fits = re.fullmatch(pattern, text.decode(errors="ignore"), re.ASCII) is not None
        whole = text.decode(errors="ignore").encode() == text
        assert mask[END].item() == (fits and whole)
        ways = [i for i in mask.nonzero()[:, 0].tolist() if i != END]
        if not ways:
            assert mask[END]
            break
        new = rng.choice(ways)
        text += TRIE.tokens[new]
        state = constraint.automaton.run(TRIE.tokens[new], state)


def brute_distance(automaton, tokens, state, most=4):
    """By trying all sequences of tokens."""
    states = {state}
    for n in range(most + 1):
        if any(automaton.accepting[s] for s in states):
            return n
        states = {s for s in itertools.chain(*(naive(automaton, tokens, s) for s in states))
                  if s != DEAD}
    return FAR


@pytest.mark.parametrize("pattern", ["-?[0-9]+x", "(ab|abc|bc){2,4}", "a|bc{2}d", "é中?x", "(ab)*c"])
@pytest.mark.parametrize("tokens", [TRIE.tokens, [b"ab", b"a", b"b", b"c", b"12", b"x"],
                                    [b"abc", b"c", b"-1", b"x", "é".encode()[:1]]])
def test_distances_are_those_of_all_sequences(pattern, tokens):
    automaton, trie = Automaton(pattern), TokenTrie(tokens)
    distance = tokens_to_finish(automaton, trie)
    queue = [START]
    for state in queue:
        truth = brute_distance(automaton, tokens, state)
        assert distance[state] == truth or distance[state] > 4 and truth == FAR
        reached = naive(automaton, tokens, state)
        queue += [s for s in set(reached) if s != DEAD and s not in queue]
    assert distance[DEAD] == FAR


# Texts -------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_text_breaks_its_pattern(noise, pattern):
    length = 12
    texts = written(noise, Constraint(pattern, TRIE, length=length), length=length)
    assert all(re.fullmatch(pattern, text.decode(), re.ASCII) for text in texts)
    beginnings = written(noise, Constraint(pattern, TRIE), length=3)
    automaton = Automaton(pattern)
    assert all(automaton.run(text) != DEAD for text in beginnings)


def test_without_the_constraint_they_do_and_without_a_length_they_are_cut_off(noise):
    pattern = r"(ab|12){6,}"
    fits = lambda texts: sum(re.fullmatch(pattern.encode(), text) is not None for text in texts)
    assert fits(written(noise, None, length=8)) == 0
    assert fits(written(noise, Constraint(pattern, TRIE), length=8)) < 64
    assert fits(written(noise, Constraint(pattern, TRIE, length=8), length=8)) == 64


@pytest.mark.parametrize("length", range(3, 9))
def test_a_length_is_used_up_to_its_last_token(noise, length):
    constraint = Constraint("a{3,40}", TRIE, length=length)  # one token a letter
    texts = written(noise, constraint, n=200, length=length)
    assert {len(text) for text in texts} == set(range(3, length + 1))


def test_rows_that_end_fork_and_are_drawn_alone(noise):
    pattern, prompts = "(ab|c){1,9}", [[END], [97, 98, END], [7, END]]
    make = lambda: Constraint(pattern, TRIE)
    together = generate_text(noise, prompts, 20, n=3, seed=5, end_of_text=END, adjust=make())
    for b, row in enumerate(together):
        prompt = prompts[b // 3]
        alone = generate_text(noise, prompt, 20, seed=5 + b, end_of_text=END, adjust=make())
        assert alone[0] == row
        new = [i for i in row[len(prompt):] if i != END]
        assert re.fullmatch(pattern, TOKENIZER.decode(new))
    assert len({len(row) for row in together}) > 2  # they end at different steps


def test_one_constraint_serves_many_generations_at_once(noise):
    constraint, options = Constraint("[a-z]{1,9}!", TRIE), dict(end_of_text=END, seed=3)
    runs = [generate_steps(noise, [END, b], 12, adjust=constraint, **options) for b in (1, 2)]
    mixed = [[], []]
    for steps in itertools.zip_longest(*runs):
        for row, tokens in zip(mixed, steps):
            row += [] if tokens is None else tokens.ids
    for b, row in enumerate(mixed, 1):
        fresh = Constraint("[a-z]{1,9}!", TRIE)
        assert generate_text(noise, [END, b], 12, adjust=fresh, **options)[0][2:] == row


def test_a_stop_string_ends_rows_whose_neighbours_go_on(noise):
    rows = generate_text(noise, [[END], [65, 66], [END]], 30, n=5, seed=0, end_of_text=END,
                         adjust=Constraint("([a-c]{1,3}!){1,9}", TRIE), stop="!",
                         tokenizer=TOKENIZER)
    for b, row in enumerate(rows):
        new = row[len([[END], [65, 66], [END]][b // 5]):]
        assert re.fullmatch("[a-c]{1,3}!?", TOKENIZER.decode(i for i in new if i != END))


def test_beams_are_held_too(noise):
    pattern = "(ab|abc|bc){2,3}(true|12)"
    found = beam_search(noise, [[END], [END, 97]], 4, 12, end_of_text=END,
                        adjust=Constraint(pattern, TRIE, length=12))
    for hypotheses in found:
        assert len(hypotheses) == 4
        for one in hypotheses:
            text = TOKENIZER.decode(i for i in one.new_ids if i != END)
            assert re.fullmatch(pattern, text), text


def test_with_a_sampler_and_as_a_stream(noise):
    sampler = Sampler(temperature=2.0, top_k=3, repetition_penalty=1.3)
    for seed in range(20):
        text = written(noise, Constraint("[ab]{2,5}é", TRIE), n=1, seed=seed, sampler=sampler)[0]
        assert re.fullmatch("[ab]{2,5}é", text.decode())
    pieces = list(stream_text(noise, TOKENIZER, "x", 20, adjust=Constraint("[é中]{3}", TRIE),
                              end_of_text=END, seed=0))
    assert re.fullmatch("[é中]{3}", "".join(pieces).removesuffix(END_OF_TEXT))


# One call ----------------------------------------------------------------------------
def test_logits_are_kept_where_allowed_and_never_changed():
    constraint, logits = Constraint("ab?", TRIE), torch.randn(2, V, dtype=torch.bfloat16)
    before, texts = logits.clone(), [[5, 97, 98], [6, 7, 256 + MORE.index(b"ab")]]
    found = [*constraint(logits[:1], [0], texts, 2), *constraint(logits[1:], [1], texts, 1)]
    assert torch.equal(logits, before)
    mask = constraint.mask(constraint.automaton.run(b"ab"))
    for row, old in zip(found, logits):
        assert row.dtype == old.dtype and mask.any() and not mask.all()
        assert torch.equal(row[mask], old[mask])
        assert (row[~mask] == -torch.inf).all()


@pytest.mark.parametrize("size", [V + 47, V - 3])
def test_models_whose_vocabulary_has_another_size(size):
    constraint = Constraint("[ab]", TRIE)
    found = constraint(torch.zeros(1, size), [0], [[1]], 0)
    assert found.shape == (1, size)
    assert found[0].isfinite().nonzero()[:, 0].tolist() == [97, 98]


def test_ended_rows_get_the_end_and_nothing_else():
    constraint = Constraint("a+", TRIE)
    found = constraint(torch.zeros(2, V), [1, 0], [[3, 97, 97], [9, 97, END]], 2)
    assert found[0].isfinite().nonzero()[:, 0].tolist() == [END]
    assert found[1].isfinite()[[97, END]].all()


def test_errors():
    with pytest.raises(ValueError, match="end_of_text=None"):
        Constraint("a", BYTES)
    for bad in (-1, 256):
        with pytest.raises(ValueError, match=f"end_of_text={bad}"):
            Constraint("a", BYTES, end_of_text=bad)
    with pytest.raises(ValueError, match="length=2: the shortest text needs 3 tokens"):
        Constraint("aaa", TRIE, length=2)
    with pytest.raises(ValueError, match="bytes that no token holds"):
        Constraint("ax", [b"a", b"b"], end_of_text=1, length=9)
    with pytest.raises(ValueError, match="lookahead"):
        Constraint("a(?=b)", TRIE)
    with pytest.raises(ValueError, match="more than 100 states"):
        tokens_to_finish(Automaton("[ab]*a[ab]{15}"), TRIE, most=100)
    stuck = Constraint("ax", [b"a", b"b"], end_of_text=1)
    with pytest.raises(ValueError, match="no token can go on.*b'x'"):
        stuck(torch.zeros(1, 2), [0], [[0]], 1)
    with pytest.raises(ValueError, match="misfit"):
        Constraint("a", TRIE)(torch.zeros(1, V), [0], [[98]], 1)


# Vocabularies ------------------------------------------------------------------------
def test_bytes_of_tokenizers():
    assert tokens_as_bytes(TOKENIZER) == [*BYTES, *MORE, None]
    assert tokens_as_bytes([b"a", None]) == [b"a", None]


def test_bytes_of_a_tokenizer_that_lacks_some():
    from gptbook.tokenizer_files import PartialTokenizer
    ranks = {b: i for i, b in enumerate(b for b in BYTES if b != b"\x04")}
    partial = PartialTokenizer("p", ranks | {b"\x04": 256}, {END_OF_TEXT: 255}, absent=1)
    assert tokens_as_bytes(partial) == [*(b for b in BYTES if b != b"\x04"), None]
    with pytest.raises(ValueError, match="no token can go on"):
        Constraint(r"\x04", partial).mask(START)


def test_bytes_of_the_library_tokenizers():
    pytest.importorskip("tokenizers")
    from gptbook.tokenizer_files import LibraryTokenizer, to_tokenizer_json
    ours = train_bpe("one two three é 中, one two three. " * 20, 300)
    theirs = LibraryTokenizer(json.dumps(to_tokenizer_json(ours)))
    assert tokens_as_bytes(theirs) == tokens_as_bytes(ours)
    words = {"model": {"type": "WordLevel", "vocab": {"<unk>": 0, "über uns": 1},
                       "unk_token": "<unk>"}, "version": "1.0", "added_tokens": []}
    with pytest.raises(ValueError, match="not byte-level"):
        tokens_as_bytes(LibraryTokenizer(json.dumps(words)))


# JSON --------------------------------------------------------------------------------
NAME = {"type": "string", "minLength": 1, "maxLength": 6}
SCHEMAS = [
    {"type": "string"}, {"type": "string", "maxLength": 0}, NAME, {"type": "integer"},
    {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, "x\"é\n"]}},
    {"enum": [1, "one", None, True, 1.5]}, {"type": "number", "enum": [1, "one", 2.5, True]},
    {"type": ["string", "null"], "maxLength": 2}, {"anyOf": [NAME, {"type": "integer"}]},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 0},
    {"type": "array", "items": {"type": "boolean"}},
    {"type": "array", "items": NAME, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": {"type": "null"}, "minItems": 1},
    {"type": "object"}, {"type": "object", "properties": {}, "additionalProperties": False},
    *({"type": "object", "properties": {k: {"type": "boolean"} for k in "abc"},
       "required": list(required)} for n in range(4) for required in itertools.combinations("abc", n)),
    {"type": "object", "properties": {'q"\\\n é': {"type": "null"}}, "required": ['q"\\\n é']},
    {"type": "string", "pattern": "^[A-C]{2,3}$"}, {"type": "string", "pattern": "^a|b"[:2]},
    {"type": "string", "pattern": "x$"}, {"type": "string", "pattern": "é|中"},
    {"type": "string", "pattern": r'^["\\\n/é]{1,3}$'}, {"type": "string", "pattern": r"^[^a-z]{2}$"},
    {"$defs": {"n": NAME, "a/b~": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}},
     "type": "object", "properties": {"x": {"$ref": "#/$defs/a~1b~0"}, "y": {"$ref": "#/$defs/n"}},
     "required": ["x", "y"], "title": "T", "description": "D"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_all_that_is_written_is_valid(noise, schema):
    judge = Draft202012Validator(schema)
    judge.check_schema(schema)
    texts = written(noise, Constraint(json_pattern(schema), TRIE, length=60), n=48)
    for text in texts:
        assert judge.is_valid(json.loads(text)), text


def test_the_judge_sees_texts_that_are_not(noise):
    judge = Draft202012Validator(NAME)
    texts = written(noise, Constraint('"[a-z]{0,20}"', TRIE, length=30), n=48)
    assert not all(judge.is_valid(json.loads(text)) for text in texts)


def example(schema, rng, root):
    """A value that a schema allows, made from its definition."""
    pick = lambda low, high: rng.randint(low, low + 4 if high is None else high)
    if "$ref" in schema:
        found = root
        for key in schema["$ref"].split("/")[1:]:
            found = found[key.replace("~1", "/").replace("~0", "~")]
        return example(found, rng, root)
    if "anyOf" in schema:
        return example(rng.choice(schema["anyOf"]), rng, root)
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return rng.choice([v for v in values if Draft202012Validator(schema).is_valid(v)])
    kind = schema["type"] if isinstance(schema["type"], str) else rng.choice(schema["type"])
    if kind == "string" and "pattern" in schema:
        judge = Draft202012Validator(schema)
        while True:  # Python's $ also stands before a last new line; JSON schema's does not
            text = "".join(rng.choices('ABCabx"\\\n/é中', k=rng.randint(1, 3)))
            if judge.is_valid(text) and not text.endswith("\n"):
                return text
    if kind == "string":
        n = pick(schema.get("minLength", 0), schema.get("maxLength"))
        return "".join(rng.choices('ab \x00\n\t"\\/\x7fé中' + chr(0x2028), k=n))
    if kind == "array":
        n = pick(schema.get("minItems", 0), schema.get("maxItems"))
        return [example(schema["items"], rng, root) for _ in range(n)]
    if kind == "object":
        return {name: example(part, rng, root) for name, part in schema.get("properties", {}).items()
                if name in schema.get("required", []) or rng.random() < 0.5}
    return {"integer": lambda: rng.choice((0, 7, -12, 10**20)), "null": lambda: None,
            "number": lambda: rng.choice((0, -1, 2.5, 1e-9, -3e30, 123456.789)),
            "boolean": lambda: rng.random() < 0.5}[kind]()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_all_that_is_valid_can_be_written(schema):
    rng, judge, machine = random.Random(0), Draft202012Validator(schema), Automaton(json_pattern(schema))
    plain = "const" not in schema and "pattern" not in json.dumps(schema)
    for _ in range(30):
        value = example(schema, rng, schema)
        assert judge.is_valid(value)
        assert machine.matches(json.dumps(value, ensure_ascii=False)), value
        if plain and "é" not in json.dumps(schema, ensure_ascii=False):
            assert machine.matches(json.dumps(value)), value
            assert machine.matches(json.dumps(value, separators=(",", ":"))), value


@pytest.mark.parametrize("schema, wrong", [
    (NAME, ['""', '"1234567"', "x", '"a', '"\n"', '"\\x"', '"\\ud800"', '"\ud83d"', '"a"" ']),
    ({"type": "integer"}, ["01", "+1", "1.0", "1e2", "", "-", "--1", " 1"]),
    ({"type": "number"}, ["1.", ".5", "1e", "NaN", "Infinity", "0x1", "1,5"]),
    ({"type": "boolean"}, ["True", "1", '"true"']), ({"type": "null"}, ["None", ""]),
    ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2},
     ["[]", "[null,]", "[,null]", "[null null]", "[null,null,null]", "null"]),
    ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
      "required": ["b"]}, ["{}", '{"a":null}', '{"b":null,}', '{"b":null,"a":null}', '{,"b":null}',
                           '{"a":null "b":null}', '{"b":null,"c":null}', '{"b":null,"b":null}']),
])
def test_what_is_not_valid_cannot_be_written(schema, wrong):
    machine = Automaton(json_pattern(schema))
    assert [text for text in wrong if machine.matches(text)] == []


def test_space_is_what_one_asks_for():
    schema = {"type": "array", "items": {"type": "null"}}
    assert Automaton(json_pattern(schema, "")).matches("[null,null]")
    assert not Automaton(json_pattern(schema, "")).matches("[null, null]")
    assert Automaton(json_pattern(schema, r"\s*")).matches("[null,\n  null]")


@pytest.mark.parametrize("schema, said", [
    (True, "where a schema is expected"), ({}, "type=None"), ({"type": "any"}, "type='any'"),
    ({"type": []}, "type=[]"), ({"type": "integer", "minimum": 1}, "'minimum' is not supported"),
    ({"type": "array"}, "not regular"), ({"type": "string", "format": "date"}, "'format'"),
    ({"type": "object", "properties": {"a": {"type": "x"}}}, "at #/a "),
    ({"type": "object", "required": ["b"]}, "'b' is required"),
    ({"type": "object", "additionalProperties": {"type": "null"}}, "additionalProperties"),
    ({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}, "in order"),
    ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "string", "maxLength": 1.5}, "whole numbers"), ({"enum": []}, "no value is left"),
    ({"type": "string", "maxLength": True}, "whole numbers"),
    ({"type": "string", "enum": [1]}, "no value is left"), ({"anyOf": []}, "list of schemas"),
    ({"anyOf": [{"type": "null"}, {"type": "no"}]}, "at #/anyOf/1 "),
    ({"anyOf": [{"type": "null"}], "maxLength": 3}, "'maxLength' beside 'anyOf'"),
    ({"$ref": "#/$defs/no"}, "not found"), ({"$ref": "http://x"}, "not found"), ({"$ref": "#"}, "itself"),
    ({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, "itself"),
    ({"type": "string", "pattern": "a", "minLength": 2}, "beside a length"),
    ({"type": "string", "pattern": "^a|b$"}, "one side only"), ({"oneOf": [{"type": "null"}]}, "type=None"),
    ({"enum": "abc"}, "enum='abc' must be a list"), ({"enum": 5}, "enum=5 must be"),
    ({"type": "string", "pattern": 5}, "pattern=5 must be a text, at # "),
    ({"type": "object", "properties": ["a"]}, "'properties' must be an object"),
    ({"type": "object", "required": True}, "'required' a list"),
    ({"type": "object", "required": "a", "properties": {"a": {"type": "null"}}}, "'required' a list"),
    ({"type": "object", "required": [["a"]]}, "['a'] is required and has no schema"),
    ({"type": "string", "pattern": "a(?=b)"}, "lookahead"), ({"const": float("nan")}, "JSON"),
])
def test_schemas_that_are_refused(schema, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        json_pattern(schema)
