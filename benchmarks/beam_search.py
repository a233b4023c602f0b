"""Five beams on GPT-2's shape: gptbook beside transformers' generate, the same hypotheses.

    python benchmarks/beam_search.py            # about three minutes on one core
    python benchmarks/beam_search.py --quick    # a small shape, nothing written

Random weights, scaled up so that the distributions have peaks: texts that are nearly equal
in probability would be ordered by rounding. Both write from the same prompt in turn (A B A B);
hypotheses must be the same, and scores agree to 1e-4. A ratio is the median over the pairs.
Then what a step is made of: the model, the choice among the continuations, the cache.
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from decode_speed import pair
from results_file import record
from tqdm import tqdm

from gptbook.beam import (
    Bans, BeamRules, Beams, beam_search, best_options, continuations, follow,
)
from gptbook.core import GPTConfig, pick_device
from gptbook.decoder import Decoder

PROMPT, PENALTY = 64, 1.0


def ours(model, ids, width, length):
    found = beam_search(model, ids, width, length, PENALTY)
    return [(one.new_ids, one.score) for one in found]


def transformers(theirs, ids, width, length):
    out = theirs.generate(
        ids[None], attention_mask=torch.ones_like(ids[None]), num_beams=width,
        max_new_tokens=length, length_penalty=PENALTY, num_return_sequences=width,
        do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True)
    texts = out.sequences[:, len(ids):].tolist()
    return list(zip(texts, out.sequences_scores.tolist()))


def race(runners: dict, rounds: int) -> tuple[dict, float]:
    """Seconds of each runner, in turn; the largest difference between their scores."""
    times, found, apart = {name: [] for name in runners}, {}, 0.0
    for turn in tqdm(range(rounds + 1), "in turn"):
        for name, run in runners.items():
            start = perf_counter()
            found[name] = run()
            if turn:  # the first round warms up
                times[name].append(perf_counter() - start)
        first, second = found.values()
        assert [ids for ids, _ in first] == [ids for ids, _ in second], "other hypotheses"
        apart = max(apart, *(abs(a - b) for (_, a), (_, b) in zip(first, second)))
    assert apart <= 1e-4, f"scores differ by {apart}"
    return times, apart


def milliseconds(run, rounds=15) -> float:
    times = []
    for _ in range(rounds + 1):
        start = perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (perf_counter() - start))
    return round(median(times[1:]), 3)


def parts(model, ids, width, length) -> dict:
    """Milliseconds of what a step in the middle of a text is made of."""
    decoder, text = Decoder(model, width, len(ids) + length), ids.tolist()
    decoder.start([text])
    decoder.reorder([0] * width)
    newest = torch.arange(width, device=ids.device)
    for _ in range(length // 2):
        logits = decoder.step(newest)
    logits, half = logits.clone(), len(ids) + length // 2

    def step():
        decoder.step(newest)
        decoder.truncate(half)

    def select():
        search = Beams(text, BeamRules(width, length))
        search.live *= width
        found = continuations(logits, 2 * width, Bans(), [text] * width, 0)
        search.advance(best_options(search, *found))

    # the fifth beam died and the first has two children; in order, four rows would move
    turned, gathered = [*range(width - 1), 0], [0, 0, *range(1, width - 1)]
    return {
        "the model, one row": one_row(model, text, length),
        "the model, all beams": milliseconds(step),
        "choosing": milliseconds(select),
        "choosing, softmax and sort of all": milliseconds(
            lambda: logits.log_softmax(-1).flatten().sort(descending=True)),
        "cache, what was generated": milliseconds(
            lambda: follow(decoder, turned, len(text))),
        "cache, all of it": milliseconds(lambda: decoder.reorder(gathered)),
    }


def one_row(model, text, length) -> float:
    decoder = Decoder(model, 1, len(text) + length)
    decoder.start([text])
    newest = torch.tensor([0], device=decoder.cache.device)

    def step():
        decoder.step(newest)
        decoder.truncate(len(text))

    return milliseconds(step)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64],
                        help="new ones after a prompt of 64, for each race")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--scale", type=float, default=3.0, help="of the random weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small shape; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device()
    config = GPTConfig(4096, 256, 128, 4, 4) if args.quick else GPTConfig()
    model, theirs = pair(config, device, args.scale)
    ids = torch.randint(config.vocab_size, (PROMPT,), device=device)
    figures = {"beam_width": args.width, "prompt": PROMPT, "rounds": args.rounds,
               "weights_scaled_by": args.scale, "races": {}}
    for tokens in args.tokens:
        options = ids, args.width, tokens
        times, apart = race({
            "gptbook": lambda: ours(model, *options),
            "transformers": lambda: transformers(theirs, *options)}, args.rounds)
        ratios = [b / a for a, b in zip(times["gptbook"], times["transformers"])]
        figures["races"][str(tokens)] = {
            "tokens_per_second": {name: round(tokens / median(t), 2)
                                  for name, t in times.items()},
            "gptbook_over_transformers": round(median(ratios), 2),
            "ratios": [round(ratio, 2) for ratio in ratios],
            "largest_difference_of_scores": apart}
    figures["step_ms"] = parts(model, *options)
    print(figures)
    if not args.quick:
        print(record("beam_search", figures))


if __name__ == "__main__":
    main()
