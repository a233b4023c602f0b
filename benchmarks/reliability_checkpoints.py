"""Rows R2 and R3 of the reliability scoreboard, one figure a row.

    python benchmarks/reliability_checkpoints.py                     the full counts
    python benchmarks/reliability_checkpoints.py --mutations 1000    fewer, in minutes
    python benchmarks/reliability_checkpoints.py --quick             those of `make test`

All but the last write benchmarks/results/reliability_checkpoints.json.

R2  A fault (disk full, I/O error, SIGKILL, power cut) at every write, fsync and rename
    of a save: the previous checkpoint stays, the next save works, nothing is left over.
R3  Mutated and hand-made hostile checkpoints: one `CheckpointError` with file, cause
    and cure; nothing executed or opened, under a second, under 2 x size + 16 MB.
"""
import argparse
import copy
import errno
import gc
import io
import os
import random
import re
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch

from gptbook import atomic_files as af
from gptbook import checkpoints as ck
from gptbook.checkpoints import CheckpointError, load_model, load_state
from hostile_checkpoints import (
    byte_tokenizer, crafted, tiny_model, tiny_state, torch_zip_with_pickle,
)
from results_file import record

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where fsync is quick


# ------------------------------------------------------------------ R2: what is saved


@dataclass(frozen=True)
class Subject:
    """A way to save numbered versions into a folder, and to tell which one is there."""

    name: str
    save: Callable  # (folder, version)
    load: Callable  # (folder) -> version
    expected: str  # the names that may lie there, as a regular expression


_version = lru_cache(tiny_model)


def _load_model_version(folder: Path) -> int:
    loaded = load_model(folder / "best_model.safetensors")
    version = loaded.info["version"]
    for mine, its in zip(_version(version).parameters(), loaded.model.parameters()):
        assert torch.equal(mine, its), f"weights are not those of version {version}"
    return version


def _load_state_version(folder: Path) -> int:
    found = load_state(folder)
    torch.testing.assert_close(found, tiny_state(found["version"]), atol=0, rtol=0)
    return found["version"]


MODEL = Subject(
    "save_model",
    lambda folder, version: ck.save_model(
        folder / "best_model.safetensors", _version(version), version=version),
    _load_model_version,
    r"best_model\.safetensors",
)
STATE = Subject(
    "save_state",
    lambda folder, version: ck.save_state(folder, version, tiny_state(version), keep=2),
    _load_state_version,
    r"latest|save_\d{6}_step_\d+(/(state\.json|tensors\.safetensors|manifest\.json))?",
)


def _careless(folder: Path, version: int) -> None:
    """The save that everybody writes first: it opens the old file and overwrites it."""
    whole = io.BytesIO()
    with mock.patch.object(ck, "atomic_write", lambda path, chunks: [
            whole.write(chunk) for chunk in chunks]):
        MODEL.save(folder, version)
    path = folder / "best_model.safetensors"
    file = af._disk(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in whole.getvalue()[:2000], whole.getvalue()[2000:]:
            af._disk(os.write, file, part)
    finally:
        os.close(file)


def _unsynced(folder: Path, version: int) -> None:
    """A rename without fsync: safe against a crash of the process, not of the machine."""
    skip = lambda call, *args: None if call is os.fsync else call(*args)
    seam = af._disk
    with mock.patch.object(af, "_disk", lambda call, *args: skip(
            lambda *a: seam(call, *a), *args) if call is not os.fsync else None):
        MODEL.save(folder, version)


CARELESS = Subject("in place", _careless, _load_model_version, MODEL.expected)
UNSYNCED = Subject("no fsync", _unsynced, _load_model_version, MODEL.expected)


# ------------------------------------------------------------------ R2: faults


def _failing(at: int, kind: str, log: list):
    """A `_disk` whose call number `at` fails; a write fails after half of its bytes."""

    def disk(call, *args):
        log.append(call.__name__)
        if len(log) - 1 != at:
            return call(*args)
        if call is os.write:
            call(args[0], args[1][: len(args[1]) // 2])
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    return disk


def tree(folder: Path) -> dict:
    """Every file and folder below, with its bytes."""
    return {p.name: tree(p) if p.is_dir() else p.read_bytes() for p in folder.iterdir()}


def names_in(content: dict, above: str = "") -> list[str]:
    """The paths in a tree."""
    below = {f"{above}{name}": child for name, child in content.items()}
    return [*below, *(path for name, child in below.items() if isinstance(child, dict)
                      for path in names_in(child, f"{name}/"))]


def _killed(subject: Subject, folder: Path, version: int, disk: Callable) -> None:
    """Save in a child that is killed on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fork beside torch's idle threads
        child = os.fork()
    if child == 0:
        try:
            with mock.patch.object(af, "_disk", disk):
                subject.save(folder, version)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


@lru_cache
def _two_saves(subject: Subject) -> dict:
    """What lies in a folder after two saves."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for version in (1, 2):
            subject.save(Path(folder), version)
        return tree(Path(folder))


def calls_of(subject: Subject) -> list[str]:
    """The system calls of one save over existing ones, in order."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        folder, log = Path(temporary), []
        for version in (1, 2):
            subject.save(folder, version)
        with mock.patch.object(af, "_disk", _failing(-1, "", log)):
            subject.save(folder, 3)
        return log


def fault_trial(subject: Subject, at: int, kind: str) -> str:  # "previous" or "new"
    """Fail one call of the third save, look at what is there, and save once more."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder that cannot be synced is only a warning
        folder, log, error = Path(temporary), [], None
        before = _two_saves(subject)
        _put(before, folder)
        disk = _failing(at, kind, log)
        if kind == "kill":
            _killed(subject, folder, 3, disk)
        else:
            try:
                with mock.patch.object(af, "_disk", disk):
                    subject.save(folder, 3)
            except CheckpointError as raised:
                error = raised
        found = subject.load(folder)
        assert found in (2, 3), f"version {found} is there"
        if error is not None:
            assert tree(folder) == before, "an error was raised, yet files have changed"
            assert re.search(r"[\d,]+ bytes are needed, [\d,]+ are free", str(error)), error
        subject.save(folder, 4)
        assert subject.load(folder) == 4, "the next save does not work"
        left = [n for n in names_in(tree(folder)) if not re.fullmatch(subject.expected, n)]
        assert not left, f"left over: {left}"
        return "previous" if found == 2 else "new"


# ------------------------------------------------------------------ R2: power cuts


@dataclass
class Node:
    """A file or a folder, as programs see it and as the disk has it."""

    now: dict | bytes  # folder: name -> Node; file: its bytes
    on_disk: dict | bytes = None

    def sync(self) -> None:
        self.on_disk = dict(self.now) if isinstance(self.now, dict) else self.now


class Recorder:
    """Carries out what a save asks for, and keeps what a power cut at any point may leave.

    A write is on disk after the file's fsync, a name after the folder's fsync; whatever
    was not synced may or may not be there (Pillai et al. 2014)."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.states = folder, {}, []
        self.root = self._read(folder)

    def _read(self, path: Path) -> Node:
        node = Node({p.name: self._read(p) for p in path.iterdir()} if path.is_dir()
                    else path.read_bytes())
        node.sync()
        return node

    def _find(self, path) -> Node:
        node = self.root
        for part in Path(path).relative_to(self.folder).parts:
            node = node.now[part]
        return node

    def __call__(self, call, *args):
        result = call(*args)
        if call is os.open:
            path, flags = Path(args[0]), args[1]
            if flags & os.O_CREAT and path.name not in self._find(path.parent).now:
                self._find(path.parent).now[path.name] = Node(b"", b"")
            elif flags & os.O_TRUNC:
                self._find(path).now = b""
            self.files[result] = self._find(path)
        elif call is os.write:
            self.files[args[0]].now += bytes(args[1][:result])
        elif call is os.fsync:
            self.files[args[0]].sync()
        elif call is os.mkdir:
            self._find(Path(args[0]).parent).now[Path(args[0]).name] = Node({}, {})
        else:  # rename, replace
            source, target = map(Path, args)
            self._find(target.parent).now[target.name] = (
                self._find(source.parent).now.pop(source.name))
        self.states.append(copy.deepcopy(self.root))
        return result


def _left(node: Node, names: str, data: str) -> dict | bytes:
    """What is there after a power cut, if names and data were that lucky."""
    if isinstance(node.now, dict):
        entries = node.now if names == "now" else node.on_disk
        return {name: _left(child, names, data) for name, child in entries.items()}
    return {"now": node.now, "on_disk": node.on_disk, "half": node.now[: len(node.now) // 2]
            if node.now != node.on_disk else node.now}[data]


def _put(content: dict | bytes, path: Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir(exist_ok=True)
    for name, child in content.items():
        _put(child, path / name)


def power_cut_trials(subject: Subject) -> Counter:
    """Cut the power after every call of a save, with every luck; load what is left."""
    found = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        folder = Path(temporary) / "saves"
        folder.mkdir()
        for version in (1, 2):
            subject.save(folder, version)
        recorder = Recorder(folder)
        with mock.patch.object(af, "_disk", recorder):
            subject.save(folder, 3)
        for i, state in enumerate(recorder.states):
            for names in ("now", "on_disk"):
                for data in ("now", "half", "on_disk"):
                    there = Path(temporary) / f"{i}-{names}-{data}"
                    _put(_left(state, names, data), there)
                    try:
                        version = subject.load(there)
                        found["whole" if version in (2, 3) else "lost"] += 1
                    except (CheckpointError, AssertionError):
                        found["lost"] += 1
    return found


# ------------------------------------------------------------------ R3: one attempt


@dataclass
class Attempt:
    """What came of loading one file."""

    name: str
    error: Exception | None
    seconds: float  # processor time
    memory: int  # bytes beyond what was in use before
    size: int  # of the file, or of all files of a save
    events: list = field(default_factory=list)  # audit events that should not be

    @property
    def verdict(self) -> str:
        """"ok", or what is wrong."""
        if type(self.error) is not CheckpointError:
            return f"no CheckpointError but {type(self.error).__name__}: {self.error}"
        if not all((self.error.path, self.error.cause, self.error.cure)):
            return "file, cause or cure is missing"
        text = str(self.error)
        if not text.isprintable() or len(text) > 600 or str(self.error.path) not in text:
            return f"not one line that names the file: {text!r}"
        if self.events:
            return f"it did {self.events[:3]}"
        if self.seconds > 1:
            return f"{self.seconds:.2f} s"
        if self.memory > 2 * self.size + (16 << 20):
            return f"{self.memory:,} bytes for a file of {self.size:,}"
        return "ok"


_watch: list | None = None


def _audit(event: str, args: tuple) -> None:
    if _watch is not None:
        _watch.append((event, args[0] if args else None))


sys.addaudithook(_audit)
HARMLESS = {"os.scandir", "os.listdir", "glob.glob", "glob.glob/2", "pathlib.Path.glob",
            "builtins.id", "object.__getattr__"}  # the last two: inspect.signature


def _strange(events: list, path: Path) -> list:
    """Audit events other than opening this file or looking into this folder."""
    inside = lambda name: isinstance(name, (str, os.PathLike)) and (
        Path(name).absolute().is_relative_to(path.parent.absolute()))
    return [(event, str(arg)[:80]) for event, arg in events
            if event not in HARMLESS and not (event == "open" and inside(arg))]


@contextmanager
def _peak(deep: bool):
    """Most memory in use beyond the start: Python's own count, or the process's."""
    found = [0]
    if deep:
        gc.collect()
        tracemalloc.start()
    status = lambda key: int(re.search(rf"{key}:\s+(\d+)",
                                       Path("/proc/self/status").read_text())[1]) << 10
    linux = Path("/proc/self/clear_refs").exists()
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = status("VmRSS")
    try:
        yield found
    finally:
        if linux:
            found[0] = status("VmHWM") - before
        if deep:
            found[0] = max(found[0], tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()


def attempt(name: str, load: Callable, path: Path, deep: bool = False, again: bool = False) -> Attempt:
    """Load a file that should be refused, and watch what happens."""
    global _watch
    stat = [p.lstat() for p in ([path, *path.rglob("*")] if path.is_dir() else [path])]
    size, error, events = sum(s.st_size for s in stat), None, []
    with _peak(deep) as memory:
        _watch, start = events, time.process_time()
        try:
            load(path)
        except Exception as raised:
            error = raised
        seconds, _watch = time.process_time() - start, None
    if deep:  # counting memory takes time
        return replace(attempt(name, load, path), memory=memory[0])
    found = Attempt(name, error, seconds, memory[0], size, _strange(events, path))
    if seconds > 1 and not again:  # neighbours on the core slow it down; a slow reader stays slow
        found = replace(found, seconds=min(seconds, attempt(name, load, path, again=True).seconds))
    return found


# ------------------------------------------------------------------ R3: mutations


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One random change: flipped, cut, longer, zeroed, swapped or overwritten bytes."""
    a, b = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    few = min(b, a + rng.randint(1, 16))
    noise = rng.randbytes(few - a)
    flip = rng.randrange(len(raw))
    made = rng.choice((
        raw[:flip] + bytes([raw[flip] ^ 1 << rng.randrange(8)]) + raw[flip + 1 :],
        raw[:a], raw[a:], raw[:a] + raw[b:], raw[:a] + noise + raw[few:],
        raw[:a] + bytes(few - a) + raw[few:], raw[:a] + noise + raw[a:],
        raw[:a] + raw[a:b] * 2 + raw[b:], raw + noise, raw[b:] + raw[a:b] + raw[:a],
    ))
    return made if made != raw else mutate(raw, rng)


def mutations(raw: bytes, count: int, seed: int, every: bool):
    """Every truncation and a flip in every byte, if asked for; then random changes."""
    rng = random.Random(seed)
    if every:
        yield from (raw[:n] for n in range(len(raw)))
        for i in range(len(raw)):
            yield raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1 :]
    for _ in range(count):
        yield mutate(raw, rng)


def mutation_trials(folder: Path, count: int, every: bool = False, seed: int = 0):
    """Attempts on a mutated weights file and on each file of a mutated save."""
    weights = ck.save_model(folder / "m.safetensors", tiny_model(), version=1)
    save = ck.save_state(folder / "state", 1, tiny_state(1))
    load_model(weights), load_state(save)  # warm: later imports would be events
    targets = [(weights, load_model, weights)]
    targets += [(save / name, load_state, save) for name in (
        ck._STATE, ck._TENSORS, ck._MANIFEST)]
    for i, (path, load, whole) in enumerate(targets):
        raw = path.read_bytes()
        share = count // 2 if i == 0 else count // 6
        for made in mutations(raw, share, seed + i, every):
            path.write_bytes(made)
            yield attempt(f"{path.name} mutated", load, whole)
        path.write_bytes(raw)
        load(whole)  # the unchanged one still loads: the check can pass


# ------------------------------------------------------------------ R3: by hand


def warm_up(folder: Path) -> None:
    """Load good files once, so that later imports are events."""
    good = ck.save_model(folder / "warm.safetensors", tiny_model(vocab_size=257),
                         byte_tokenizer())
    for path in (good, ck.export_pt(good)):
        load_model(path)
    (folder / "other.pt").write_bytes(torch_zip_with_pickle(b"\x80\x02N."))
    load_state(ck.save_state(folder / "warm", 1, tiny_state(1)))
    for attempted in (folder / "nothing.pt", folder / "warm", folder / "other.pt"):
        try:
            load_model(attempted)
        except CheckpointError:
            pass


def crafted_trials(folder: Path, deep: bool = False):
    """Attempts on everything that was made by hand; `deep` counts Python's memory too."""
    warm_up(folder)
    where = os.getcwd()
    os.chdir(folder)  # code that ran would leave its mark here
    try:
        for name, load, path in crafted(folder):
            yield attempt(name, load, path, deep)
            if (folder / "owned").exists():
                raise AssertionError(f"{name}: code from a file was executed")
    finally:
        os.chdir(where)


# ------------------------------------------------------------------ the report


def report_r2() -> dict:
    outcomes, calls = Counter(), {}
    for subject in (MODEL, STATE):
        calls[subject.name] = calls_of(subject)
        for at in range(len(calls[subject.name])):
            for kind in ("ENOSPC", "EIO", "kill"):
                outcomes[fault_trial(subject, at, kind)] += 1
    cuts = sum((power_cut_trials(subject) for subject in (MODEL, STATE)), Counter())
    assert not cuts["lost"], cuts
    for control in (CARELESS, UNSYNCED):  # the checks can fail
        assert power_cut_trials(control)["lost"]
    return dict(faults=outcomes.total(), kept_previous=outcomes["previous"],
                had_new=outcomes["new"], calls={k: len(v) for k, v in calls.items()},
                power_cuts=cuts.total(), lost=0)


def report_r3(count: int, every: bool) -> dict:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        mutated = list(mutation_trials(Path(folder), count, every))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        by_hand = list(crafted_trials(Path(folder), deep=every))
    bad = [(a.name, a.verdict) for a in mutated + by_hand if a.verdict != "ok"]
    counts = dict(mutations=len(mutated), crafted=len(by_hand))
    return dict(counts=counts, refused=sum(counts.values()) - len(bad), failures=bad,
                slowest_seconds=round(max(a.seconds for a in mutated + by_hand), 3),
                most_memory_over_limit=max(
                    a.memory - 2 * a.size - (16 << 20) for a in mutated + by_hand))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the counts of make test")
    parser.add_argument("--mutations", type=int, metavar="N", help="N random mutations, "
                        "without every truncation, every flip and Python's own memory count")
    args = parser.parse_args()
    quick, few = args.quick, args.mutations or (300 if args.quick else 0)
    r2, r3 = report_r2(), report_r3(few or 4000, every=not few)
    print(f"R2  {r2['faults']} faults and {r2['power_cuts']} power cuts: {r2['lost']} lost")
    counts = r3["counts"]
    print(f"R3  {r3['refused']}/{sum(counts.values())} hostile checkpoints refused "
          f"({counts['mutations']} mutated, {counts['crafted']} crafted), "
          f"slowest {r3['slowest_seconds']} s")
    for name, verdict in r3["failures"]:
        print(f"    {name}: {verdict}")
    if not quick:
        record("reliability_checkpoints", {"R2": r2, "R3": r3})
    sys.exit(bool(r3["failures"]))


if __name__ == "__main__":
    main()
