"""What the story grammar is worth: entropy, variety, speed, and what its critic sees.

    python benchmarks/stories_statistics.py            # 2,000 stories, a few minutes
    python benchmarks/stories_statistics.py --stories 300

One process, one core, times in processor time. The entropy is the mean of exact −log2
P(text), with two standard errors; a corrupted story counts as flagged if the critic
names any problem, as placed if a problem touches the place that was changed, as named
if one also calls it by its kind.
"""
import argparse
import math
import random
import re
from collections import Counter
from statistics import mean, stdev
from time import process_time

from results_file import record
from tqdm import tqdm

from gptbook.critic import CORRUPTIONS, check_story, corrupt_story, sentences
from gptbook.data import tokenize
from gptbook.grammar import tell
from gptbook.stories import GRAMMAR, stories, story, story_bits, story_text, word_bits
from gptbook.tokenizer import train_bpe

SEED = 20_000   # a collection that nothing else uses
NAMES = {"dropped_sentence": "unknown_sentence"}   # what the critic should call it


def entropy(texts: list) -> dict:
    """Exact bits a story and a word, with two standard errors."""
    bits = [story_bits(text) for text in tqdm(texts, desc="bits")]
    words = [len(text.split()) for text in texts]
    ratio = sum(bits) / sum(words)
    spread = stdev(b - ratio * w for b, w in zip(bits, words))
    error = 2 * stdev(bits) / math.sqrt(len(bits))
    return {
        "stories": len(texts), "words": round(mean(words), 2),
        "bits_per_story": round(mean(bits), 2), "bits_per_story_error": round(error, 2),
        "bits_per_word": round(ratio, 4),
        "bits_per_word_error": round(2 * spread / math.sqrt(len(bits)) / mean(words), 4),
        "least_bits": round(min(bits), 1), "most_bits": round(max(bits), 1),
        "log10_stories": round((mean(bits) - error) * math.log10(2), 1),
    }


def lengths(texts: list) -> dict:
    """Share of stories by length, in bins of five words."""
    count = Counter(len(text.split()) // 5 * 5 for text in texts)
    return {"words": sorted(count), "share": [
        round(100 * count[length] / len(texts), 2) for length in sorted(count)]}


def by_word(texts: list, longest: int = 90) -> list:
    """Mean surprisal at each place of a story."""
    columns = [[] for _ in range(longest)]
    for text in tqdm(texts, desc="surprisal"):
        for column, (_, bits) in zip(columns, word_bits(text)):
            column.append(bits)
    return [round(mean(column), 3) for column in columns if column]


def vocabulary(texts: list) -> dict:
    """How many word forms there are, and how rare the rarest is."""
    seen = Counter()
    for text in texts:
        seen.update(set(re.findall(r"[\w']+", text)))
    return {"word_forms": len({word.lower() for word in seen}),
            "rarest_form_one_in": round(len(texts) / min(seen.values()))}


def derivation_gap(n: int) -> dict:
    """Bits that one derivation is too long, compared with its text."""
    gaps = []
    for index in range(n):
        counts, draw = [], random.Random(index).randrange
        text = tell(GRAMMAR, lambda n: counts.append(n) or draw(n))
        gaps.append(sum(map(math.log2, counts)) - story_bits(text))
    return {"share_ambiguous": round(mean(gap > 1e-6 for gap in gaps), 3),
            "derivation_excess_bits": round(mean(gaps), 2)}


def critic(n: int) -> dict:
    """Of n corrupted stories a kind: percent flagged, at the right place, by its name."""
    table = {}
    for kind in CORRUPTIONS:
        rows, index = [], 0
        bar = tqdm(total=n, desc=kind)
        while len(rows) < n:
            index += 1
            try:
                bad = corrupt_story(story(SEED + 1, index), kind, index)
            except ValueError:
                continue
            found = check_story(bad.text)
            here = [p for p in found if p.start <= bad.end and bad.start <= p.end]
            name = NAMES.get(kind, kind)
            rows.append((bool(found), bool(here), any(p.kind == name for p in here)))
            bar.update()
        bar.close()
        flagged, placed, named = (round(100 * mean(column), 1) for column in zip(*rows))
        table[kind] = {"n": n, "flagged": flagged, "placed": placed, "named": named}
    return table


def shuffled(text: str, seed: int) -> str:
    """The sentences of a story in another order."""
    parts = [text[start:end].strip() for start, end in sentences(text)]
    random.Random(seed).shuffle(parts)
    return " ".join(parts)


def timed(call, arguments: list) -> float:
    """Processor seconds a call, which other programs do not lengthen much."""
    start = process_time()
    for argument in arguments:
        call(argument)
    return (process_time() - start) / len(arguments)


def tokens(vocab_size: int) -> dict:
    """Tokens a story, and the share of words that are one token, for a trained vocabulary."""
    corpus = stories(5000, seed=SEED + 2, validation=300)
    tokenizer = train_bpe(corpus.text("train", 1_500_000), vocab_size)
    held_out = list(corpus.documents("validation"))
    words = [" " + word for text in held_out for word in re.findall(r"[A-Za-z]+", text)]
    counts = [len(tokenizer.encode(text)) for text in held_out]
    return {"tokens_per_story": round(len(tokenize(corpus, tokenizer, "validation"))
                                      / len(held_out), 1), "longest": max(counts),
            "words_that_are_one_token": round(
                mean(len(tokenizer.encode(word)) == 1 for word in words), 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stories", type=int, default=2000)
    parser.add_argument("--corrupted", type=int, default=600)
    args = parser.parse_args()
    texts = [story_text(SEED, index) for index in range(args.stories)]
    many = [story_text(SEED + 3, index) for index in tqdm(range(40_000), desc="stories")]
    figures = {
        **entropy(texts), **vocabulary(many), "equal_in_40000": len(many) - len(set(many)),
        **derivation_gap(args.stories // 2),
        "length": lengths(many), "bits_by_word": by_word(texts[:args.stories // 4]),
        "false_alarms": sum(bool(check_story(text)) for text in tqdm(texts, desc="critic")),
        "critic": critic(args.corrupted),
        "speed": {
            "stories_per_s": round(1 / timed(lambda i: story_text(0, i), range(3000))),
            "bits_ms": round(1000 * timed(story_bits, texts[:300]), 2),
            "check_ms": round(1000 * timed(check_story, texts[:300]), 2),
            "check_corrupted_ms": round(1000 * timed(check_story, [
                corrupt_story(story(SEED + 4, i), "wrong_pronoun").text
                for i in range(300)]), 2),
            "check_shuffled_ms": round(1000 * timed(check_story, [
                shuffled(story_text(SEED + 4, i), i) for i in range(300)]), 2),
        },
        "vocabulary": {str(size): tokens(size) for size in (1024, 2048)},
    }
    print(record("stories_statistics", figures))


if __name__ == "__main__":
    main()
