"""What a pattern does to a model's texts, and what its masks cost.

    python benchmarks/constrained.py            # about three minutes on one thread
    python benchmarks/constrained.py --quick    # fewer texts, nothing written

The model that travels with the package and one with random weights write texts with and without
a constraint; Python's `re`, `json` and, if it is installed, `jsonschema` judge them. The costs are
those of GPT-2's vocabulary of 50,257 tokens, and of the small model's own.
"""
import argparse
import json
import re
from importlib.util import find_spec
from statistics import median
from time import perf_counter

import torch
from results_file import record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.constrained import Constraint, TokenTrie, json_pattern
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.patterns import DEAD, START
from gptbook.tokenizer import gpt2_tokenizer

FLAT = {"type": "object", "required": ["who", "did", "happy"], "properties": {
    "who": {"enum": ["Lily", "Tom", "the cat"]}, "happy": {"type": "boolean"},
    "did": {"type": "string", "minLength": 3, "maxLength": 30}, "age": {"type": "integer"}}}
DEEP = {"type": "array", "minItems": 1, "maxItems": 3, "items": {
    "type": "object", "required": ["at"], "properties": {
        "at": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "name": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z][a-zé]*$"}]}}}}
PATTERNS = {
    "a sentence": r" (Lily|Tom|the cat|they) (was|went|saw|found|ran|sat|had)( [a-z]+){1,8}\.",
    "a date": r" (19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    "a flat object": FLAT, "a nested list": DEEP}
PROMPT = "The cat sat on the mat. It was fluffy. Lily gave it a hug. Soon,"


def fits(rule, text: str) -> bool:
    """Judged by others: `re` for a pattern, `json` and `jsonschema` for a schema."""
    if isinstance(rule, str):
        return re.fullmatch(rule, text, re.ASCII) is not None
    try:
        content = json.loads(text)
    except ValueError:
        return False
    if find_spec("jsonschema"):
        from jsonschema import Draft202012Validator
        return Draft202012Validator(rule).is_valid(content)
    return True


def write(model, tokenizer, start, n, length, **options) -> list:
    """(new text, whether it came to its end)."""
    end, found = tokenizer.end_of_text, []
    for seed in range(0, n, 50):
        rows = generate_text(model, start, length, n=min(50, n - seed), seed=1000 * seed,
                             end_of_text=end, **options)
        for row in rows:
            new = row[len(start):]
            found.append((tokenizer.decode([i for i in new if i != end]), new[-1] == end))
    return found


def validity(models, tokenizer, trie, start, n, length) -> dict:
    """How many of n texts fit: free, constrained, and constrained to a length."""
    found = {}
    for who, model in models.items():
        for what, rule in tqdm(PATTERNS.items(), who):
            pattern = rule if isinstance(rule, str) else json_pattern(rule)
            ways = {"free": {}} if who == "trained" else {}
            ways |= {"constrained": {"adjust": Constraint(pattern, trie)},
                    "to a length": {"adjust": Constraint(pattern, trie, length=length)}}
            counts = {}
            for way, options in ways.items():
                texts = write(model, tokenizer, start, n, length, **options)
                counts[way] = {"fit": sum(fits(rule, text) for text, _ in texts),
                               "ended": sum(ended for _, ended in texts),
                               "ended_and_broken": sum(
                                   ended and not fits(rule, text) for text, ended in texts)}
            found[f"{who}, {what}"] = counts
    return found


def seconds(call, repeats: int) -> float:
    """The median of several calls."""
    took = []
    for _ in range(repeats):
        started = perf_counter()
        call()
        took.append(perf_counter() - started)
    return median(took)


def mask_costs(tokenizer, repeats: int) -> dict:
    """What masks cost at this vocabulary, for the flat object."""
    trie = TokenTrie(tokenizer)
    figures = {"vocabulary": len(trie.tokens),
               "trie_seconds": seconds(lambda: TokenTrie(tokenizer), 3)}
    text = '{"who": "Lily", "happy": true, "did": "found a blue ball", "age": 3}'.encode()
    firsts, naive = [], []
    for _ in range(3):
        constraint, state = Constraint(json_pattern(FLAT), trie), START
        for byte in text:
            started = perf_counter()
            constraint.mask(state)
            firsts.append(perf_counter() - started)
            state = constraint.automaton.run(bytes([byte]), state)
    inside = constraint.automaton.run(text[:43])
    for state in (START, inside):
        def by_definition(state=state):
            return [token is not None and constraint.automaton.run(token, state) != DEAD
                    for token in trie.tokens]
        ours = constraint.after(state) != DEAD
        assert by_definition() == ours.tolist()
        naive.append(seconds(by_definition, 3))
    walks = [seconds(lambda state=state: trie.walk(constraint.automaton, state), repeats)
             for state in (START, inside)]
    figures |= {"first_visit_ms": {"median": 1e3 * median(firsts), "largest": 1e3 * max(firsts)},
                "walk_ms": {"tight": 1e3 * walks[0], "inside a string": 1e3 * walks[1]},
                "naive_ms": {"tight": 1e3 * naive[0], "inside a string": 1e3 * naive[1]}}
    for rows in (1, 32):
        logits, new = torch.randn(rows, len(trie.tokens)), [tokenizer.encode(text[:43])] * rows
        call = lambda: constraint(logits, range(rows), new, len(new[0]))
        call()
        figures[f"call_us_{rows}_rows"] = 1e6 * seconds(call, repeats)
    started = perf_counter()
    full = Constraint(json_pattern(FLAT), trie, length=100)
    figures["length_seconds"] = perf_counter() - started
    figures["length_states"] = len(full.automaton.sets) - 1
    return figures


def share_of_a_step(model, tokenizer, trie, start, repeats: int) -> dict:
    """Seconds a token, free and constrained in turn, one row."""
    constraint = Constraint(f" [a-z ,.]{{{400}}}", trie)  # as long as the free text
    decoder = Decoder(model, 1, 192)
    took = {"free": [], "constrained": []}
    for seed in range(repeats + 1):
        for way, adjust in (("free", None), ("constrained", constraint)):
            started = perf_counter()
            generate_text(decoder, start, 100, seed=seed, adjust=adjust)
            took[way].append((perf_counter() - started) / 100)
    pairs = zip(took["constrained"][1:], took["free"][1:])  # the first makes the masks
    return {"free_us": 1e6 * median(took["free"][1:]),
            "ratio": median(a / b for a, b in pairs)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    demo, tokenizer = load_demo()
    trie = TokenTrie(tokenizer)
    set_seed(0)
    noise = GPTModel(GPTConfig(demo.config.vocab_size, 192, 32, 1, 2)).eval()
    start = [tokenizer.end_of_text, *tokenizer.encode(PROMPT)]
    n, repeats = (20, 5) if args.quick else (125, 21)
    figures = {
        "n": n, "length": 60,
        "texts": validity({"trained": demo, "random": noise}, tokenizer, trie, start, n, 60),
        "costs": {"gpt2": mask_costs(gpt2_tokenizer(), repeats),
                  "stories": mask_costs(tokenizer, repeats)},
        "step": share_of_a_step(demo, tokenizer, trie, start, repeats)}
    print(json.dumps(figures, indent=1))
    if not args.quick:
        print(record("constrained", figures))


if __name__ == "__main__":
    main()
