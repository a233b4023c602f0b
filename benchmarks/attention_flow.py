"""Which method finds the tokens that matter? Rank correlation with what happens when tokens are replaced.

    python benchmarks/attention_flow.py                 # about three minutes on one core

Beginnings of stories, each up to the token before a pronoun (at most 40 tokens). Every method orders
the tokens by how much they mattered for the likeliest next word; occlusion (8 random replacements of
each token) is the truth. Means over the texts, with 95 % intervals.
"""
import argparse
from statistics import fmean, stdev

import torch
from results_file import record
from tqdm import tqdm

from gptbook.attention import capture_attention
from gptbook.checkpoints import load_demo
from gptbook.flow import attention_flow, gradient_times_input, occlusion, rollout
from gptbook.head_patterns import relations
from gptbook.stories import story

UNSEEN, LONGEST = 977, 40


def ranks(x) -> torch.Tensor:
    order = torch.as_tensor(x, dtype=torch.double).argsort(stable=True)
    found = torch.empty(len(x), dtype=torch.double)
    found[order] = torch.arange(len(x), dtype=torch.double)
    return found


def correlation(a, b) -> float:
    """Spearman's: ties do not occur among these numbers."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def texts(tokenizer, n: int):
    """One beginning a story, up to the token before its last pronoun that fits."""
    found, number = [], 0
    while len(found) < n:
        ids, asked = relations(story(UNSEEN, 6000 + number), tokenizer)
        ends = [r.query for r in asked["pronoun, referent"] if 12 <= r.query <= LONGEST]
        if ends:
            found.append(ids[: ends[-1]])
        number += 1
    return found


def answers(model, ids, seed) -> dict:
    with torch.no_grad(), capture_attention(model) as captured:
        model(torch.tensor([ids]))
    weights = torch.stack([w[0] for w in captured.weights.values()])
    T = len(ids)
    return {
        "gradient × input": gradient_times_input(model, ids).abs(),
        "rollout": rollout(weights)[-1], "flow": attention_flow(weights, T - 1),
        "last layer": weights[-1].mean(0)[-1], "mean of all layers": weights.mean((0, 1))[-1],
        "the nearer": torch.arange(T).float(),
        "random": torch.rand(T, generator=torch.Generator().manual_seed(seed)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="5 texts, not stored")
    options = parser.parse_args()
    model, tokenizer = load_demo()
    n, found = 5 if options.quick else options.texts, {}
    for i, ids in enumerate(tqdm(texts(tokenizer, n), unit="text")):
        truth = occlusion(model, ids).abs()
        again = occlusion(model, ids, seed=1).abs()
        for name, order in {**answers(model, ids, i), "replaced again": again}.items():
            found.setdefault(name, []).append(correlation(order, truth))
    agreement = {name: {"mean": round(fmean(x), 4), "half_interval": round(
        1.96 * stdev(x) / len(x) ** 0.5, 4)} for name, x in found.items()}
    ceiling = agreement.pop("replaced again")
    figures = {"texts": n, "agreement": agreement, "occlusion with itself": ceiling}
    print(figures)
    if not options.quick:
        print(record("attention_flow", figures))


if __name__ == "__main__":
    main()
