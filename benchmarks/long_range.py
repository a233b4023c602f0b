"""Which attention patterns carry a fact across a text: six patterns, two places, three seeds.

    python benchmarks/long_range.py --jobs 16   # about a minute and a half on 16 fast cores
    python benchmarks/long_range.py --quick     # seconds, writes nothing

Each row says once where a thing is, goes on with sentences of other stories that name no place,
and asks at its end. Person, thing and place are those of the story world. The fact stands at the
start of the row, or in its middle. Two layers learn the answer alone (one word of all places), in
every pattern. Beside the accuracy stands what the pattern allows: whether a path of as many steps
as there are layers leads from the question to the place.
"""
import argparse
import multiprocessing
import random
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch
import torch.nn.functional as F
from results_file import record
from torch import nn
from tqdm import tqdm

from gptbook.architecture import RMSNorm, SwiGLU
from gptbook.core import Causal, GPTConfig, GPTModel, MultiHeadAttention, init_weights, set_seed
from gptbook.sparse import BigBird, Longformer, RandomBlocks, SlidingWindow, Strided, reach
from gptbook.stories import WORDS, story

LENGTH, LAYERS, HEADS, LOCAL, BLOCK, DRAWS, TOKENS = 128, 2, 4, 16, 8, 2, 8
UNSEEN = 977  # a seed of stories that no run trains on
PLACES = [place for place in WORDS["place"] if place.isalpha()]
MIDDLE = 37   # words before the fact that stands in the middle


def patterns(seed: int) -> dict:
    """{name: layer -> mask}; random blocks differ from layer to layer."""
    return {
        "full": lambda layer: Causal(),
        "local": lambda layer: SlidingWindow(LOCAL),
        "strided": lambda layer: Strided(LOCAL),
        "local + random": lambda layer: (
            SlidingWindow(LOCAL) | RandomBlocks(DRAWS, BLOCK, LAYERS * seed + layer)),
        "Longformer": lambda layer: Longformer(LOCAL, TOKENS),
        "BigBird": lambda layer: BigBird(LOCAL, TOKENS, DRAWS, BLOCK, LAYERS * seed + layer),
    }


def words_of(text: str) -> list:
    return re.findall(r"[\w']+|[^\w\s]", text.lower())


def sentences(seed: int, n: int) -> list:
    """Sentences of n stories, as words, without those that name a place."""
    found = []
    for i in range(n):
        for sentence in re.split(r"(?<=[.!?]) ", story(seed, i).text):
            words = words_of(sentence)
            if not {*words} & {*PLACES}:
                found.append(words)
    return found


def facts(seed: int, n: int) -> list:
    """(person, thing) of n stories, by their own notes."""
    worlds = (story(seed, i).notes[0] for i in range(n))
    return [(w["A"].lower(), w["T"].split()[-1]) for w in worlds if "A" in w and "T" in w]


def make_row(draw: random.Random, filler: list, known: list, start: int) -> tuple:
    """(words, place): the fact after `start` words, the question at the end."""
    person, thing = draw.choice(known)
    place = draw.choice(PLACES)
    fact = f"{thing} of {person} is at the {place} .".split()  # its place is the 7th word
    question = f"where is {person} 's {thing} ? at the".split()
    text = []
    while len(text) < LENGTH:
        text += draw.choice(filler)
    text = text[:LENGTH - len(fact) - len(question)]
    return text[:start] + fact + text[start:] + question, place


def make_rows(seed: int, n: int, shared: dict, start: int) -> tuple:
    """Ids (n, LENGTH) and the ids of the answers (n,)."""
    draw, ids = random.Random(seed), shared["ids"]
    made = [make_row(draw, shared["filler"], shared["known"], start) for _ in range(n)]
    rows = torch.tensor([[ids.get(word, 0) for word in words] for words, _ in made])
    return rows, torch.tensor([ids[place] for _, place in made])


def prepare(n_stories: int) -> dict:
    """Sentences, facts and a number for each word."""
    filler, known = sentences(0, n_stories), facts(0, n_stories)
    words = {*PLACES, *"where is of 's ? . at the".split()}
    words |= {word for line in (*filler, *known) for word in line}
    return dict(filler=filler, known=known, ids={w: i for i, w in enumerate(sorted(words), 1)})


def build(vocab_size: int, masks, width: int) -> GPTModel:
    def attention(config, layer):
        return MultiHeadAttention(config, layer, mask=masks(layer))

    config = GPTConfig(vocab_size, LENGTH, width, LAYERS, HEADS, bias=False)
    model = GPTModel(config, attention=attention, norm=RMSNorm, mlp=SwiGLU)
    init_weights(model, width**-0.5)
    return model


def answers(model, rows):
    """Logits of the word after the last one, (B, V)."""
    return model.head(model.features(rows)[:, -1])


def path(masks, start: int) -> bool:
    """Whether the last word can learn of the place through the layers."""
    return reach([masks(layer) for layer in range(LAYERS)], LENGTH)[-1, start + 6].item()


def one_run(name: str, where: str, seed: int, args) -> dict:
    """Train one model and ask it about rows it has not seen."""
    start = 0 if where == "start" else MIDDLE
    masks = patterns(seed)[name]
    set_seed(seed)
    model = build(len(SHARED["ids"]) + 1, masks, args.width)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), fused=True,
                                  weight_decay=0.01)
    curve, unseen = {}, make_rows(UNSEEN, 512, SHARED, start)
    for step in range(1, args.steps + 1):
        rows, answer = make_rows(10_000 * (seed + 1) + step, args.rows, SHARED, start)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 20, 1.05 - step / args.steps)
        F.cross_entropy(answers(model, rows), answer).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 10) == 0:
            with torch.no_grad():
                right = answers(model, unseen[0]).argmax(-1) == unseen[1]
            curve[step] = round(right.float().mean().item(), 4)
    return dict(pattern=name, fact=where, seed=seed, accuracy=curve[max(curve)], curve=curve,
                path=path(masks, start))


def start_worker(shared: dict) -> None:
    """A worker's first act."""
    global SHARED
    SHARED = shared
    torch.set_num_threads(1)


def gather(found: list, args) -> dict:
    runs = sorted(found, key=lambda one: (one["fact"], [*patterns(0)].index(one["pattern"]),
                                          one["seed"]))
    return {"steps": args.steps, "rows": args.rows, "width": args.width, "layers": LAYERS,
            "length": LENGTH, "local": LOCAL, "block": BLOCK, "draws": DRAWS, "tokens": TOKENS,
            "place_at": {"start": 6, "middle": MIDDLE + 6}, "chance": 1 / len(PLACES),
            "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stories", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", help="one pattern, to try it; writes nothing")
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.stories = 4, 1, 50
    shared, found = prepare(args.stories), []
    todo = [(name, where, seed) for seed in range(args.seeds) for name in patterns(0)
            for where in ("start", "middle") if args.only in (None, name)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, start_worker, (shared,)) as pool:
        futures = [pool.submit(one_run, *run, args) for run in todo]
        for future in tqdm(as_completed(futures), "runs", len(futures)):
            found.append(one := future.result())
            tqdm.write(f"{one['pattern']}, {one['fact']}, seed {one['seed']}: "
                       f"{one['accuracy']:.0%}, path {one['path']}")
            if not args.quick and not args.only:
                record("long_range", gather(found, args))
    if args.only:
        print([one["curve"] for one in found])


if __name__ == "__main__":
    main()
