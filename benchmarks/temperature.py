"""Quality against variety: stories written at many temperatures, judged by the critic.

    python benchmarks/temperature.py                       # the model that travels along
    python benchmarks/temperature.py --checkpoint runs/mine/best_model.safetensors

A story passes if it ended by itself and the critic of the story world finds no mistake.
Variety is the share of different four-word phrases among all (distinct-4, Li et al. 2016);
as many stories of the grammar itself are the reference.
"""
import argparse
from pathlib import Path

import torch
from results_file import record

from gptbook.checkpoints import load_demo, load_model
from gptbook.critic import check_story
from gptbook.generation import generate_text
from gptbook.stories import stories

TEMPERATURES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
CUTS = (
    {}, {"top_k": 50}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 1.3},
    {"temperature": 1.3, "top_p": 0.9}, {"temperature": 1.3, "top_k": 5},
)


def distinct(texts, n=4):
    """Share of different n-word phrases among all of them."""
    words = [text.split() for text in texts]
    phrases = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(phrases)) / max(1, len(phrases))


def judge(model, tokenizer, n, seed, **settings):
    """What the critic and the phrase count say of n stories."""
    end = tokenizer.end_of_text
    room = model.max_positions or model.config.context_length
    rows = generate_text(model, [[end]] * n, room - 1, end_of_text=end, seed=seed, **settings)
    texts = [tokenizer.decode([i for i in row if i != end]) for row in rows]
    passed = [row[-1] == end and not check_story(text) for row, text in zip(rows, texts)]
    return {**settings, "pass": sum(passed) / n, "distinct_4": distinct(texts),
            "different": len(set(texts)) / n,
            "ended": sum(row[-1] == end for row in rows) / n,
            "tokens": sum(len(row) - 1 for row in rows) / n}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="default: the model of the package")
    parser.add_argument("--stories", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.checkpoint:
        loaded = load_model(options.checkpoint)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        model, tokenizer = load_demo()
    corpus = stories(options.stories, seed=options.seed + 1_000)
    told = list(corpus.documents("train"))[: options.stories]
    figures = {
        "stories": options.stories, "seed": options.seed,
        "grammar": {"pass": sum(not check_story(t) for t in told) / len(told),
                    "distinct_4": distinct(told)},
    }
    print(figures["grammar"], flush=True)
    for name, rows in (("temperature", [{"temperature": t} for t in TEMPERATURES]), ("cuts", CUTS)):
        figures[name] = []
        for settings in rows:
            found = judge(model, tokenizer, options.stories, options.seed, **settings)
            print(found, flush=True)
            figures[name].append(found)
    print(record("temperature", figures))


if __name__ == "__main__":
    main()
