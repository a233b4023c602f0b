"""How soon `gptbook generate` writes: from the start of the process to the first byte on stdout.

    python benchmarks/first_token.py            # about two minutes
    python benchmarks/first_token.py --quick    # two rounds, writes no result

In turn with `python -c "import torch"` and `import gptbook`, so that all meet one load. The prompt
is empty, so the first byte is one that the model has written. Target: at most 1.3 times the import
of torch, and 0.3 s; medians of the rounds, and of each round's own ratio.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from results_file import record
from tqdm import tqdm

GENERATE = [str(Path(sys.executable).with_name("gptbook")), "generate", "--seed", "1",
            "--device", "cpu"]
WAITS = {
    "import torch": [sys.executable, "-c", "import torch; print(1)"],
    "import gptbook": [sys.executable, "-c", "import gptbook; print(1)"],
    "first byte of generate": GENERATE,
}


def first_byte(words: list) -> tuple[float, float]:
    """Seconds until the first byte on stdout, and until the end."""
    started = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        byte = process.stdout.read(1)
        first = time.perf_counter() - started
        process.stdout.read()
    whole = time.perf_counter() - started
    if not byte or process.returncode:
        raise RuntimeError(f"{words} wrote nothing, exit {process.returncode}")
    return first, whole


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds, writes no result")
    quick = parser.parse_args().quick
    for words in WAITS.values():
        first_byte(words)                                   # files into the page cache
    rounds = [{name: first_byte(words) for name, words in WAITS.items()}
              for _ in tqdm(range(2 if quick else 9))]
    seconds = {name: round(median(r[name][0] for r in rounds), 3) for name in WAITS}
    last = "first byte of generate"
    limits = [r[last][0] / (1.3 * r["import torch"][0] + 0.3) for r in rounds]
    figures = {
        "rounds": len(rounds), "seconds": seconds,
        "whole story_s": round(median(r[last][1] for r in rounds), 3),
        "generate / torch": round(median(r[last][0] / r["import torch"][0] for r in rounds), 3),
        "generate / (1.3 torch + 0.3 s)": round(median(limits), 3),
        "ratios": [round(x, 3) for x in limits],
    }
    print(figures)
    if not quick:
        record("first_token", figures)


if __name__ == "__main__":
    main()
