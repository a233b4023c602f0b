"""What `import gptbook` costs beside `import torch`: paired runs in fresh processes.

    python benchmarks/import_time.py [pairs]
"""

import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from results_file import record  # noqa: E402

CLOCK = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def seconds(module: str) -> float:
    """Seconds that the import of `module` takes in a fresh process."""
    run = subprocess.run([sys.executable, "-c", CLOCK.format(module)], capture_output=True,
                         text=True, check=True)
    return float(run.stdout)


def paired(pairs: int) -> list[tuple[float, float]]:
    """(torch, gptbook) in seconds, one after the other, so that both meet the same load."""
    seconds("gptbook")                                  # files into the page cache
    return [(seconds("torch"), seconds("gptbook")) for _ in range(pairs)]


def main(pairs: int = 15):
    """Measure and record."""
    times = paired(pairs)
    ratio = statistics.median(ours / torch for torch, ours in times)
    figures = {"pairs": pairs, "ratio": round(ratio, 3), "limit": 1.2,
               "torch_s": round(statistics.median(t for t, _ in times), 3),
               "gptbook_s": round(statistics.median(g for _, g in times), 3)}
    print(figures)
    record("import_time", figures)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
