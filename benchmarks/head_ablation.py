"""What each head of the stories model is worth, on pronouns, on names said again, on all other tokens.

    python benchmarks/head_ablation.py                  # about three minutes on one core

Takes one head at a time away, in three ways (zeros, its mean over other stories, what it wrote in
another story), on stories that `attention_patterns.py` has not seen. The increase of the loss in
nats a token. The finders are the heads that find referents more often than always choosing the first
name would; they are taken away one at a time and together, with a 95 % bootstrap over stories. Beside
them stand five heads and five groups drawn from the others. None is of the first layer, which every
token needs: beside those no head would look important.

The means are of whole stories, without padding. Stories stand in order of their length, the longest
first, so that the row before is as long or longer, and nothing is borrowed from padding (but for the
first row of a batch).
"""
import argparse
import random
from itertools import combinations

import numpy as np
import torch
from results_file import load, record
from tqdm import tqdm

from gptbook.checkpoints import load_demo
from gptbook.effects import WAYS, losses_at, mean_of_heads, without_heads
from gptbook.head_patterns import relations
from gptbook.stories import story

UNSEEN, FIRST, BATCH = 977, 7000, 16
KINDS = {"pronouns": "pronoun, referent", "names again": "name, same name"}


def read(tokenizer, numbers, limit) -> list:
    """(ids, kind -> places) of each story that fits, the longest first."""
    found = []
    for i in numbers:
        ids, asked = relations(story(UNSEEN, FIRST + i), tokenizer)
        if len(ids) <= limit:
            found.append((ids, {kind: {r.query for r in asked[name]} for kind, name in KINDS.items()}))
    return sorted(found, key=lambda one: -len(one[0]))


def table(tokenizer, stories) -> tuple:
    """Ids (N, T), padded at the end, their lengths, and which are of which kind, (N, T - 1) each."""
    rows, marks = zip(*stories)
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
    return ids, [len(row) for row in rows], {**kinds, "all others": others}


def losses(model, ids, lengths) -> torch.Tensor:
    """(N, T - 1); a batch is read as far as its longest row, which is the first."""
    found = torch.zeros(len(ids), ids.shape[1] - 1)
    for at in range(0, len(ids), BATCH):
        found[at : at + BATCH, : lengths[at] - 1] = losses_at(model, ids[at : at + BATCH, : lengths[at]])
    return found


def bootstrap(increase, mask, draws=2000) -> list:
    """95 % of the mean over the masked tokens when stories are drawn anew."""
    sums = ((increase * mask).sum(1).double().numpy(), mask.sum(1).double().numpy())
    at = np.random.default_rng(0).integers(len(mask), size=(draws, len(mask)))
    means = sums[0][at].sum(1) / sums[1][at].sum(1)
    return [round(float(x), 4) for x in np.quantile(means, (0.025, 0.975))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stories", type=int, default=160)
    parser.add_argument("--quick", action="store_true", help="16 stories, not stored")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load_demo()
    n = 16 if options.quick else options.stories
    limit = model.config.context_length
    ids, lengths, masks = table(tokenizer, read(tokenizer, range(n), limit))
    means = mean_of_heads(model, [torch.tensor([row]) for row, _ in read(tokenizer, range(1000, 1064), limit)])
    asked = load("attention_patterns")["figures"]["relations"]["pronoun, referent"]["one token before"]
    heads = [(layer, head) for layer in range(model.config.n_layers) for head in range(model.config.n_heads)]
    plain, increase = losses(model, ids, lengths), {}
    name = lambda group: " + ".join(f"{a}.{b}" for a, b in group)

    def more(group, way="mean"):
        with without_heads(model, group, way, means):
            return losses(model, ids, lengths) - plain

    def by_kind(x):
        return {kind: round(x[mask].mean().item(), 4) for kind, mask in masks.items()}

    with tqdm(total=len(WAYS) * len(heads), unit="head") as bar:
        for way in WAYS:
            increase[way] = {kind: {} for kind in masks}
            for head in heads:
                for kind, x in by_kind(more([head], way)).items():
                    increase[way][kind][name([head])] = x
                bar.update()
    finders = [h for h, share in zip(heads, asked["all heads"]) if share > asked["fixed"]]
    rest, source = [h for h in heads if h not in finders and h[0] > 0], random.Random(0)
    five = source.sample(rest, 5)
    last = [h for h in rest if h[0] == model.config.n_layers - 1]
    groups = [finders, *combinations(last, len(finders))]
    others = [g for g in combinations(rest, len(finders)) if g not in groups]
    groups += source.sample(others, 5)
    together = {name(group): by_kind(more(group)) for group in groups}
    interval = {name(group): bootstrap(more(group), masks["pronouns"])
                for group in ([h] for h in finders)}
    interval[name(finders)] = bootstrap(more(finders), masks["pronouns"])
    figures = {
        "stories": len(ids), "tokens": {kind: int(mask.sum()) for kind, mask in masks.items()},
        "plain": by_kind(plain), "increase": increase, "finder": asked["head"], "interval": interval,
        "random heads": [name([h]) for h in five], "together": together,
        "finders": [name([h]) for h in finders]}
    for way in WAYS:
        print(way, increase[way]["pronouns"])
    print({k: v for k, v in figures.items() if k != "increase"})
    if not options.quick:
        print(record("head_ablation", figures))


if __name__ == "__main__":
    main()
