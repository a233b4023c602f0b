"""What heads learn, and when: diaries of runs from the first step to the last.

    python benchmarks/attention_through_training.py            # half an hour on one core
    python benchmarks/attention_through_training.py --only copying-7 stories

`copying`: two layers of width 64 read random tokens that are told again after 8 to 32 tokens, ten
seeds. `fixed`: the same with one distance, which can be counted. `stories`: the default model of
`gptbook train`. Stored at steps that grow like a power: the loss, what a token costs in both copies
of random rows told twice; for the first seed the strongest attention of each layer by distance, and
at its end what the second copy costs while one head writes its mean; at the end of each run the
attention of all heads, and what it costs if the token that far back were another one. For the
stories: the loss early and late in a text, and the share of referents that each head finds one
token before a pronoun.
"""
import argparse

import torch
import torch.nn.functional as F
from results_file import RESULTS, load, record

from gptbook.attention import capture_attention
from gptbook.attention_history import (
    AttentionDiary, by_distance, cost_by_distance, told_twice, twice)
from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.effects import mean_of_heads, without_heads
from gptbook.head_patterns import answers, relations
from gptbook.initial_weights import init_copying
from gptbook.presets import PRESETS
from gptbook.runs import TrainConfig, use_kernel
from gptbook.schedules import warmup_cosine
from gptbook.stories import stories, story
from gptbook.tokenizer import train_bpe
from gptbook.training import train

UNSEEN, V, N, SEEDS = 977, 32, 20, 10  # stories nobody trains on; random tokens, how many in a row


def rounded(value):
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def told_again(distances, n_texts: int, seed: int) -> torch.Tensor:
    """Texts of 63 random tokens that repeat after a distance drawn from these, and an end."""
    source = torch.Generator().manual_seed(seed)
    at = torch.randint(len(distances), (n_texts,), generator=source)
    far = torch.tensor(distances)[at][:, None]
    new = torch.randint(V, (n_texts, 63), generator=source)
    texts = new.gather(1, torch.arange(63)[None] % far)
    return torch.cat([texts, torch.full((n_texts, 1), V)], 1).flatten()


def of_copying(model) -> dict:
    first, second = told_twice(model, N, start=V)
    return {"first copy": first, "second copy": second}


def with_attention(model) -> dict:
    strongest = by_distance(model, N, start=V).amax(1)  # (L, N + 1)
    return {**of_copying(model), "attention": [[round(x, 3) for x in row] for row in strongest.tolist()]}


def without_each_head(model) -> list:
    """Nats a token in the second copy while one head writes its mean over other rows: (L, H)."""
    means = mean_of_heads(model, [twice(model, N, start=V, rows=64, seed=2)])
    costs = []
    for layer, heads in means.items():
        costs.append([])
        for head in range(len(heads)):
            with without_heads(model, [(layer, head)], "mean", means):
                costs[-1].append(told_twice(model, N, start=V)[1])
    return costs


def copying(steps: int, seed: int = 0, distances=tuple(range(8, 33)), look=of_copying) -> list:
    """Random tokens told again: what comes can be known from what followed the last time."""
    set_seed(seed)
    model = GPTModel(GPTConfig(V + 1, 64, 64, 2, 4, recipe="llama"))
    data = TokenDataset(told_again(distances, 16 * steps + 100, seed), 64, 32, document_end=V)
    diary = AttentionDiary(look)
    diary.write(model, 0)
    train(model, data, None, TrainConfig(steps, 3e-3, betas=(0.9, 0.98), seed=seed),
          callbacks=(diary,), schedule=warmup_cosine(steps, steps // 20, 0.1))
    if diary.entries[-1]["step"] < steps:
        diary.write(model, steps, diary.entries[-1]["loss"])
    diary.entries[-1] |= {
        "by distance": by_distance(model.eval(), N, start=V).tolist(),
        "cost by distance": cost_by_distance(model, N, start=V).tolist(),
        "second copy by length": {n: told_twice(model, n, start=V)[1] for n in (12, 20, 28)}}
    if look is with_attention:
        far = {n: by_distance(model, n, start=V)[1] for n in (12, 20, 28)}
        diary.entries[-1] |= {"without a head": without_each_head(model), "looks back by length": {
            n: int(table.amax(0).argmax()) for n, table in far.items()}}
    return diary.entries


@torch.no_grad()
def early_and_late(model, ids) -> tuple:
    """Nats a token in the first and in the last quarter of held-out rows (B, T)."""
    losses = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    quarter = losses.shape[1] // 4
    return losses[:, :quarter].mean().item(), losses[:, -quarter:].mean().item()


@torch.no_grad()
def finds_referents(model, asked) -> list:
    """Share of right choices of each head, one token before a pronoun."""
    hits = []
    for ids, questions in asked:
        with capture_attention(model) as captured:
            model(torch.tensor([ids]))
        weights = torch.stack([w[0] for w in captured.weights.values()])
        hits += [answers(weights, r, 1) for r in questions]
    return torch.stack(hits).float().mean(0).flatten().tolist()


def on_stories(steps: int | None) -> list:
    """The default run, without its files."""
    set_seed(0)
    preset = PRESETS["small"]
    corpus = stories(preset.stories, validation=200)
    tokenizer = train_bpe(corpus.text("train", 300_000), preset.vocab_size)
    end = tokenizer.end_of_text
    data = TokenDataset(tokenize(corpus, tokenizer, "train"), 192, preset.batch_size, document_end=end)
    held_out = [[end, *tokenizer.encode(story(UNSEEN, 9000 + i).text)] for i in range(120)]
    held_out = torch.tensor([row[:80] for row in held_out if len(row) >= 80])
    asked = []
    for i in range(60):
        text, questions = relations(story(UNSEEN, 5001 + 2 * i), tokenizer)
        asked.append((text[:192], [r for r in questions["pronoun, referent"] if r.query < 192]))

    def of_stories(model):
        early, late = early_and_late(model, held_out)
        around = by_distance(model, 40, start=end)[..., 30:]  # wherever a copying head may look
        return {"early": early, "late": late, "best copying": around.max().item(),
                "referents": finds_referents(model, asked)}

    model = GPTModel(preset.model_config(tokenizer.n_vocab))
    init_weights(model, preset.init_std)
    init_copying(model)
    use_kernel(model, "naive_attention")
    config, steps = preset.training, steps or preset.training.steps
    diary = AttentionDiary(of_stories)
    diary.write(model, 0)
    train(model, data, None, TrainConfig(steps, config.learning_rate, betas=config.betas),
          callbacks=(diary,), schedule=warmup_cosine(steps, round(preset.warmup * steps), preset.floor))
    if diary.entries[-1]["step"] < steps:
        diary.write(model, steps, diary.entries[-1]["loss"])
    return diary.entries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="such as stories, or copying-7")
    parser.add_argument("--quick", action="store_true", help="60 steps each, not stored")
    options = parser.parse_args()
    short = 60 if options.quick else None
    runs = {**{f"copying-{seed}": lambda seed=seed: copying(
                short or 1200, seed, look=of_copying if seed else with_attention) for seed in range(SEEDS)},
            "fixed": lambda: copying(short or 1200, distances=(N,)),
            "stories": lambda: on_stories(short)}
    if unknown := set(options.only or ()) - set(runs):
        parser.error(f"no run is called {', '.join(sorted(unknown))}; there are {', '.join(runs)}")
    for name in options.only or runs:
        entries = [rounded(entry) for entry in runs[name]()]
        print(name, {k: v for k, v in entries[-1].items() if not k.endswith(("distance", "attention"))})
        if not options.quick:
            stored = (RESULTS / "attention_through_training.json").exists()
            others = load("attention_through_training")["figures"] if stored else {}
            figures = {**others, name: entries}
            figures = {n: figures[n] for n in runs if n in figures}
            print(record("attention_through_training", figures, arguments=[]))


if __name__ == "__main__":
    main()
