"""Do heads of the stories model find what the story world knows? Chosen on one half, tested on the other.

    python benchmarks/attention_patterns.py             # about two minutes on one core

For each relation and each place to ask (at the token, one before): the head that does best on the
even stories, its share of right choices on the odd ones with a 95 % bootstrap over stories, beside
an even guess, the nearest place, the nearest name (a place with a capital letter), the best fixed
place (the second, the last but one, ...; chosen like the head), the best fixed one of the places
without a capital letter, and the same questions with answers dealt out anew; all of it once more
for the questions where the nearest name is wrong, of the same head and of the one that does best
on such questions of the even stories. And the induction scores of random rows told twice.
"""
import argparse
import random
from statistics import fmean

import numpy as np
import torch
from results_file import record
from tqdm import trange

from gptbook.attention import capture_attention
from gptbook.checkpoints import load_demo
from gptbook.head_patterns import RELATIONS, answers, induction_scores, relations
from gptbook.stories import story

THINGS = 5                          # where a question has the places without a capital letter
UNSEEN, FIRST = 977, 5000           # stories that no run trains on
WHEN = {"at the token": 0, "one token before": 1}


def dealt(relation, source):
    """The same question with its answers in another order."""
    right = list(relation.right)
    source.shuffle(right)
    return relation._replace(right=right)


def names_and_things(relation, ids, tokenizer) -> tuple:
    """Is the nearest name right, or the nearest of all if none has a capital letter; the others."""
    words = [tokenizer.decode([ids[tokens[0]]]).strip() for tokens in relation.places]
    by_capital = {True: [], False: []}
    for word, right in zip(words, relation.right):
        by_capital[word[:1].isupper()].append(right)
    return (by_capital[True] or relation.right)[-1], by_capital[False]


def collect(model, tokenizer, n) -> dict:
    """(relation, when) -> (story, (heads,) right, when dealt, chance, name, things, right)."""
    found = {(name, when): [] for name in RELATIONS for when in WHEN}
    source = random.Random(0)
    for i in trange(n, unit="story"):
        ids, asked = relations(story(UNSEEN, FIRST + i), tokenizer)
        if len(ids) > model.config.context_length:
            continue
        with capture_attention(model) as captured:
            model(torch.tensor([ids]))
        weights = torch.stack([w[0] for w in captured.weights.values()])
        for name, questions in asked.items():
            for r in questions:
                other, rules = dealt(r, source), names_and_things(r, ids, tokenizer)
                for when, earlier in WHEN.items():
                    found[name, when].append((
                        i, answers(weights, r, earlier).flatten().numpy(),
                        answers(weights, other, earlier).flatten().numpy(),
                        fmean(r.right), *rules, r.right))
    return found


def bootstrap(by_story, draws=2000) -> list:
    """95 % of the means when the stories are drawn anew; by_story: (hits, questions) each."""
    pairs = np.array(list(by_story.values()), dtype=float)
    at = np.random.default_rng(0).integers(len(pairs), size=(draws, len(pairs)))
    means = pairs[at].sum(1)
    return [round(float(x), 4) for x in np.quantile(means[:, 0] / means[:, 1], (0.025, 0.975))]


def at_rank(questions, rank, of=-1) -> float:
    """How often the place of a fixed rank is right: 0 the first, -1 the nearest; of all, or things."""
    return fmean(right[rank] if -len(right) <= rank < len(right) else any(right[-1:])
                 for right in (q[of] for q in questions))


def judge(questions, n_heads, best=None) -> dict:
    """The best head of the even stories, or a given one, on the odd ones."""
    even = [q for q in questions if q[0] % 2 == 0]
    odd = [q for q in questions if q[0] % 2]
    if best is None:
        best = int(np.mean([q[1] for q in even], 0).argmax())
    rank = max(range(-6, 6), key=lambda k: at_rank(even, k))
    thing = max(range(-6, 6), key=lambda k: at_rank(even, k, THINGS))
    by_story = {}
    for i, right, *_ in odd:
        hits, asked = by_story.get(i, (0, 0))
        by_story[i] = hits + int(right[best]), asked + 1
    return {
        "head": f"{best // n_heads}.{best % n_heads}", "questions": len(odd),
        "precision": round(fmean(float(q[1][best]) for q in odd), 4),
        "interval": bootstrap(by_story),
        "shuffled": round(fmean(float(q[2][best]) for q in odd), 4),
        "chance": round(fmean(q[3] for q in odd), 4),
        "nearest": round(at_rank(odd, -1), 4),
        "nearest name": round(fmean(q[4] for q in odd), 4), "fixed": round(at_rank(odd, rank), 4),
        "fixed rank": rank, "thing": round(at_rank(odd, thing, THINGS), 4), "thing rank": thing,
        "on the half that chose it": round(fmean(float(q[1][best]) for q in even), 4),
        "all heads": np.mean([q[1] for q in odd], 0).round(3).tolist(),
    }


def judge_twice(questions, n_heads) -> dict:
    """All questions; and where the nearest name is wrong, the same head, and one chosen there."""
    found = judge(questions, n_heads)
    layer, head = map(int, found["head"].split("."))
    hard = [q for q in questions if not q[4]]
    return {**found, "where the nearest name is wrong":
            judge(hard, n_heads, layer * n_heads + head), "chosen there": judge(hard, n_heads)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="40 stories, not stored")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load_demo()
    found = collect(model, tokenizer, 40 if options.quick else options.stories)
    by_name = {name: {when: judge_twice(found[name, when], model.config.n_heads) for when in WHEN}
               for name in RELATIONS}
    scores = induction_scores(model, 40, rows=32)
    figures = {"stories": options.stories, "relations": by_name,
               "induction": {"best": round(scores.max().item(), 4), "heads": scores.numpy().round(4).tolist()}}
    for name, by in by_name.items():
        for when, one in by.items():
            print(name, when, {k: v for k, v in one.items() if k != "all heads"})
    print("induction", figures["induction"]["best"])
    if not options.quick:
        print(record("attention_patterns", figures))


if __name__ == "__main__":
    main()
