"""A model of the default size learns to write, and is asked for a story on the way.

    python benchmarks/front_page.py                   # results/front_page.json
    python benchmarks/front_page.py --preset tiny --steps 60 --name try   # a quick look
"""
import argparse
import math

import torch
from results_file import record

from gptbook.core import GPTModel, init_weights, set_seed
from gptbook.critic import check_story
from gptbook.data import TokenDataset, tokenize
from gptbook.generation import generate_text
from gptbook.initial_weights import init_copying
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories, story_bits
from gptbook.tokenizer import train_bpe
from gptbook.precision import precision_for
from gptbook.presets import PRESETS
from gptbook.throughput import faster_precision
from gptbook.training import evaluate_loss, train

PROMPT = "Once upon a time"
DOUBLINGS = (0, 25, 50, 100, 200, 400, 800, 1600, 3200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--steps", type=int, help="default: those of the preset")
    parser.add_argument("--held-out", type=int, default=200, help="stories")
    parser.add_argument("--name", default="front_page")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    steps = args.steps or preset.training.steps
    corpus = stories(preset.stories, seed=0, validation=args.held_out)
    tokenizer = train_bpe(corpus.text("train", 1_500_000), preset.vocab_size)
    data, held_out = (
        TokenDataset(tokenize(corpus, tokenizer, split), preset.sizes["context_length"],
                     preset.batch_size, document_end=tokenizer.end_of_text)
        for split in ("train", "validation"))
    texts = list(corpus.documents("validation"))
    words = sum(len(text.split()) for text in texts)
    targets = sum(int((t != -100).sum()) for _, t in held_out.windows())
    start = [tokenizer.end_of_text, *tokenizer.encode(PROMPT)]
    room = preset.sizes["context_length"] - len(start)
    taken = []

    def sample(model, step: int) -> None:
        """Write down the loss on held-out stories, and one story."""
        with torch.random.fork_rng():
            model.eval()
            bits = evaluate_loss(model, held_out) * targets / math.log(2)
            ids = generate_text(model, [start], length=room, temperature=0.7, seed=1,
                                end_of_text=tokenizer.end_of_text)[0]
            model.train()
        text = tokenizer.decode([i for i in ids if i != tokenizer.end_of_text])
        taken.append({"step": step, "bits_per_word": bits / words, "text": text,
                      "problems": len(check_story(text))})
        print(f"\nstep {step}: {bits / words:.3f} bits a word\n{text}")

    def now_and_then(run) -> None:
        if run.step in DOUBLINGS or run.step == steps:
            sample(run.model, run.step)

    set_seed(0)
    model = GPTModel(preset.model_config(tokenizer.n_vocab))
    init_weights(model, preset.init_std)
    init_copying(model)
    precision = faster_precision(model, data, preset.training)
    sample(model, 0)
    config = type(preset.training)(**{**vars(preset.training), "steps": steps})
    history = train(
        model, data, None, config, callbacks=(now_and_then,),
        schedule=warmup_cosine(steps, int(preset.warmup * steps), preset.floor),
        precision=precision_for(precision, torch.device("cpu")))
    record(args.name, {
        "preset": args.preset, "samples": taken, "words": words,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "exact_bits_per_word": sum(map(story_bits, texts)) / words,
    })


if __name__ == "__main__":
    main()
