"""The default run from start to end: time, memory, and how far it stays from perfect.

    python benchmarks/train_stories.py                         # about six minutes
    python benchmarks/train_stories.py --demo                  # judge the model that travels
    python benchmarks/train_stories.py --checkpoint runs/mine/best_model.safetensors --name mine

Runs `gptbook train` as a user would, then judges its best weights on stories that it has not
seen. Excess is the model's bits for a whole story (from the end-of-text token before it to
the one after it) less the exact bits of the text under the grammar, for each word. Samples
are drawn at temperature 0.7, as by `gptbook generate`, and at 1, the model's own distribution.
"""
import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from results_file import record
from tqdm import tqdm

from gptbook.checkpoints import load_model
from gptbook.critic import check_story
from gptbook.generation import generate_text
from gptbook.stories import stories, story_bits, story_text

DEMO = Path(__file__).resolve().parent.parent / "gptbook" / "models" / "stories.safetensors"
UNSEEN = 977  # a seed that no run trains on


def run_default(out: Path) -> dict:
    """Seconds and peak memory of `gptbook train --out OUT`."""
    started = time.perf_counter()
    call = [str(Path(sys.executable).with_name("gptbook")), "train", "--out", str(out)]
    subprocess.run(call, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": round(time.perf_counter() - started, 1),
            "peak_memory_GB": round(peak / 2**20, 3)}  # ru_maxrss is in KiB here


@torch.no_grad()
def model_bits(model, tokenizer, text: str) -> float:
    """-log2 of the probability that the model gives to a whole story."""
    end = tokenizer.end_of_text
    ids = torch.tensor([[end, *tokenizer.encode(text), end]])
    nats = F.cross_entropy(model(ids[:, :-1])[0].float(), ids[0, 1:], reduction="sum")
    return nats.item() / math.log(2)


def write(model, tokenizer, n: int, temperature: float) -> tuple:
    """(texts, whether each came to its end, what the critic says of each)."""
    end = tokenizer.end_of_text
    rows = generate_text(model, [[end]] * n, model.max_positions - 1, end_of_text=end,
                         temperature=temperature, seed=0)
    texts = [tokenizer.decode([i for i in row if i != end]) for row in rows]
    return texts, [row[-1] == end for row in rows], [check_story(text) for text in texts]


def passing(texts: list, ended: list, problems: list) -> float:
    """Share of the texts that end, and in which the critic finds nothing."""
    return sum(e and not p for e, p in zip(ended, problems)) / len(texts)


def judge(checkpoint: Path, n_stories: int, n_samples: int) -> dict:
    """Excess over the exact entropy, and what the critic says of samples."""
    loaded = load_model(checkpoint)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    texts = [story_text(UNSEEN, i) for i in range(n_stories)]
    exact = [story_bits(t) for t in tqdm(texts, "exact bits")]
    ours = [model_bits(model, tokenizer, t) for t in tqdm(texts, "model bits")]
    words = [len(t.split()) for t in texts]
    excess = sum(ours) - sum(exact)
    rest = [a - b - excess / sum(words) * w for a, b, w in zip(ours, exact, words)]
    interval = 1.96 * stdev(rest) / math.sqrt(n_stories) / mean(words)
    written = {temperature: write(model, tokenizer, n_samples, temperature)
               for temperature in (0.7, 1.0)}  # what `gptbook generate` does, and the model's own
    samples, ended, problems = written[0.7]
    known = set(stories().documents("train"))  # the default corpus
    return {
        "excess_bits_per_word": round(excess / sum(words), 4),
        "excess_95_percent": round(interval, 4),
        "entropy_bits_per_word": round(sum(exact) / sum(words), 4),
        "held_out_stories": n_stories, "samples": n_samples,
        "samples_pass": passing(*written[0.7]), "samples_pass_at_temperature_1": passing(*written[1.0]),
        "samples_ended": sum(ended) / n_samples,
        "samples_new": sum(t not in known for t in samples) / n_samples,
        "problems": dict(Counter(p.kind for found in problems for p in found)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": round(checkpoint.stat().st_size / 1e6, 2), "training": loaded.info,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="judge this one, train nothing")
    parser.add_argument("--demo", action="store_true", help="judge the model that travels")
    parser.add_argument("--name", default="train_stories")
    parser.add_argument("--stories", type=int, default=600)
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    name, checkpoint, figures = args.name, args.checkpoint, {}
    if args.demo:
        name, checkpoint = "demo_model", DEMO
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            figures = run_default(Path(folder) / "run")
            checkpoint = Path(folder) / "run" / "best_model.safetensors"
        figures |= judge(checkpoint, args.stories, args.samples)
    for key, value in figures.items():
        print(f"{key}: {value}")
    print(record(name, figures))


if __name__ == "__main__":
    main()
