"""What a learning-rate finder suggests, beside the sweep that it is meant to replace.

    python benchmarks/rate_finder.py            # a few minutes on one core
    python benchmarks/rate_finder.py --quick    # half a minute, writes nothing

The small model of the page, three seeds. The finder runs once a seed; then the model is trained
at each of eight rates, a factor of two apart, in a short and in a longer run, with a climb and a
cosine. Runs of one seed share first weights and batches, whatever their rate.
"""
import argparse

import torch
from results_file import record
from tqdm import tqdm

from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.rate_finder import find_learning_rate, suggest_rates
from gptbook.runs import TrainConfig
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories
from gptbook.tokenizer import train_bpe
from gptbook.training import evaluate_loss, train

RATES = [0.001 * 2**k for k in range(8)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", type=int, default=50, help="steps")
    parser.add_argument("--long", type=int, default=300, help="steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.short, args.long, args.seeds = 10, 20, 1
    torch.set_num_threads(1)
    corpus = stories(600, validation=60)
    tokenizer = train_bpe(corpus.text("train"), 400)
    data, held_out = (TokenDataset(tokenize(corpus, tokenizer, split), 64, 8,
                                   document_end=tokenizer.end_of_text)
                      for split in ("train", "validation"))

    def small_model(seed):
        set_seed(seed)
        model = GPTModel(GPTConfig(tokenizer.n_vocab, 64, 48, n_layers=2, n_heads=2))
        init_weights(model, 0.1)
        return model

    def final_loss(rate, steps, seed):
        model, config = small_model(seed), TrainConfig(steps, learning_rate=rate, seed=seed)
        train(model, data, None, config, schedule=warmup_cosine(steps, steps // 10, 0.02),
              progress=False)
        return round(evaluate_loss(model, held_out), 4)

    suggested, used = {}, []
    for seed in tqdm(range(args.seeds), "finder"):
        history = find_learning_rate(small_model(seed), data, TrainConfig(seed=seed))
        used.append(len(history))
        for rule, rate in suggest_rates(history).items():
            suggested.setdefault(rule, []).append(rate)
        tqdm.write(f"seed {seed}: {suggest_rates(history)} after {len(history)} steps")
    sweep = {}
    for steps in (args.short, args.long):
        for rate in tqdm(RATES, f"{steps} steps"):
            losses = [final_loss(rate, steps, seed) for seed in range(args.seeds)]
            sweep.setdefault(str(steps), {})[str(rate)] = losses
            tqdm.write(f"{steps} steps at {rate}: {losses}")
    figures = {"suggested": suggested, "steps_of_the_finder": used,
               "held_out_nats_per_token": sweep}
    print(figures["suggested"] if args.quick else record("rate_finder", figures))


if __name__ == "__main__":
    main()
