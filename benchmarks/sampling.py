"""Drawing a token at GPT-2's vocabulary: gptbook's `sample` beside transformers' warpers.

    python benchmarks/sampling.py            # two minutes on one thread
    python benchmarks/sampling.py --quick    # a few seconds; writes nothing

Theirs is `TemperatureLogitsWarper`, `TopKLogitsWarper` and `TopPLogitsWarper` as asked, then
softmax and `torch.multinomial`. Four kinds of logits: two that fall off with the rank as those
of trained models do, one normal and wide, one flat, whose nucleus is half the vocabulary.

The two take turns, in blocks of ten draws: A B A B. A ratio is the median over the turns of
(theirs / ours) in one turn. `one_by_one` is the same with blocks of a single draw, where each
runs with the caches as the other has left them.
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from results_file import record
from tqdm import tqdm
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gptbook.sampling import candidates, sample

VOCAB, HEAT = 50257, 0.8
CUTS = {"top-k 50": (50, None), "top-p 0.9": (None, 0.9), "both": (50, 0.9), "no cut": (None, None)}


def kinds(batch: int) -> dict:
    """Logits (batch, VOCAB) by name."""
    g = torch.Generator().manual_seed(batch)
    noise = torch.randn(batch, VOCAB, generator=g)
    rank = torch.stack([torch.randperm(VOCAB, generator=g) for _ in range(batch)]) + 1.0
    return {"sure": -2 * rank.log() + noise, "trained": -1.3 * rank.log() + noise / 2,
            "normal": 4 * noise, "flat": noise}


def their_draw(logits, top_k, top_p):
    scores = TemperatureLogitsWarper(HEAT)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p else scores
    return torch.multinomial(scores.softmax(-1), 1)


def seconds(call, times: int) -> float:
    """Of one call, over a block of so many."""
    start = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - start) / times


def race(logits, top_k, top_p, turns: int, block: int) -> dict:
    """Milliseconds of both and the ratio, by turns; the first turn warms up."""
    ours, theirs = [], []
    for _ in range(turns + 1):
        ours.append(seconds(lambda: sample(logits, HEAT, top_k, top_p), block))
        theirs.append(seconds(lambda: their_draw(logits, top_k, top_p), block))
    pairs = list(zip(ours, theirs))[1:]
    return {"gptbook_ms": round(1e3 * median(a for a, _ in pairs), 4),
            "transformers_ms": round(1e3 * median(b for _, b in pairs), 4),
            "ratio": round(median(b / a for a, b in pairs), 2)}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns, nothing written")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    turns = 3 if options.quick else options.turns
    cells = [(b, kind, x, cut) for b in (1, 8) for kind, x in kinds(b).items() for cut in CUTS]
    rows = []
    for batch, kind, logits, cut in tqdm(cells):
        k, p = CUTS[cut]
        ids, _ = candidates(logits, HEAT, k, p)
        rows.append({"batch": batch, "logits": kind, "cut": cut,
                     "kept": int((ids >= 0).sum(1).median()),
                     **race(logits, k, p, turns, 10 if batch == 1 else 4),
                     "one_by_one": race(logits, k, p, 3 * turns, 1)["ratio"]})
        tqdm.write(str(rows[-1]))
    figures = {"vocabulary": VOCAB, "temperature": HEAT, "turns": turns, "rows": rows}
    if not options.quick:
        print(record("sampling", figures))


if __name__ == "__main__":
    main()
