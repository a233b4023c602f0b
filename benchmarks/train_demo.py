"""Train the stories model that travels with the package: gptbook/models/stories.safetensors.

    python benchmarks/train_demo.py                # about 45 minutes on one core
    python benchmarks/train_demo.py --resume       # go on after Ctrl-C or a crash

The run, with its log and full state, lies in --out; at its end the best weights are stored
in bfloat16, with the tokenizer and this command. Retrain it only when the story world or
the tokenizer changes: every page that shows its text must then be run again.
"""
import argparse
import time
from pathlib import Path

import torch
from results_file import command

from gptbook.checkpoints import load_model, save_model
from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.initial_weights import init_copying
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.tokenizer import Tokenizer, train_bpe
from gptbook.precision import precision_for
from gptbook.runs import TrainConfig
from gptbook.throughput import faster_precision
from gptbook.training import train

DEMO = Path(__file__).resolve().parent.parent / "gptbook" / "models" / "stories.safetensors"
SEED = 1  # another seed than the default corpus, so that its held-out stories are new here


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--stories", type=int, default=75_000)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--context-length", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = stories(args.stories, seed=SEED, validation=500)
    tokenizer: Tokenizer = train_bpe(corpus.text("train", 1_500_000), args.vocab_size)
    data, held_out = (
        TokenDataset(tokenize(corpus, tokenizer, split, progress=True), args.context_length,
                     args.batch_size, document_end=tokenizer.end_of_text)
        for split in ("train", "validation"))
    set_seed(SEED)
    model = GPTModel(GPTConfig(tokenizer.n_vocab, args.context_length, 192, 4, args.heads))
    init_weights(model, 0.07)
    init_copying(model)
    precision = faster_precision(model, data, TrainConfig())
    config = TrainConfig(args.steps, args.learning_rate, betas=(0.9, 0.98), seed=SEED,
                         validate_every=1_000, save_every=1_000, keep_epochs=1)
    started = time.perf_counter()
    history = train(
        model, data, held_out, config, out=args.out, tokenizer=tokenizer,
        schedule=warmup_cosine(args.steps, args.steps // 50, 0.01),
        precision=precision_for(precision, torch.device("cpu")), resume=args.resume,
        resume_command=command() + " --resume")
    if len(history) < args.steps:
        raise SystemExit(130)
    best = load_model(args.out / "best_model.safetensors")
    info = dict(best.info, data="stories", documents=True, command=command(),
                minutes=round((time.perf_counter() - started) / 60, 1))
    save_model(DEMO, best.model, best.tokenizer, dtype=torch.bfloat16, **info)
    print(f"{DEMO.name}: {DEMO.stat().st_size / 1e6:.2f} MB, {info['minutes']} minutes")


if __name__ == "__main__":
    main()
