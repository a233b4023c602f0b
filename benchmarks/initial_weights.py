"""What the first weights are worth: three beginnings, three seeds, the same short run.

    python benchmarks/initial_weights.py            # about ten minutes on one core

Trains the same small model on the stories from GPT-2's 0.02, from weights of the width's own
size, and from those with `init_copying`. Two figures for each: bits a word above the exact
entropy of held-out stories, and bits for naming again a thing that the story has named, which
costs a reader who remembers nothing.
"""
import argparse
import math
from statistics import mean

import torch
import torch.nn.functional as F
from results_file import record
from tqdm import tqdm

from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.initial_weights import init_copying
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories, story
from gptbook.tokenizer import train_bpe
from gptbook.runs import TrainConfig, use_kernel
from gptbook.training import train

UNSEEN = 977                       # a seed that no run trains on
THINGS = {"T", "U", "Z", "P"}  # things, animals and places


def wide(model):
    init_weights(model, model.config.emb_dim ** -0.5)


def copying(model):
    wide(model)
    init_copying(model)


BEGINNINGS = {"0.02": init_weights, "wide": wide, "copying": copying}


def repeats(told) -> list:
    """Spans where the story names a thing that it has named before."""
    named, spans = set(), []
    for start, end, slot, form in told.mentions:
        if slot in THINGS and form in ("", "a"):
            if slot in named:
                spans.append((start, end))
            named.add(slot)
    return spans


@torch.no_grad()
def judge(model, tokenizer, told: list) -> tuple:
    """(bits a word above the best, bits for each thing named again)."""
    end, above, again, words = tokenizer.end_of_text, 0.0, [], 0
    for one in told:
        inside = tokenizer.encode(one.text)
        ids = torch.tensor([[end, *inside, end]])
        logits = model(ids[:, :-1])[0].float()
        bits = (F.cross_entropy(logits, ids[0, 1:], reduction="none") / math.log(2)).tolist()
        above, words = above + sum(bits) - one.bits, words + len(one.text.split())
        stops, at = [], 0
        for i in inside:
            at += len(tokenizer.token_bytes(i))  # the stories are ASCII
            stops.append(at)
        again += [sum(b for b, stop in zip(bits, stops) if a < stop <= z)
                  for a, z in repeats(one)]
    return above / words, mean(again)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = stories(8_000, validation=100)
    tokenizer = train_bpe(corpus.text("train", 1_000_000), 2048)
    data = TokenDataset(tokenize(corpus, tokenizer, "train"), 192, 4,
                        document_end=tokenizer.end_of_text)
    told = [story(UNSEEN, i) for i in tqdm(range(100), "held-out stories")]
    sum(one.bits for one in tqdm(told, "exact bits"))
    above, again, curves = {}, {}, {}
    for name, begin in BEGINNINGS.items():
        for seed in range(args.seeds):
            set_seed(seed)
            sizes = GPTConfig(tokenizer.n_vocab, 192, args.width, args.layers, 4)
            begin(model := GPTModel(sizes))
            use_kernel(model, "naive_attention")

            def look(run, curve=curves.setdefault(name, {})):
                if run.step % args.every == 0:
                    bits = judge(run.model.eval(), tokenizer, told)[1]
                    curve.setdefault(run.step, []).append(round(bits, 4))
                    run.model.train()

            train(model, data, None, TrainConfig(args.steps, 4e-3, betas=(0.9, 0.98), seed=seed),
                  schedule=warmup_cosine(args.steps, args.steps // 30, 0.02), callbacks=[look])
            for kept, figure in zip((above, again), judge(model, tokenizer, told)):
                kept.setdefault(name, []).append(round(figure, 4))
            print(name, seed, above[name][-1], again[name][-1], flush=True)
    print(record("initial_weights", {
        "above_the_best_bits_per_word": above, "named_again_bits": again,
        "named_again_while_training": curves, "steps": args.steps, "width": args.width,
        "layers": args.layers, "things_named_again": sum(len(repeats(one)) for one in told)}))


if __name__ == "__main__":
    main()
