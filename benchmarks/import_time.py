"""What `import gptbook` costs beside `import torch`: paired runs in fresh processes.

    python benchmarks/import_time.py [pairs]
"""

import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from results_file import record  # noqa: E402

CLOCK = ("import time; w, c = time.perf_counter(), time.process_time(); import {}; "
         "print(time.perf_counter() - w, time.process_time() - c)")


def seconds(module: str) -> tuple[float, float]:
    """Wall and processor seconds that the import of `module` takes in a fresh process."""
    run = subprocess.run([sys.executable, "-c", CLOCK.format(module)], capture_output=True,
                         text=True, check=True)
    wall, processor = map(float, run.stdout.split())
    return wall, processor


def paired(pairs: int) -> list[tuple]:
    """((wall, processor) of torch, the same of gptbook) in turn, so that both meet one load."""
    seconds("gptbook")                                  # files into the page cache
    return [(seconds("torch"), seconds("gptbook")) for _ in range(pairs)]


def main(pairs: int = 15):
    """Measure and record."""
    times = paired(pairs)
    figures = {"pairs": pairs, "limit": 1.2}
    for i, clock in enumerate(("wall", "processor")):
        figures[clock] = {
            "ratio": round(statistics.median(g[i] / t[i] for t, g in times), 3),
            "torch_s": round(statistics.median(t[i] for t, _ in times), 3),
            "gptbook_s": round(statistics.median(g[i] for _, g in times), 3)}
    print(figures)
    record("import_time", figures)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
