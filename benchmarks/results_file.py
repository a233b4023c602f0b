"""Result files of the benchmarks: figures with the machine, versions, date and command that made them.

    from results_file import record, load
    record("train_stories", {"excess_bits_per_word": 0.11})   # benchmarks/results/train_stories.json
    load("train_stories")["figures"]["excess_bits_per_word"]
"""
import json
import os
import platform
import shlex
import sys
import tempfile
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "transformers")


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(l.split(":", 1)[1].strip() for l in lines if l.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict:
    """What a reader needs to judge a timing: processor, cores, threads, accelerator."""
    import torch
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(), "cores": cores, "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }


def versions() -> dict:
    """Python and the packages that decide the figures, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def command(arguments: list | None = None) -> str:
    """The command line that runs now, with paths relative to the repository."""
    script = Path(sys.argv[0]).resolve()
    root = RESULTS.parent.parent
    name = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = [Path(a).name if a.startswith(("/", "..", "~")) else a for a in arguments]
    return shlex.join(["python", str(name), *arguments])


def record(
    name: str,               # results/NAME.json
    figures: dict,           # JSON values: what was measured
    folder: Path = RESULTS,  # where to write
    arguments: list | None = None,  # that make the whole file, where it was made in parts
) -> Path:                   # the file
    """Write `figures` with machine, versions, date and command; atomic, so never half a file."""
    content = {
        "name": name, "figures": figures, "machine": machine(), "versions": versions(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "command": command(arguments),
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"   # fails before it writes
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, folder / f"{name}.json")
    return folder / f"{name}.json"


def load(name: str, folder: Path = RESULTS) -> dict:
    """The stored result NAME, as `record` wrote it; says which script makes it if it is missing."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is not there: run python benchmarks/{name}.py")
    return json.loads(path.read_text())
