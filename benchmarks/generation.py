"""Writing: what the loop costs beside its model, what shared prompts save, and whether rows
stay what they are alone.

    python benchmarks/generation.py            # three minutes, one thread
    python benchmarks/generation.py --quick    # seconds, writes nothing

1. A step of the stories model by the bare decoder, and by `generate_text` with each of its
   options; in turn, the median over the rounds.
2. Eight texts of one prompt: read once and shared, or read once a row, as a loop without
   that would do. The texts must be equal.
3. Batches of 32 ragged prompts beside each prompt alone, under samplers whose penalties look
   at the text, with stop strings and ends; the ids must be equal. As a control, penalties
   that look at the neighbour's text.
4. When the first piece of a streamed story arrives, and when the whole story is there.
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from results_file import record
from tqdm import tqdm

from gptbook import generation
from gptbook.checkpoints import load_demo
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.decoder import Decoder
from gptbook.generation import generate_text, stream_text
from gptbook.sampler import Sampler

SMALL = GPTConfig(vocab_size=4096, context_length=1152, emb_dim=384, n_layers=6, n_heads=6)
PENALTIES = Sampler(temperature=0.8, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.2,
                    frequency_penalty=0.1, no_repeat_ngram=3)


def seconds(run):
    start = perf_counter()
    run()
    return perf_counter() - start


def race(runs: dict, rounds: int) -> dict:
    """Seconds of each, in turn; the first round warms up."""
    times = {name: [] for name in runs}
    for turn in tqdm(range(rounds + 1), leave=False):
        for name, run in runs.items():
            took = seconds(run)
            if turn:
                times[name].append(took)
    return times


def step_costs(rounds: int, length: int) -> dict:
    """Microseconds of a step, by what is asked of it."""
    model, tokenizer = load_demo()
    prompt = [tokenizer.end_of_text, *tokenizer.encode("The cat sat on the mat.")]
    decoder, token = Decoder(model), torch.tensor([5])

    def bare():
        decoder.start([prompt])
        for _ in range(length - 1):
            decoder.step(token)

    def write(**options):
        return lambda: generate_text(decoder, [prompt], length, seed=0, **options)

    times = race({
        "bare decoder": bare,
        "greedy": write(temperature=0),
        "temperature 1": write(),
        "top-k 50": write(top_k=50),
        "top-p 0.9": write(top_p=0.9),
        "two stop strings": write(stop=("\n\n", "Lily and the sea"), tokenizer=tokenizer),
        "adjust": write(adjust=lambda logits, rows, texts, step: logits),
        "all penalties": write(sampler=PENALTIES),
    }, rounds)
    bare_times, plain = times["bare decoder"], times["temperature 1"]
    return {name: {"us": 1e6 * median(t) / length,
                   "more_us": 1e6 * median(x - y for x, y in zip(t, bare_times)) / length,
                   "ratio": median(x / y for x, y in zip(t, bare_times)),
                   "more_than_plain_us": 1e6 * median(x - y for x, y in zip(t, plain)) / length,
                   "to_plain": median(x / y for x, y in zip(t, plain))}
            for name, t in times.items()}


def read_each(decoder, prompts):
    """What a loop does that does not notice equal prompts."""
    return decoder.start(prompts)


def shared_prompts(rounds: int, lengths, n=8, new=32) -> list[dict]:
    """Eight texts of a prompt, read once and read by each row."""
    set_seed(0)
    model = GPTModel(SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    decoder, once, rows = Decoder(model, n), generation.read_prompts, []
    for T in lengths:
        prompt = torch.randint(4096, (T,)).tolist()

        def run(reader):
            def write():
                generation.read_prompts = reader
                texts[reader] = generate_text(decoder, prompt, new, n=n, seed=0)
                generation.read_prompts = once
            return write

        texts = {}
        times = race({"once": run(once), "each": run(read_each)}, rounds)
        assert texts[once] == texts[read_each], "they do not write the same texts"
        pairs = list(zip(times["each"], times["once"]))
        rows.append({"prompt": T, "n": n, "new": new, "once_s": median(times["once"]),
                     "each_s": median(times["each"]), "gain": median(a / b for a, b in pairs)})
        tqdm.write(str(rows[-1]))
    return rows


def loud(recipe, **options):
    """A small random model whose next token depends on what it reads."""
    set_seed(1)
    config = GPTConfig(64, 96, 32, 2, 4, recipe=recipe, options=options)
    model = GPTModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def neighbours_penalty(logits, uniform, texts, step):
    """The control: each row's penalties look at the text of the next row."""
    return PENALTIES(logits, uniform, texts[1:] + texts[:1], step)


def rows_alone(batches: int, n=32, new=16) -> dict:
    """How many rows of ragged batches are what they are alone, by settings."""
    from gptbook import recipes  # noqa: F401, its names become known

    g, counts = torch.Generator().manual_seed(0), {}
    settings = {
        "three numbers": dict(temperature=0.9, top_k=20, top_p=0.9, end_of_text=17),
        "penalties": dict(sampler=PENALTIES, end_of_text=17, min_length=3),
        "penalties, past the context": dict(sampler=PENALTIES, slide=True, length=60),
        "control": dict(sampler=neighbours_penalty, end_of_text=17),
    }
    models = [loud("gpt2"), loud("llama"), loud("mistral", window=6), loud("alibi")]
    for name, options in tqdm(list(settings.items()), leave=False):
        options, counts[name] = {"length": new, **options}, {"rows": 0, "same": 0}
        slides = options["length"] > new
        for model in models[:2] if slides else models:
            for _ in range(1 if slides else batches):
                sizes = torch.randint(1, 65, (n,), generator=g).tolist()
                prompts = [torch.randint(64, (T,), generator=g).tolist() for T in sizes]
                together = generate_text(model, prompts, seed=7, **options)
                alone = [generate_text(model, p, seed=7 + b, **options)[0]
                         for b, p in enumerate(prompts)]
                counts[name]["rows"] += n
                counts[name]["same"] += sum(a == b for a, b in zip(together, alone))
    return counts


def first_pieces(rounds: int) -> dict:
    """Milliseconds to the first piece of a story, and to its end."""
    model, tokenizer = load_demo()
    first, whole = [], []
    for seed in range(rounds + 1):
        start = perf_counter()
        story = stream_text(model, tokenizer, "Once upon a time", 150, 0.7, seed=seed)
        next(story)
        middle = perf_counter()
        list(story)
        if seed:
            first.append(1e3 * (middle - start))
            whole.append(1e3 * (perf_counter() - start))
    return {"first_ms": median(first), "whole_ms": median(whole),
            "ratio": median(w / f for w, f in zip(whole, first))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is written")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick = options.quick
    rounds = 1 if quick else options.rounds
    figures = {
        "step": step_costs(2 * rounds, 40 if quick else 150),
        "shared": shared_prompts(rounds, (64,) if quick else (64, 256, 1024)),
        "rows": rows_alone(1 if quick else 2),
        "stream": first_pieces(3 * rounds),
    }
    for name, part in figures.items():
        print(name, part, flush=True)
    if not quick:
        print(record("generation", figures))


if __name__ == "__main__":
    main()
