"""What each head of the stories model is worth, on pronouns, on names said again, on all other tokens.

    python benchmarks/head_ablation.py                  # about three minutes on one core

Takes one head at a time away, in three ways (zeros, its mean over other stories, what it wrote in
another story), on the odd stories of the collection that `attention_patterns.py` chose its heads on
the even ones of. The increase of the loss in nats a token; for the head that finds referents with
a 95 % bootstrap over stories; five random heads beside it. Last, all heads that find referents more
often than always choosing the first name would are taken away together, beside random groups.
"""
import argparse
import random

import numpy as np
import torch
from results_file import load, record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.effects import WAYS, losses_at, mean_of_heads, without_heads
from gptbook.head_patterns import relations
from gptbook.stories import story

UNSEEN, FIRST, BATCH = 977, 5000, 16
KINDS = {"pronouns": "pronoun, referent", "names again": "name, same name"}


def read(tokenizer, numbers, limit) -> tuple:
    """Ids (N, T), padded at the end, and which tokens are of which kind, (N, T - 1) each."""
    rows, marks = [], []
    for i in numbers:
        ids, asked = relations(story(UNSEEN, FIRST + i), tokenizer)
        if len(ids) <= limit:
            rows.append(ids)
            marks.append({kind: {r.query for r in asked[name]} for kind, name in KINDS.items()})
    T = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.end_of_text] * (T - len(row)) for row in rows])
    kinds = {kind: torch.zeros(len(rows), T - 1, dtype=torch.bool) for kind in KINDS}
    others = torch.zeros(len(rows), T - 1, dtype=torch.bool)
    for b, (row, mark) in enumerate(zip(rows, marks)):
        others[b, : len(row) - 1] = True
        for kind, places in mark.items():
            kinds[kind][b, [t - 1 for t in places]] = True  # the loss of token t stands at t - 1
    for kind in kinds.values():
        others &= ~kind
    return ids, {**kinds, "all others": others}


def losses(model, ids) -> torch.Tensor:
    return torch.cat([losses_at(model, part) for part in ids.split(BATCH)])


def bootstrap(increase, mask, draws=2000) -> list:
    """95 % of the mean over the masked tokens when stories are drawn anew."""
    sums = ((increase * mask).sum(1).double().numpy(), mask.sum(1).double().numpy())
    at = np.random.default_rng(0).integers(len(mask), size=(draws, len(mask)))
    means = sums[0][at].sum(1) / sums[1][at].sum(1)
    return [round(float(x), 4) for x in np.quantile(means, (0.025, 0.975))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stories", type=int, default=160, help="odd ones")
    parser.add_argument("--quick", action="store_true", help="16 stories, not stored")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load_demo()
    n = 16 if options.quick else options.stories
    limit = model.config.context_length
    ids, masks = read(tokenizer, range(1, 2 * n, 2), limit)
    means = mean_of_heads(model, read(tokenizer, range(0, 2 * min(n, 64), 2), limit)[0].split(BATCH))
    finder = load("attention_patterns")["figures"]["relations"]["pronoun, referent"]["one token before"]["head"]
    heads = [(layer, head) for layer in range(model.config.n_layers) for head in range(model.config.n_heads)]
    plain, increase, interval = losses(model, ids), {}, None
    with tqdm(total=len(WAYS) * len(heads), unit="head") as bar:
        for way in WAYS:
            increase[way] = {kind: {} for kind in masks}
            for layer, head in heads:
                with without_heads(model, [(layer, head)], way, means):
                    more = losses(model, ids) - plain
                name = f"{layer}.{head}"
                for kind, mask in masks.items():
                    increase[way][kind][name] = round(more[mask].mean().item(), 4)
                if (way, name) == ("mean", finder):
                    interval = bootstrap(more, masks["pronouns"])
                bar.update()
    names = [f"{layer}.{head}" for layer, head in heads]
    asked = load("attention_patterns")["figures"]["relations"]["pronoun, referent"]["one token before"]
    good = [h for h, share in zip(heads, asked["all heads"]) if share > asked["fixed"]]
    source, together = random.Random(1), {}
    late = [h for h in heads if h not in good and h[0] == model.config.n_layers - 1]
    groups = [good, *(source.sample(late, len(good)) for _ in range(1)),
              *(source.sample([h for h in heads if h not in good], len(good)) for _ in range(5))]
    for group in groups:
        with without_heads(model, group, "mean", means):
            more = losses(model, ids) - plain
        together[" + ".join(f"{a}.{b}" for a, b in group)] = {
            kind: round(more[mask].mean().item(), 4) for kind, mask in masks.items()}
    five = random.Random(0).sample([h for h in names if h != finder], 5)
    figures = {
        "stories": len(ids), "tokens": {kind: int(mask.sum()) for kind, mask in masks.items()},
        "plain": {kind: round(plain[mask].mean().item(), 4) for kind, mask in masks.items()},
        "increase": increase, "finder": finder, "interval": interval, "random heads": five,
        "together": together, "finders": [f"{a}.{b}" for a, b in good]}
    for way in WAYS:
        print(way, increase[way]["pronouns"])
    print({k: v for k, v in figures.items() if k != "increase"})
    if not options.quick:
        print(record("head_ablation", figures))


if __name__ == "__main__":
    main()
