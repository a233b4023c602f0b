"""Which filter writes the better stories? Each judged by the critic, at equal variety.

    python benchmarks/filters.py            # about four minutes on one core
    python benchmarks/filters.py --quick    # a few stories of each; writes nothing

The model that travels with the book writes stories with temperature alone, which gives a
curve of quality against variety, and with each filter at two strengths, at temperature 1.
Quality is the share of stories that end by themselves and in which the critic of the story
world finds no mistake; variety is the share of different four-word phrases (distinct-4).
`gain` is what a filter's quality lies above that of the temperature (on the straight line
between its neighbours) that gives the same variety, seed by seed; null outside the curve.
"""
import argparse
from statistics import mean

import torch
from results_file import record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.critic import check_story
from gptbook.generation import generate_text
from gptbook.sampler import Sampler

TEMPERATURES = (0.4, 0.6, 0.8, 1.0)
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
    return {"pass": sum(good) / n, "distinct_4": distinct(texts)}


def at_variety(curve: list, distinct_4: float) -> float | None:
    """Quality on the curve [(variety, quality)] at this variety; None outside it."""
    curve = sorted(curve)
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= distinct_4 <= x1:
            return y0 + (y1 - y0) * (distinct_4 - x0) / max(x1 - x0, 1e-9)
    return None


def summary(found: list, curves: list) -> dict:
    """Means over the seeds, and the gain over temperature alone."""
    due = [at_variety(c, f["distinct_4"]) for c, f in zip(curves, found)]
    gains = [round(f["pass"] - d, 4) for f, d in zip(found, due) if d is not None]
    return {"pass": [f["pass"] for f in found],
            "distinct_4": [round(f["distinct_4"], 4) for f in found],
            "gain": gains if len(gains) == len(found) else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 stories, nothing written")
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = 16 if options.quick else options.stories
    model, tokenizer = load_demo()
    settings = [{"temperature": t} for t in TEMPERATURES]
    settings += [s for pair in FILTERS.values() for s in pair]
    found = [[] for _ in settings]
    for i, seed in tqdm([(i, s) for s in range(options.seeds) for i in range(len(settings))]):
        found[i].append(judge(model, tokenizer, n, 10_000 * seed, settings[i]))
    alone = found[: len(TEMPERATURES)]
    curves = [[(f[s]["distinct_4"], f[s]["pass"]) for f in alone] for s in range(options.seeds)]
    rows = [{**s, **summary(f, curves)} for s, f in zip(settings, found)]
    for row in rows:
        print({k: round(mean(v), 3) if isinstance(v, list) else v for k, v in row.items()})
    figures = {"stories": n, "seeds": options.seeds, "rows": rows}
    if not options.quick:
        print(record("filters", figures))


if __name__ == "__main__":
    main()
