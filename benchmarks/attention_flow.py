"""Which method finds the tokens that matter? Rank correlation with what happens when tokens are replaced.

    python benchmarks/attention_flow.py                 # about three minutes on one core

Beginnings of stories, each up to the token before a pronoun (at most 40 tokens). Every method orders
the tokens by how much they mattered for the likeliest next word; occlusion (8 random replacements of
each token) is the truth. Means over the texts, with 95 % intervals: the correlation itself; how much
it is above that of nearness, text by text; what is left of it among tokens that are equally near (the
partial correlation, given nearness); and, as a check of that, how much it is above the correlation with
what happened in other texts, token by token from the end.
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


def given(r_xy, r_xz, r_yz) -> float:
    """The partial correlation of x and y, given z."""
    return (r_xy - r_xz * r_yz) / ((1 - r_xz**2) * (1 - r_yz**2)) ** 0.5


def above_others(orders, truths) -> list:
    """By how much each order fits its own text better than four others, from the end."""
    found = []
    for i, (order, truth) in enumerate(zip(orders, truths)):
        gaps = []
        for shift in range(1, 5):
            other = truths[(i + shift) % len(truths)]
            T = min(len(truth), len(other))
            gaps.append(correlation(order[-T:], truth[-T:]) - correlation(order[-T:], other[-T:]))
        found.append(fmean(gaps))
    return found


def mean(x) -> dict:
    return {"mean": round(fmean(x), 4), "half_interval": round(1.96 * stdev(x) / len(x) ** 0.5, 4)}


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
    n, found, nearness, orders = 5 if options.quick else options.texts, {}, {}, {}
    for i, ids in enumerate(tqdm(texts(tokenizer, n), unit="text")):
        truth = occlusion(model, ids).abs()
        again = occlusion(model, ids, seed=1).abs()
        for name, order in {**answers(model, ids, i), "truth": truth, "replaced again": again}.items():
            orders.setdefault(name, []).append(order)
            found.setdefault(name, []).append(correlation(order, truth))
            nearness.setdefault(name, []).append(correlation(order, torch.arange(len(ids))))
    truths, near = orders.pop("truth"), found["the nearer"]
    rivals = [name for name in orders if name not in ("the nearer", "replaced again")]
    figures = {
        "texts": n, "agreement": {name: mean(found[name]) for name in [*rivals, "the nearer"]},
        "above nearness": {name: mean([x - y for x, y in zip(found[name], near)]) for name in rivals},
        "among the equally near": {name: mean([
            given(*r) for r in zip(found[name], nearness[name], near)])
            for name in [*rivals, "replaced again"]},
        "above other texts": {name: mean(above_others(orders[name], truths)) for name in orders},
        "with nearness": {name: mean(nearness[name]) for name in rivals},
        "occlusion with itself": mean(found["replaced again"])}
    print(figures)
    if not options.quick:
        print(record("attention_flow", figures))


if __name__ == "__main__":
    main()
