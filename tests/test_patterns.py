"""Patterns against Python's `re`, characters against UTF-8, and what is refused."""
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbook import patterns
from gptbook.patterns import DEAD, START, Automaton, all_but, parse_pattern, utf8_ranges

LETTERS = ["a", "b", "c", "-", "é", "中", "😀", "\n", "0", " "]
ATOMS = ["a", "b", "c", "é", "中", "😀", "0", " ", ".", r"\d", r"\w", r"\s", r"\W", r"\D", r"\S",
         r"\n", r"\-", r"\.", r"\xe9", r"\u4e2d", r"\U0001f600", "[ab]", "[^ab]", "[a-c]", "[^a-c]",
         "[é-中]", "[^é-中]", "[-a]", "[a-]", r"[\d-]", r"[^\d\s]", "[]a]", "[^]a]", r"[\]\\-]",
         "[中-😀]", "[+*?.|(){}^$]", "}", "]", "(?P<name>a)"]
COUNTS = ["", "", "*", "+", "?", "{2}", "{0}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{1,2}?"]


def verdicts_differ(pattern, texts, judge=None):
    """The texts on which `re` and our machine (or another judge) differ."""
    oracle = re.compile(pattern, re.ASCII)
    judge = judge or Automaton(pattern).matches
    return [text for text in texts if judge(text) != bool(oracle.fullmatch(text))]


def random_pattern(rng, depth=2):
    """A pattern; no group has a name twice. Deeper ones can keep `re` busy for ever."""
    if not depth or rng.random() < 0.3:
        atom = rng.choice(ATOMS).replace("name", f"n{rng.getrandbits(60)}")
        return atom + rng.choice(COUNTS)
    parts = [random_pattern(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 3)))]
    body = rng.choice(("", "", "|")).join(parts)
    return rng.choice(("({})", "(?:{})")).format(body) + rng.choice(COUNTS)


def random_text(rng):
    return "".join(rng.choices(LETTERS, k=rng.choice((0, 1, 1, 2, 2, 3, 4, 6))))


def fitting(pattern, rng):
    """A short text that fits, by a walk through the machine: so that both verdicts are tried.

    Short, because `re` can take exponential time."""
    machine, state, data = Automaton(pattern), START, b""
    while len(data) < 12:
        if machine.accepting[state] and rng.random() < 0.4:
            return data.decode()
        machine.look(state)
        ways = machine.table[state].nonzero()[0].tolist()
        if not ways:
            return data.decode()
        near = [b for b in ways if b in b"abc-\xc3\xa9\xe4\xb8\xad\n0 "] or ways
        data += bytes([rng.choice(near)])
        state = machine.run(data[-1:], state)
    return ""


@pytest.mark.parametrize("seed", range(8))
def test_a_pattern_matches_what_re_matches(seed):
    rng, yes, total = random.Random(seed), 0, 0
    for _ in range(150):
        pattern = random_pattern(rng)
        texts = [random_text(rng) for _ in range(30)] + [fitting(pattern, rng) for _ in range(4)]
        assert verdicts_differ(pattern, texts) == [], pattern
        yes += sum(map(Automaton(pattern).matches, texts))
        total += len(texts)
    assert 0.05 * total < yes < 0.95 * total


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=8))
def test_any_text_fits_its_own_escape_and_no_other_pattern(text):
    assert Automaton(re.escape(text)).matches(text)
    assert not Automaton(re.escape(text) + "a").matches(text)
    assert Automaton(r"[\s\S]*").matches(text)
    assert Automaton(".*").matches(text) == ("\n" not in text)


def test_the_comparison_sees_wrong_machines():
    texts = ["", "a", "b", "ab", "ba", "é", "a\n", "aa"]
    assert verdicts_differ("a|b", texts) == []
    for wrong in (lambda t: t.startswith(("a", "b")), lambda t: t in ("a",), lambda t: True):
        assert verdicts_differ("a|b", texts, wrong)
    assert verdicts_differ(".", texts, lambda t: len(t.encode()) == 1)


@pytest.mark.parametrize("pattern, yes, no", [
    ("", [""], ["a"]), ("^a$", ["a"], ["", "aa", "a\n"]), ("a||b", ["a", "", "b"], ["ab"]),
    ("(a*)*b", ["b", "aab"], ["a", ""]), ("(|a){2,3}", ["", "a", "aa", "aaa"], ["aaaa"]),
    ("(a?){3}", ["", "aaa"], ["aaaa"]), ("a{0}", [""], ["a"]), (r"a\$", ["a$"], ["a"]),
    (r"\$$", ["$"], [""]), ("[$]", ["$"], [""]), (r"\.\*\\", [".*\\"], [".."]),
    (r"\t\n\v\f\r", ["\t\n\v\f\r"], ["t"]), ("é{2}", ["éé"], ["é", "é" + chr(0xA9)]),
    (r"\d", list("0123456789"), ["٣", "a"]), (r"\w", ["_", "Z", "9"], ["é", "-"]),
    (r"\s", [" ", "\x0b"], ["\xa0"]), (r"\S", ["\xa0", "中"], [" ", "\n"]),
    ("[\U00010000-\U0010ffff]", ["😀", "\U0010ffff"], ["\uffff"]),
])
def test_patterns_by_hand(pattern, yes, no):
    machine = Automaton(pattern)
    assert [t for t in yes if not machine.matches(t)] == []
    assert [t for t in no if machine.matches(t)] == []
    assert machine.run(b"") == START and not machine.matches("\ud800")


@pytest.mark.parametrize("pattern, said, at", [
    ("a)", "closes nothing", 1), ("(a", "never closed", 0), ("x(?:a|(b)", "never closed", 1),
    ("[a", "never closed", 0), ("[]", "never closed", 0), ("*a", "repeats nothing", 0),
    ("a|+", "repeats nothing", 2), ("a**", "a count of a count", 2), ("a{2}{3}", "a count of", 4),
    ("a*+", "possessive", 1), ("a{2}+", "possessive", 1), ("a{3,2}", "in order", 1),
    ("a{1001}", "at most 1000", 1), ("a{}", "without a number", 1), ("{2}", "counts nothing", 0),
    ("a{x}", "counts nothing", 1), ("a^b", "anchor ^", 1), ("a$b", "anchor $", 1),
    ("(a$)", "anchor $", 2), ("^^a", "anchor ^", 1), ("(?=a)", "a lookahead", 0),
    ("b(?!a)", "a negative lookahead", 1), ("(?<=a)", "a lookbehind", 0),
    ("(?<!a)", "a negative lookbehind", 0), ("(?P=n)", "a backreference", 0),
    ("(?>a)", "an atomic group", 0), ("(?(1)a)", "a condition", 0), ("(?#a)", "a comment", 0),
    ("(?i)a", "a flag", 0), ("(?", "a flag", 0), (r"(a)\1", "backreference", 3),
    (r"\bа", "the escape", 0), (r"\A", "the escape", 0), (r"\Z", "the escape", 0),
    (r"\p{L}", "the escape", 0), ("a\\", "the escape", 1), (r"\xg0", "digits", 0),
    (r"\u12", "digits", 0), (r"\U00110000", "digits", 0), ("[z-a]", "backwards", 1),
    (r"[\d-z]", "one character at each end", 1), (r"[a-\w]", "one character at each end", 1),
    ("(" * 101 + ")" * 101, "more than 100", 100),
])
def test_what_is_refused_is_named_with_its_place(pattern, said, at):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        Automaton(pattern)
    assert f"at position {at} of" in str(caught.value)


def test_empty_classes_and_large_patterns_are_refused():
    with pytest.raises(ValueError, match="no character"):
        Automaton(r"[^\s\S]")
    with pytest.raises(ValueError, match="no character"):
        Automaton(r"[\ud800-\udfff]")
    with pytest.raises(ValueError, match="100,000 states"):
        Automaton("(a{1000}){1000}")
    assert Automaton("(" * 100 + "a" + ")" * 100).matches("a")


def test_all_but():
    rng = random.Random(0)
    for _ in range(200):
        ranges = [tuple(sorted((rng.randrange(30), rng.randrange(30))))
                  for _ in range(rng.randrange(5))]
        inside = {c for low, high in ranges for c in range(low, high + 1)}
        outside = all_but(ranges)
        assert outside[-1][1] == 0x10FFFF
        assert all(a <= b for a, b in outside)
        assert {c for low, high in outside for c in range(low, min(high, 40) + 1)} == (
            set(range(41)) - inside)
    assert all_but([(0, 0x10FFFF)]) == []


EDGES = [0, 0x41, 0x7F, 0x80, 0xBF, 0xC0, 0x7FF, 0x800, 0xFFF, 0x1000, 0xD7FF, 0xE000, 0xFFFD,
         0xFFFF, 0x10000, 0x3FFFF, 0x40000, 0xFFFFF, 0x100000, 0x10FFFF]


def covered(low, high):
    """All code points in the sequences of a range, by listing every sequence."""
    found = []
    for way in utf8_ranges(low, high):
        rows = np.zeros((1, 0), int)
        for a, b in way:
            here = np.arange(a, b + 1)
            rows = np.hstack([np.repeat(rows, len(here), 0), np.tile(here, len(rows))[:, None]])
        lead = {1: 0x7F, 2: 0x1F, 3: 0x0F, 4: 0x07}[len(way)]
        code = rows[:, 0] & lead
        for column in rows[:, 1:].T:
            assert (column >= 0x80).all() and (column <= 0xBF).all()
            code = code << 6 | column & 0x3F
        shortest = {1: 0, 2: 0x80, 3: 0x800, 4: 0x10000}[len(way)]
        assert (code >= shortest).all()
        found.append(code)
    return np.sort(np.concatenate(found)) if found else np.zeros(0, int)


@pytest.mark.parametrize("low", EDGES[::3] + [0xD000, 0xD800])
@pytest.mark.parametrize("high", [*EDGES[1::4], 0x10FFFF, 0xDFFF])
def test_byte_ranges_hold_each_character_once_and_no_surrogate(low, high):
    codes = np.arange(low, high + 1)
    expected = codes[(codes < 0xD800) | (codes > 0xDFFF)]
    assert np.array_equal(covered(low, high), expected)


def test_every_character_is_one_dot():
    """All 1,112,064 characters at once, and nothing that is not a character."""
    machine, sizes = Automaton(r"[\s\S]"), {}
    for code in range(0x110000):
        if not 0xD800 <= code <= 0xDFFF:
            data = chr(code).encode()
            sizes.setdefault(len(data), bytearray()).extend(data)
    assert sum(len(data) // size for size, data in sizes.items()) == 1_112_064
    for size, data in sizes.items():
        columns = np.frombuffer(bytes(data), np.uint8).reshape(-1, size).T
        states = np.full(columns.shape[1], START)
        for column in columns:
            assert not np.array(machine.accepting)[states].any()  # not in the middle of one
            states = machine.step(states, column)
        assert np.array(machine.accepting)[states].all()
    for data in (b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\x80",
                 b"\xc3", b"\xf0\x80\x80\x80"):
        assert not machine.accepting[machine.run(data)], data


def test_nothing_repeated_is_nothing():
    """A thousand million times the empty text must not be built."""
    for pattern in ("(?:(?:(?:){1000}){1000}){1000}", "((a{0}){1000}){1000}", "()*"):
        assert parse_pattern(pattern) == ("then", [])
        assert Automaton(pattern).matches("") and not Automaton(pattern).matches("a")
    assert Automaton("(a|){3}b").matches("aab")


def test_a_row_follows_the_free_edges_once(monkeypatch):
    """From 2,500 states at once, not from each of them: that took minutes."""
    calls, right = [], Automaton.closure
    machine = Automaton("(?:(?:a?){50}){50}")
    monkeypatch.setattr(patterns.Automaton, "closure",
                        lambda self, states: calls.append(1) or right(self, states))
    machine.run(b"aa")
    assert len(calls) <= 6  # three ranges of bytes a row


def test_steps_at_once_are_steps_one_by_one():
    machine, other = Automaton("(a|é)*b{2,3}|中."), Automaton("(a|é)*b{2,3}|中.")
    rng = np.random.default_rng(0)
    states = np.array([START])
    for _ in range(6):
        states = np.repeat(states, 256)[rng.permutation(len(states) * 256)[:500]]
        data = rng.integers(0, 256, len(states))
        data[::2] = rng.choice(list("abé中".encode()), len(data[::2]))
        after = machine.step(states, data)
        sets = [machine.sets[s] for s in after.tolist()]
        for before, byte, reached in zip(states.tolist(), data.tolist(), sets):
            same = other.number(machine.sets[before])
            assert other.sets[other.run(bytes([byte]), same)] == reached
        states = after
    assert machine.step(np.array([DEAD]), np.array([97]))[0] == DEAD


def test_states_are_made_when_they_are_met():
    machine = Automaton("(a|b)*a(a|b){12}")
    assert len(machine.sets) == 2
    machine.run(b"ab" * 100)
    assert len(machine.sets) < 100


def test_a_long_text_and_a_deep_loop():
    machine = Automaton("((((a*)*)*)*|b)*c")
    assert machine.matches("a" * 100_000 + "c") and not machine.matches("a" * 100_000)


def test_the_tree_has_four_kinds():
    kinds = set()

    def walk(tree):
        kinds.add(tree[0])
        for part in tree[1] if tree[0] in ("then", "or") else [tree[1]] * (tree[0] == "times"):
            walk(part)

    walk(parse_pattern("a(b|c{2})*[x-z]"))
    assert kinds == {"set", "then", "or", "times"}


def test_without_the_free_edges_a_loop_is_missed(monkeypatch):
    monkeypatch.setattr(patterns.Automaton, "closure", lambda self, states: states)
    assert verdicts_differ("a(b|c)*", ["a", "ab", "abc"])
