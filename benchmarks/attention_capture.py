"""What capturing attention costs: time beside a forward pass, memory beside the weights asked for.

    python benchmarks/attention_capture.py              # about a minute

Twelve layers, twelve heads, 256 tokens, random weights, in turn with and without capturing; the
memory is the largest size of a fresh process beyond that of one which only ran the model.
"""
import argparse
import json
import os
import subprocess
import sys
from statistics import median, quantiles
from time import perf_counter

import torch
from results_file import record
from tqdm import trange

from gptbook.attention import capture_attention
from gptbook.core import GPTConfig, GPTModel, set_seed

TOKENS = 256


def case():
    set_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = GPTModel(GPTConfig(4096, TOKENS, 768, 12, 12)).eval()
    return model, torch.randint(4096, (1, TOKENS))


def times(rounds) -> dict:
    """Seconds with capturing over seconds without, in turn."""
    model, ids = case()
    ratios = []
    for _ in trange(rounds + 1, unit="round"):
        start = perf_counter()
        model(ids)
        middle = perf_counter()
        with capture_attention(model):
            model(ids)
        ratios.append((perf_counter() - middle) / (middle - start))
    low, _, high = quantiles(ratios[1:])
    return {"median": round(median(ratios[1:]), 3), "low": round(low, 3), "high": round(high, 3)}


def peak(capturing: bool) -> int:
    """In this process: the most memory that it ever had, in bytes."""
    import resource
    from contextlib import nullcontext

    model, ids = case()
    model(ids)
    with capture_attention(model) if capturing else nullcontext() as captured:
        model(ids)
    asked = captured.bytes if capturing else 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([most, asked]))


def fresh(how: str) -> list:
    run = subprocess.run([sys.executable, __file__, "--peak", how], capture_output=True, text=True,
                         check=True, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"})
    return json.loads(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two rounds, not stored")
    parser.add_argument("--peak", choices=["with", "without"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return peak(options.peak == "with")
    runs = [(fresh("with"), fresh("without")) for _ in range(1 if options.quick else 3)]
    asked = runs[0][0][1]
    memory = median((more - less) / asked for (more, _), (less, _) in runs)
    figures = {"tokens": TOKENS, "layers": 12, "heads": 12, "asked_megabytes": round(asked / 1e6, 1),
               "memory_over_asked": round(memory, 3),
               "times_a_forward": times(2 if options.quick else options.rounds)}
    print(figures)
    if not options.quick:
        print(record("attention_capture", figures))


if __name__ == "__main__":
    main()
