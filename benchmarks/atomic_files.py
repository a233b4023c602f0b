"""What it costs to replace a file so that it is never half there.

    python benchmarks/atomic_files.py      writes benchmarks/results/atomic_files.json
"""
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from unittest import mock

from gptbook import atomic_files as af
from results_file import record

SIZES = [1_000, 100_000, 1_000_000, 10_000_000, 100_000_000]


def in_place(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def beside(path: Path, data: bytes) -> None:
    in_place(path.with_name("new"), data)
    os.replace(path.with_name("new"), path)


def unsynced(path: Path, data: bytes) -> None:
    """`atomic_write` without its fsyncs."""
    skip = lambda call, *args: None if call is os.fsync else call(*args)
    with mock.patch.object(af, "_disk", skip):
        af.atomic_write(path, data)


WAYS = {"in place": in_place, "beside": beside, "no fsync": unsynced,
        "atomic_write": af.atomic_write}


def empty(path: Path, data: bytes) -> None:
    """What the way in place begins with, alone."""
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def seconds(folder: Path, size: int, repeats: int) -> dict:
    """Median seconds of each way, taken in turn so that neighbours disturb all alike."""
    ways, data = {**WAYS, "emptying": empty}, os.urandom(size)
    times = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first round makes the files, the others replace them
        in_place(folder / "emptying", data)
        os.sync()
        for name, write in ways.items():
            start = perf_counter()
            write(folder / name, data)
            times[name].append(perf_counter() - start)
            os.sync()  # nothing that one way left to do is paid for by the next
    return {name: round(statistics.median(t[1:]), 7) for name, t in times.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [seconds(Path(folder), size, 9 if size > 1e7 else 31) for size in SIZES]
    for size, row in zip(SIZES, rows):
        print(f"{size:>11,} bytes", {name: f"{1e3 * s:.2f} ms" for name, s in row.items()})
    record("atomic_files", {
        "bytes": SIZES, "seconds": {name: [row[name] for row in rows] for name in rows[0]}})


if __name__ == "__main__":
    main()
