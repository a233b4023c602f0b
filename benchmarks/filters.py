"""Which filter writes the better stories? Each judged by the critic, at equal variety.

    python benchmarks/filters.py            # about four minutes on one core
    python benchmarks/filters.py --quick    # a few stories of each; writes nothing

The model that travels with the book writes stories with temperature alone, which gives a
curve of quality against variety, and with each filter at two strengths, at temperature 1.
Quality is the share of stories that end by themselves and in which the critic of the story
world finds no mistake; variety is the share of different four-word phrases (distinct-4).
`gain` is what a filter's quality lies above the curve at the same variety, means over the
seeds; null outside the curve, which has straight lines between its points. Those bend away
below a curve that falls ever faster, so the temperatures stand close where it falls. Neighbours
whose varieties come in the wrong order are one point, their mean. `error` is the gain's
standard error: both shares are counted, and both varieties have the spread that is seen
between the seeds (over all settings), which weighs as much as the curve is steep.
"""
import argparse
from statistics import mean, variance

import torch
from results_file import record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.critic import check_story
from gptbook.generation import generate_text
from gptbook.sampler import Sampler

TEMPERATURES = (0.4, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
FILTERS = {
    "top-k": ({"top_k": 50}, {"top_k": 5}),
    "top-p": ({"top_p": 0.9}, {"top_p": 0.7}),
    "min-p": ({"min_p": 0.1}, {"min_p": 0.3}),
    "typical": ({"typical_p": 0.9}, {"typical_p": 0.5}),
}


def distinct(texts: list, n: int = 4) -> float:
    """Share of different n-word phrases among all of them."""
    words = [text.split() for text in texts]
    phrases = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(phrases)) / max(1, len(phrases))


def judge(model, tokenizer, n: int, seed: int, settings: dict) -> dict:
    """Quality and variety of n stories."""
    end = tokenizer.end_of_text
    rows = generate_text(model, [[end]] * n, model.config.context_length - 1,
                         end_of_text=end, seed=seed, sampler=Sampler(**settings))
    texts = [tokenizer.decode([i for i in row if i != end]) for row in rows]
    good = [row[-1] == end and not check_story(text) for row, text in zip(rows, texts)]
    return {"pass": sum(good) / n, "distinct_4": round(distinct(texts), 4)}


def rising(points: list) -> list:
    """(variety, quality), coldest first, with neighbours merged until variety rises."""
    merged = []
    for variety, quality in points:
        merged.append((variety, quality, 1))
        while len(merged) > 1 and merged[-2][0] >= merged[-1][0]:
            (x, y, n), (x_, y_, n_) = merged.pop(), merged.pop()
            merged.append(((n * x + n_ * x_) / (n + n_), (n * y + n_ * y_) / (n + n_), n + n_))
    return [(x, y) for x, y, _ in merged]


def at_variety(curve: list, variety: float) -> tuple[float, float] | None:
    """Quality and slope of the curve [(variety, quality)] there; None outside it."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= variety <= x1:
            slope = (y1 - y0) / (x1 - x0)
            return y0 + slope * (variety - x0), slope
    return None


def place(found: list) -> tuple[float, float]:
    """Variety and quality, means over the seeds."""
    return mean(f["distinct_4"] for f in found), mean(f["pass"] for f in found)


def gain(found: list, curve: list, stories: int, spread: float) -> dict:
    """What a filter has over temperature alone, and the standard error of that."""
    variety, quality = place(found)
    if (there := at_variety(curve, variety)) is None:
        return {"gain": None, "error": None}
    due, slope = there
    counted = (quality * (1 - quality) + due * (1 - due)) / (stories * len(found))
    sideways = 2 * (slope * spread) ** 2 / len(found)
    return {"gain": round(quality - due, 4), "error": round((counted + sideways) ** 0.5, 4)}


def compared(settings: list, found: list, stories: int) -> dict:
    """The curve of the temperatures, and a row for each setting."""
    spread = mean(variance(f["distinct_4"] for f in of_one) for of_one in found) ** 0.5
    curve = rising([place(f) for s, f in zip(settings, found) if "temperature" in s])
    rows = [{**s, **{key: [one[key] for one in f] for key in ("pass", "distinct_4")}}
            for s, f in zip(settings, found)]
    for row, f in zip(rows, found):
        if "temperature" not in row:
            row.update(gain(f, curve, stories, spread))
    return {"stories": stories, "seeds": len(found[0]), "spread": round(spread, 4),
            "rows": rows, "curve": curve}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 stories, nothing written")
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be 2 or more: their spread is part of the result")
    torch.set_num_threads(1)
    n = 16 if options.quick else options.stories
    model, tokenizer = load_demo()
    settings = [{"temperature": t} for t in TEMPERATURES]
    settings += [s for pair in FILTERS.values() for s in pair]
    found = [[] for _ in settings]
    for i, seed in tqdm([(i, s) for s in range(options.seeds) for i in range(len(settings))]):
        found[i].append(judge(model, tokenizer, n, 10_000 * seed, settings[i]))
    figures = compared(settings, found, n)
    for row in figures["rows"]:
        print({k: round(mean(v), 3) if isinstance(v, list) else v for k, v in row.items()})
    if not options.quick:
        print(record("filters", figures))


if __name__ == "__main__":
    main()
