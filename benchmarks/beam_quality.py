"""Does a more probable text make a better story? Sampling, greedy and beams, judged.

    python benchmarks/beam_quality.py            # about three minutes on one core
    python benchmarks/beam_quality.py --quick    # few stories, nothing written

The stories model goes on from the first two sentences of held-out stories, by sampling,
greedily and with beams, with and without a ban on repeated n-grams. For each way: bits of the
new text under the model, bits under the grammar that tells true stories (a text that it cannot
tell has none), the share of stories without a fault, and how much of what is told is told once.
Then the model goes on past the end of a story, where its training never went, and what it
writes is searched for repetition.
"""
import argparse
import math
from collections import Counter
from statistics import fmean, stdev

import torch
from results_file import record
from tqdm import tqdm

from gptbook.beam import beam_search
from gptbook.checkpoints import load_demo
from gptbook.core import pick_device
from gptbook.critic import check_story, sentences
from gptbook.generation import generate_text
from gptbook.stories import story, story_bits

UNSEEN = 977  # a seed that no run trains on
WAYS = {  # name: (width or None, settings)
    "sampling at 1": (None, {"temperature": 1.0}),
    "sampling at 0.7": (None, {"temperature": 0.7}),
    "greedy": (1, {}), "2 beams": (2, {}), "5 beams": (5, {}), "10 beams": (10, {}),
    "5 beams, mean": (5, {"length_penalty": 1.0}),
    "5 beams, no 4-gram twice": (5, {"no_repeat_ngram": 4}),
    "5 beams, no 3-gram twice": (5, {"no_repeat_ngram": 3}),
    "5 beams, no 2-gram twice": (5, {"no_repeat_ngram": 2}),
}


def write(model, prompts, way, end, longest, seed) -> list:
    """The new ids of each prompt; its text with an end-of-text."""
    width, settings = WAYS[way]
    room = longest - max(map(len, prompts))
    if width is None:
        texts = generate_text(model, prompts, room, **settings, end_of_text=end, seed=seed)
        return [text[len(prompt):] for text, prompt in zip(texts, prompts)]
    found = beam_search(model, prompts, width, room, **{"length_penalty": 0.0, **settings},
                        end_of_text=end, early_stopping="never", n_best=1)
    return [best.new_ids for best, in found]


def once(texts: list[str], n: int = 4) -> float:
    """The share of all n-grams of words that only one text holds."""
    grams = [{tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
             for words in map(str.split, texts)]
    count = Counter(gram for own in grams for gram in own)
    return sum(c == 1 for c in count.values()) / len(count)


def world_bits(whole: str, start: str) -> float:
    return story_bits(whole) - story_bits(start, prefix=True)


@torch.no_grad()
def bits_so_far(model, prompt, new) -> list[float]:
    """Under the model, after each new token."""
    ids = torch.tensor([prompt + new], device=next(model.parameters()).device)
    log_probs = model(ids)[0].log_softmax(-1)[len(prompt) - 1 : -1]
    told = log_probs.gather(1, ids[0, len(prompt):, None])[:, 0].double()
    return (-told.cumsum(0) / math.log(2)).tolist()


def judge(model, written, prompts, starts, tokenizer) -> dict:
    ids = [new[:-1] if new[-1] == tokenizer.end_of_text else new for new in written]
    texts = [tokenizer.decode(new) for new in ids]
    wholes = [start + text for start, text in zip(starts, texts)]
    curves = [bits_so_far(model, prompt, new) for prompt, new in zip(prompts, written)]
    bits = [curve[-1] for curve in curves]
    world = [world_bits(whole, start) for whole, start in zip(wholes, starts)]
    possible = [b for b in world if math.isfinite(b)]
    return {
        "bits": round(fmean(bits), 2), "bits_spread": round(stdev(bits), 2),
        "words": round(fmean(len(text.split()) for text in texts), 1),
        "world_bits": round(fmean(possible), 2) if possible else None,
        "faultless": round(fmean(not check_story(whole) for whole in wholes), 3),
        "told_once": round(once(texts), 3), "bits_of_each": [round(b, 2) for b in bits],
        "bits_after_tokens": [  # 0, 5, 10, …; a text that has ended stays where it is
            round(fmean([0.0, *curve][min(t, len(curve))] for curve in curves), 2)
            for t in range(0, max(map(len, curves)) + 5, 5)],
    }


def true_ones(starts, wholes, tokenizer) -> list:
    """What the held-out stories themselves say."""
    return [[*tokenizer.encode(whole[len(start):]), tokenizer.end_of_text]
            for start, whole in zip(starts, wholes)]


def loops(model, tokenizer, length: int = 180) -> dict:
    """The share of 4-grams of tokens that stood in the same text before."""
    def again(ids):
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        return 1 - len(set(grams)) / len(grams)

    prompts = [[tokenizer.end_of_text, *tokenizer.encode(name)]
               for name in ("Lily", "Once upon a time", "Jack", "Noah", "One day")]
    ways = {f"{w} beams": {"beam_width": w} for w in (2, 5, 10)}
    ways["5 beams, no 4-gram twice"] = {"beam_width": 5, "no_repeat_ngram": 4}
    shares, said = {}, {}
    for name, t in (("sampling at 1", 1.0), ("sampling at 0.7", 0.7), ("greedy", 0)):
        texts = generate_text(model, prompts, length, temperature=t, seed=0)
        shares[name], said[name] = fmean(map(again, texts)), texts[0]
    for name, options in ways.items():
        found = beam_search(model, prompts, max_length=length, **options, n_best=1)
        shares[name] = fmean(again(best.ids) for best, in found)
        said[name] = found[0][0].ids
    return {"repeated_4_grams": {name: round(x, 3) for name, x in shares.items()},
            "ends": {name: tokenizer.decode(ids[-40:]) for name, ids in said.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stories", type=int, default=60)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="few stories; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_demo()
    model.to(pick_device())
    n, longest = 6 if args.quick else args.stories, model.config.context_length
    wholes, starts = [], []
    for i in range(10 * n):
        whole = story(UNSEEN, i).text
        if len(tokenizer.encode(whole)) < longest - 8 and len(wholes) < n:
            wholes.append(whole)
            starts.append(whole[: sentences(whole)[1][1]].rstrip())
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(start)] for start in starts]
    figures = {"stories": n, "sentences_given": 2, "ways": {}}
    told = true_ones(starts, wholes, tokenizer)
    figures["true"] = judge(model, told, prompts, starts, tokenizer)
    for way in tqdm(WAYS, "ways"):
        written = []
        for i in range(0, n, args.batch):
            written += write(model, prompts[i : i + args.batch], way, tokenizer.end_of_text,
                             longest, i)
        figures["ways"][way] = judge(model, written, prompts, starts, tokenizer)
    figures["past_the_end"] = loops(model, tokenizer, 60 if args.quick else 180)
    for name, row in {"true": figures["true"], **figures["ways"]}.items():
        print(name, {key: x for key, x in row.items() if not isinstance(x, list)})
    print(figures["past_the_end"])
    if not args.quick:
        print(record("beam_quality", figures))


if __name__ == "__main__":
    main()
