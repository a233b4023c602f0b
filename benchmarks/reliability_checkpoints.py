"""Rows R2 and R3 of the reliability scoreboard, one figure a row.

    python benchmarks/reliability_checkpoints.py            the full counts
    python benchmarks/reliability_checkpoints.py --quick    those of `make test`

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
import json
import os
import pickle
import platform
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch

from gptbook import checkpoints as ck
from gptbook.checkpoints import CheckpointError, load_model, load_state
from gptbook.core import TRANSFORMS, GPTConfig, GPTModel
from gptbook.data import Tokenizer

RESULTS = Path(__file__).parent / "results"


def tiny_model(seed: int = 0, **sizes) -> GPTModel:
    """A whole model in about a kilobyte."""
    torch.manual_seed(seed)
    small = dict(vocab_size=16, context_length=4, emb_dim=4, n_layers=1, n_heads=2)
    return GPTModel(GPTConfig(**{**small, **sizes}))


def byte_tokenizer() -> Tokenizer:
    """256 bytes and an end of text."""
    return Tokenizer("bytes", {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256})


def tiny_state(version: int) -> dict:
    """A small state of every kind of value; `version` says which save it was."""
    torch.manual_seed(version)
    return {"version": version, "w": torch.randn(3, 4), "half": torch.randn(5).bfloat16(),
            "moments": {0: {"m": torch.randn(3, 4), "step": torch.tensor(float(version))}},
            "rng": torch.get_rng_state()[:64], "flags": torch.tensor([True, False]),
            "betas": (0.9, 0.95), "best": float("inf"), "history": [0.5] * 40}


# ------------------------------------------------------------------ R2: what is saved


@dataclass(frozen=True)
class Subject:
    """A way to save numbered versions into a folder, and to tell which one is there."""

    name: str
    save: Callable  # (folder, version)
    load: Callable  # (folder) -> version
    expected: Callable  # (folder) -> what may lie there: a regular expression


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
    file = ck._disk(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in whole.getvalue()[:2000], whole.getvalue()[2000:]:
            ck._disk(os.write, file, part)
    finally:
        os.close(file)


def _unsynced(folder: Path, version: int) -> None:
    """A rename without fsync: safe against a crash of the process, not of the machine."""
    skip = lambda call, *args: None if call is os.fsync else call(*args)
    seam = ck._disk
    with mock.patch.object(ck, "_disk", lambda call, *args: skip(
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
            with mock.patch.object(ck, "_disk", disk):
                subject.save(folder, version)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


@lru_cache
def _two_saves(subject: Subject) -> dict:
    """What lies in a folder after two saves."""
    with tempfile.TemporaryDirectory() as folder:
        for version in (1, 2):
            subject.save(Path(folder), version)
        return tree(Path(folder))


def calls_of(subject: Subject) -> list[str]:
    """The system calls of one save over existing ones, in order."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary), []
        for version in (1, 2):
            subject.save(folder, version)
        with mock.patch.object(ck, "_disk", _failing(-1, "", log)):
            subject.save(folder, 3)
        return log


def fault_trial(subject: Subject, at: int, kind: str) -> str:  # "previous" or "new"
    """Fail one call of the third save, look at what is there, and save once more."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder that cannot be synced is only a warning
        folder, log, error = Path(temporary), [], None
        before = _two_saves(subject)
        _put(before, folder)
        disk = _failing(at, kind, log)
        if kind == "kill":
            _killed(subject, folder, 3, disk)
        else:
            try:
                with mock.patch.object(ck, "_disk", disk):
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saves"
        folder.mkdir()
        for version in (1, 2):
            subject.save(folder, version)
        recorder = Recorder(folder)
        with mock.patch.object(ck, "_disk", recorder):
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


def attempt(name: str, load: Callable, path: Path, deep: bool = False) -> Attempt:
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
    return Attempt(name, error, seconds, memory[0], size, _strange(events, path))


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


def parts(raw: bytes) -> tuple[dict, dict, bytes]:
    """Header, metadata and data of one of our weights files."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["gptbook"]), raw[8 + length :]


def whole(header, meta, data: bytes, text: str | None = None) -> bytes:
    """A weights file with a valid checksum, whatever is in it."""
    meta = json.dumps({**meta, "sha256": ck._BLANK}) if isinstance(meta, dict) else meta
    if meta is not None:
        header = {"__metadata__": {"gptbook": meta}, **header}
    text = (text or json.dumps(header)).encode()
    return b"".join(ck._seal([len(text).to_bytes(8, "little") + text, data]))


def _first(header: dict) -> dict:
    return header["tok_emb.weight"]


def raw_cases(raw: bytes):
    """Whole files that are no checkpoint, or whose frame is broken."""
    head = lambda n, rest=b"": struct.pack("<Q", n) + rest
    framed = lambda text: head(len(text), text)
    length = int.from_bytes(raw[:8], "little")
    yield from {
        "empty": b"", "one byte": b"{", "seven bytes": bytes(7), "eight zeros": bytes(8),
        "header longer than the file": head(1 << 20, b"{}"), "length 2^63": head(1 << 63, raw),
        "length 2^64-1": head((1 << 64) - 1, raw), "length 0": head(0, raw[8:]),
        "length one less": head(length - 1, raw[8:]),
        "length one more": head(length + 1, raw[8:]), "half": raw[: len(raw) // 2],
        "one byte short": raw[:-1], "one byte more": raw + b"\0", "twice": raw + raw,
        "zeros after": raw + bytes(4096), "not JSON": framed(b"{'a': 1}"),
        "a list": framed(b"[]"), "a text": framed(b'"abc"'), "null": framed(b"null"),
        "a number": framed(b"1e999"), "not UTF-8": framed(b'{"\xff\xfe": 1}'),
        "UTF-16": framed('{"a": {}}'.encode("utf-16")),
        "byte order mark": framed(b"\xef\xbb\xbf{}"), "cut JSON": framed(b'{"a": {"dty'),
        "deep list": framed(b"[" * 100_000), "deep dict": framed(b'{"a":' * 100_000),
        "long number": framed(b'{"a": ' + b"9" * 100_000 + b"}"),
        "key twice": framed(b'{"a": {}, "a": {}}'),
        "metadata twice": framed(b'{"__metadata__": {}, "__metadata__": {}}'),
        "many lists": framed(b"[" + b"[]," * 1_300_000 + b"[]]"),
        "many dicts": framed(b"[" + b"{}," * 1_300_000 + b"{}]"),
        "many numbers": framed(b"[" + b"1," * 2_000_000 + b"1]"),
        "many tensors": framed(json.dumps({str(i): dict(
            dtype="U8", shape=[0], data_offsets=[0, 0]) for i in range(60_000)}).encode()),
        "header over the limit": framed(b"{" + b" " * (5 << 20) + b"}"),
        "text file": b"Once upon a time there was a little girl.\n" * 50,
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(500), "gzip": b"\x1f\x8b\x08" + bytes(500),
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>", "GGUF": b"GGUF\3\0\0\0" + raw,
        "all zeros": bytes(1 << 20), "noise": random.Random(0).randbytes(1 << 20),
        "pickle magic": b"\x80\x02" + raw[2:],
    }.items()


HEADER_EDITS = {  # name -> change of (header, data); may return other data
    "no dtype": lambda h, d: _first(h).pop("dtype"),
    "extra key": lambda h, d: _first(h).update(note="x"),
    "unknown dtype": lambda h, d: _first(h).update(dtype="F31"),
    "small dtype": lambda h, d: _first(h).update(dtype="f32"),
    "dtype a list": lambda h, d: _first(h).update(dtype=["F32"]),
    "dtype null": lambda h, d: _first(h).update(dtype=None),
    "negative shape": lambda h, d: _first(h).update(shape=[-16, -4]),
    "float shape": lambda h, d: _first(h).update(shape=[16.0, 4]),
    "true shape": lambda h, d: _first(h).update(shape=[True, 64]),
    "text shape": lambda h, d: _first(h).update(shape="16"),
    "null shape": lambda h, d: _first(h).update(shape=None),
    "nested shape": lambda h, d: _first(h).update(shape=[[16, 4]]),
    "huge shape": lambda h, d: _first(h).update(shape=[1 << 40, 1 << 40]),
    "nine axes": lambda h, d: _first(h).update(shape=[16, 4] + [1] * 9),
    "zero times huge": lambda h, d: h.update(x=dict(
        dtype="F32", shape=[0, 1 << 60], data_offsets=[len(d)] * 2)),
    "other shape": lambda h, d: _first(h).update(shape=[8, 8]),
    "transposed": lambda h, d: _first(h).update(shape=[4, 16]),
    "flat": lambda h, d: _first(h).update(shape=[64]),
    "smaller shape": lambda h, d: _first(h).update(shape=[15, 4]),
    "half the bytes": lambda h, d: _first(h).update(dtype="F16"),
    "integers": lambda h, d: _first(h).update(dtype="I32"),
    "offsets reversed": lambda h, d: _first(h)["data_offsets"].reverse(),
    "offsets overlap": lambda h, d: _first(h).update(data_offsets=[0, 256]),
    "offsets past the end": lambda h, d: _first(h).update(
        data_offsets=[len(d), len(d) + 256]),
    "negative offsets": lambda h, d: _first(h).update(data_offsets=[-256, 0]),
    "float offsets": lambda h, d: _first(h).update(data_offsets=[0.0, 256.0]),
    "three offsets": lambda h, d: _first(h).update(data_offsets=[0, 128, 256]),
    "text offsets": lambda h, d: _first(h).update(data_offsets="ab"),
    "huge offsets": lambda h, d: _first(h).update(data_offsets=[0, 1 << 62]),
    "entry a list": lambda h, d: h.update({"tok_emb.weight": ["F32", [16, 4], [0, 256]]}),
    "entry null": lambda h, d: h.update({"tok_emb.weight": None}),
    "hole": lambda h, d: d + bytes(64),
    "odd bool": lambda h, d: (h.update(x=dict(
        dtype="BOOL", shape=[2], data_offsets=[len(d), len(d) + 2])), d + b"\1\2")[1],
    "missing tensor": lambda h, d: _drop_last(h, d),
    "extra tensor": lambda h, d: _add(h, d, "blocks.0.attn.W_gate.weight"),
    "extra layer": lambda h, d: _add(h, d, "blocks.1.norm1.weight"),
    "another head": lambda h, d: _add(h, d, "head.weight", [16, 4]),
    "renamed": lambda h, d: h.update(token_embedding=h.pop("tok_emb.weight")),
    "name with ../": lambda h, d: _add(h, d, "../../etc/passwd"),
    "name with NUL": lambda h, d: _add(h, d, "a\0b"),
    "name with escapes": lambda h, d: _add(h, d, "\x1b[2J\x1b]0;owned\x07\n\n"),
    "lone surrogate": lambda h, d: _add(h, d, "\ud800"),
    "name of 100,000": lambda h, d: _add(h, d, "x" * 100_000),
    "NaN": lambda h, d: struct.pack("<f", float("nan")) + d[4:],
    "infinity": lambda h, d: d[:-4] + struct.pack("<f", float("inf")),
    "minus infinity": lambda h, d: d[:40] + struct.pack("<f", float("-inf")) + d[44:],
}


def _drop_last(header: dict, data: bytes) -> bytes:
    name = max(header, key=lambda n: header[n]["data_offsets"])
    return data[: header.pop(name)["data_offsets"][0]]


def _add(header: dict, data: bytes, name: str, shape=(4,)) -> bytes:
    more = 4 * torch.Size(shape).numel()
    header[name] = dict(dtype="F32", shape=list(shape),
                        data_offsets=[len(data), len(data) + more])
    return data + bytes(more)


def _config(**changes) -> Callable:
    return lambda meta: meta["config"].update(changes)


META_EDITS = {
    **{f"no {key}": lambda meta, key=key: meta.pop(key)
       for key in ("format", "config", "transforms", "custom", "tokenizer", "info")},
    **{f"{key} a number": lambda meta, key=key: meta.update({key: 7})
       for key in ("format", "config", "transforms", "custom", "tokenizer", "info")},
    "format 2": lambda meta: meta.update(format=2), "extra key": lambda m: m.update(run="ls"),
    "config a list": lambda m: m.update(config=list(m["config"].items())),
    "unknown size": _config(hidden_size=4), "code as a size": _config(**{"__class__": "x"}),
    "no vocab_size": lambda m: m["config"].pop("vocab_size"),
    "10^9 layers": _config(n_layers=10**9), "10^30 layers": _config(n_layers=10**30),
    "no layers": _config(n_layers=0), "-1 layers": _config(n_layers=-1),
    "2 layers": _config(n_layers=2), "2.5 layers": _config(n_layers=2.5),
    "layers as text": _config(n_layers="1"), "true layers": _config(n_layers=True),
    "null layers": _config(n_layers=None), "vocabulary 10^9": _config(vocab_size=10**9),
    "vocabulary 2^62": _config(vocab_size=1 << 62), "vocabulary 17": _config(vocab_size=17),
    "width 10^9": _config(emb_dim=10**9), "width 2^40": _config(emb_dim=1 << 40),
    "width 8": _config(emb_dim=8), "context 10^9": _config(context_length=10**9),
    "context 5": _config(context_length=5), "3 heads": _config(n_heads=3),
    "0 heads": _config(n_heads=0), "10^9 heads": _config(n_heads=10**9),
    "3 kv heads": _config(n_kv_heads=3), "1 kv head": _config(n_kv_heads=1),
    "dropout 2": _config(drop_rate=2), "dropout NaN": _config(drop_rate=float("nan")),
    "dropout as text": _config(drop_rate="0.1"), "bias as text": _config(bias="yes"),
    "no bias": _config(bias=False), "untied": _config(tied=False),
    "unknown recipe": _config(recipe="gpt5"), "recipe null": _config(recipe=None),
    "recipe a path": _config(recipe="os.system"), "recipe a dict": _config(recipe={}),
    "recipe as code": _config(recipe="__import__('os').system('touch owned')"),
    "unknown option": _config(options={"window": 4}), "options a list": _config(options=[1]),
    "options deep": _config(options={"a": [[[[{}]]]]}),
    "option of dunder": _config(options={"__globals__": 1}),
    "unknown transform": lambda m: m.update(transforms=[["os.system", {"command": "ls"}]]),
    "transform as text": lambda m: m.update(transforms=["lora"]),
    "transform of three": lambda m: m.update(transforms=[["probe", {}, 1]]),
    "transform a dict": lambda m: m.update(transforms=[{"probe": {}}]),
    "transform options a list": lambda m: m.update(transforms=[["probe", [8]]]),
    "unknown transform option": lambda m: m.update(transforms=[["probe", {"q": 1}]]),
    "transform of rank 10^9": lambda m: m.update(transforms=[["probe", {"rank": 10**9}]]),
    "transform 10^9 times": lambda m: m.update(transforms=[["probe", {"times": 10**9}]]),
    "transform not in the file": lambda m: m.update(transforms=[["probe", {}]]),
    "5,000 transforms": lambda m: m.update(transforms=[["probe", {}]] * 5000),
    "unknown slot": lambda m: m.update(custom=["__init__"]),
    "slot by hand": lambda m: m.update(custom=["norm"]),
    "slot a number": lambda m: m.update(custom=[1]),
    "slot nested": lambda m: m.update(custom=[["norm"]]),
    "tokenizer empty": lambda m: m.update(tokenizer={}),
    "tokenizer a list": lambda m: m.update(tokenizer=["a", "b"]),
    "tokenizer of dunder": lambda m: m.update(tokenizer={"__reduce__": "os.system"}),
    "tokenizer without bytes": lambda m: m["tokenizer"].update(tokens=["a", "b"]),
    "tokenizer with numbers": lambda m: m["tokenizer"].update(tokens=[1] * 256),
    "tokenizer of dicts": lambda m: m["tokenizer"].update(tokens=[{}] * 257),
    "token twice": lambda m: m["tokenizer"]["tokens"].__setitem__(1, "\0"),
    "tokenizer's own regex": lambda m: m["tokenizer"].update(pattern="(a+)+$"),
    "tokenizer beyond the model": lambda m: m["tokenizer"]["tokens"].append("once"),
    "token no byte": lambda m: m["tokenizer"]["tokens"].__setitem__(5, "\u20ac"),
    "special token a plain one": lambda m: m["tokenizer"].update(
        special_tokens={"a": 256}),
    "special id far away": lambda m: m["tokenizer"].update(
        special_tokens={"<|endoftext|>": 1 << 40}),
    "100,000 tokens": lambda m: m["tokenizer"].update(
        tokens=[str(i) for i in range(100_000)]),
}


class _Code:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def _torch_zip(edit=None, **held) -> bytes:
    """What torch.save writes, with its entries changed by `edit(name, bytes)`."""
    torch.save(held, buffer := io.BytesIO())
    if edit is None:
        return buffer.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            for name, content in edit(entry.filename, old.read(entry)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the same name twice
                    new.writestr(name, content)
    return out.getvalue()


def _with_pickle(raw: bytes) -> bytes:
    """A torch zip whose data.pkl is this."""
    return _torch_zip(lambda name, old: [(name, raw if name.endswith("data.pkl") else old)],
                      w=torch.zeros(4))


def _calling(name: str, args: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + args + b"R."


def _compressed(raw: bytes, fill: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry) + bytes(fill))
    return out.getvalue()


def pt_cases(model: GPTModel):
    """Pickles and zip files: what a .pt file may hold, or pretend to."""
    config = {k: v for k, v in vars(model.config).items()}
    good = dict(config=config, model_state_dict=model.state_dict())
    state = good["model_state_dict"]
    raw = _torch_zip(**good)
    touch = _Code(os.system, "touch owned")
    for protocol in range(6):
        yield f"pickle of protocol {protocol}", pickle.dumps(touch, protocol)
    codes = {"os.system": touch, "exec": _Code(exec, "open('owned', 'w')"),
             "eval": _Code(eval, "open('owned', 'w')"), "open": _Code(open, "owned", "w"),
             "__import__": _Code(__import__, "antigravity"),
             "getattr": _Code(getattr, "", "join"),
             "bytearray": _Code(bytearray, 10**11)}
    for name, code in codes.items():
        yield f"{name} in a torch zip", _torch_zip(**good, extra=code)
    torch.save({**good, "x": touch}, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    yield "torch.save of before 1.6", old.getvalue()
    number = lambda n: b"\x8a\x06" + n.to_bytes(6, "little")
    yield "memory bomb: FloatTensor", _with_pickle(
        _calling("torch.FloatTensor", number(1 << 40) + b"\x85"))
    yield "memory bomb: bytearray", _with_pickle(
        _calling("builtins.bytearray", number(1 << 40) + b"\x85"))
    yield "time bomb: tuples", _with_pickle(
        b"\x80\x02})q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(60)) + b"Ns.")
    yield "deep tuples", _with_pickle(b"\x80\x02}N" + b"\x85" * 190_000 + b"Ns.")
    yield "deep lists", _with_pickle(b"\x80\x02" + b"]" * 150_000 + b"a" * 149_999 + b".")
    yield "many instructions", _with_pickle(b"\x80\x02" + b"N0" * 400_000 + b"N.")
    yield "memo of 2^31", _with_pickle(b"\x80\x02Nr\xff\xff\xff\x7f.")
    yield "lying string", _with_pickle(b"\x80\x02X\xff\xff\xff\x7fabc.")
    yield "stack below zero", _with_pickle(b"\x80\x02RRRR.")
    yield "no end", _with_pickle(b"\x80\x02}N")
    yield "empty pickle", _with_pickle(b"")
    yield "not a pickle", _with_pickle(b"hello")
    yield "stack global", _with_pickle(pickle.dumps(touch, 4))
    yield "pickle of 2 MB", _with_pickle(b"\x80\x02" + b"N0" * (1 << 20) + b"N.")
    yield "zip bomb", _compressed(raw, 10 << 20)
    yield "compressed", _compressed(raw)
    lie = lambda name, old: [(name, old[: len(old) // 2] if "/data/" in name else old)]
    yield "storages cut", _torch_zip(lie, **good)
    yield "entries twice", _torch_zip(lambda n, old: [(n, old)] * 2, **good)
    yield "two pickles", _torch_zip(lambda n, old: [(n, old), (f"b/{n}", old)], **good)
    yield "no pickle", _torch_zip(
        lambda n, old: [] if n.endswith("data.pkl") else [(n, old)], **good)
    yield "entries with ../", _torch_zip(
        lambda n, old: [(f"../../{n}", old)] if "/data/" in n else [(n, old)], **good)
    yield "empty zip", b"PK\5\6" + bytes(18)
    yield "zip with a comment", raw[:-2] + b"\4\0nice"
    yield "zip without its end", raw[:-30]
    yield "zip directory elsewhere", raw[:-34] + (5).to_bytes(8, "little") + raw[-26:]
    yield "zip of 50,000 files", _many_files()
    yield "flipped weight", raw.replace(b"\0\0\x80\x3f", b"\0\0\x81\x3f", 1)
    big = {**state, "tok_emb.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}
    yield "one number a thousand times", _torch_zip(config=config, model_state_dict=big)
    shared = torch.zeros(20_000)
    many = {f"t{i}": shared[i : i + 10_000] for i in range(5000)}
    yield "5,000 views of one storage", _torch_zip(config=config, model_state_dict=many)
    sparse = {**state, "tok_emb.weight": torch.eye(4).to_sparse()}
    yield "sparse", _torch_zip(config=config, model_state_dict=sparse)
    meta = {**state, "tok_emb.weight": torch.empty(16, 4, device="meta")}
    yield "meta", _torch_zip(config=config, model_state_dict=meta)
    yield "complex", _torch_zip(config=config, model_state_dict={
        **state, "tok_emb.weight": torch.zeros(16, 4, dtype=torch.complex64)})
    yield "NaN in .pt", _torch_zip(config=config, model_state_dict={
        **state, "norm.weight": torch.full((4,), float("nan"))})
    yield "no config", _torch_zip(model_state_dict=state)
    yield "config a list", _torch_zip(config=[1], model_state_dict=state)
    yield "config of tensors", _torch_zip(config={"n_layers": torch.ones(1)},
                                          model_state_dict=state)
    yield "config of 10^9 layers", _torch_zip(config={**config, "n_layers": 10**9},
                                              model_state_dict=state)
    yield "no state", _torch_zip(config=config)
    yield "state a list", _torch_zip(config=config, model_state_dict=[1, 2])
    yield "state of lists", _torch_zip(config=config, model_state_dict={"a": [1]})
    yield "state with numbers as names", _torch_zip(
        config=config, model_state_dict={1: torch.ones(1)})
    yield "only a tensor", _torch_list(torch.ones(3))
    yield "gptbook key as a number", _torch_zip(**good, gptbook=7)
    yield "gptbook key no JSON", _torch_zip(**good, gptbook="{")
    yield "other model", _torch_zip(config={**config, "emb_dim": 8}, model_state_dict=state)


def _torch_list(held) -> bytes:
    torch.save(held, buffer := io.BytesIO())
    return buffer.getvalue()


def _many_files() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for i in range(50_000):
            new.writestr(f"a/{i}", b"")
    return out.getvalue()


def odd_paths(folder: Path, good: Path):
    """Things in the place of a file that are no file."""
    for name, make in {
        "a folder": lambda p: p.mkdir(), "a pipe": lambda p: os.mkfifo(p),
        "a device": lambda p: p.symlink_to("/dev/zero"),
        "a link to nothing": lambda p: p.symlink_to("nothing"),
        "a link to itself": lambda p: p.symlink_to(p.name),
        "a sparse terabyte": lambda p: _sparse(p, good),
    }.items():
        make(path := folder / f"{name}.safetensors")
        yield name, path


def _sparse(path: Path, good: Path) -> None:
    """A terabyte that takes no room, with a header that covers it."""
    header, meta, data = parts(good.read_bytes())
    _first(header).update(shape=[1 << 36, 4], data_offsets=[0, 1 << 40])
    header = {"tok_emb.weight": _first(header)}
    meta["config"].update(vocab_size=1 << 30)
    raw = whole(header, meta, b"")
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + (1 << 40))


def _resealed(save: Path, **changes) -> None:
    """Replace files of a save and write a manifest with the right sums over them."""
    for name, content in changes.items():
        (save / {"state": ck._STATE, "tensors": ck._TENSORS}[name]).write_bytes(content)
    manifest = json.loads((save / ck._MANIFEST).read_text())
    manifest["files"] = {name: ck._digest([(save / name).read_bytes()])
                         for name in (ck._STATE, ck._TENSORS)}
    _manifest(save, manifest)


def _manifest(save: Path, content: dict) -> None:
    raw = json.dumps({**content, "sha256": ck._BLANK}).encode()
    (save / ck._MANIFEST).write_bytes(b"".join(ck._seal([raw])))


def _edit_manifest(change: Callable) -> Callable:
    def edit(save: Path) -> None:
        content = json.loads((save / ck._MANIFEST).read_text())
        change(content)
        _manifest(save, content)
    return edit


def _to_link(name: str) -> Callable:
    """The same bytes, but behind a link that leaves the folder."""
    def edit(save: Path) -> None:
        shutil.move(save / name, away := save.parent / f"{save.name}.{name}")
        (save / name).symlink_to(away)
    return edit


def _state_json(text: bytes) -> Callable:
    return lambda save: _resealed(save, state=text)


def _tensors(change: Callable) -> Callable:
    return lambda save: _resealed(save, tensors=change((save / ck._TENSORS).read_bytes()))


STATE_EDITS = {
    "manifest no JSON": lambda s: (s / ck._MANIFEST).write_bytes(b"{"),
    "manifest a list": lambda s: (s / ck._MANIFEST).write_bytes(b"[]"),
    "manifest empty": lambda s: (s / ck._MANIFEST).write_bytes(b""),
    "manifest of 5 MB": lambda s: (s / ck._MANIFEST).write_bytes(b" " * (5 << 20)),
    "manifest unsealed": lambda s: (s / ck._MANIFEST).write_bytes(json.dumps(
        {**json.loads((s / ck._MANIFEST).read_text()), "step": 2}).encode()),
    "manifest of format 2": _edit_manifest(lambda m: m.update(format=2)),
    "manifest with ../": _edit_manifest(lambda m: m["files"].update(
        {"../../etc/passwd": "0" * 64})),
    "manifest only ../": _edit_manifest(lambda m: m.update(files={
        "../" + name: value for name, value in m["files"].items()})),
    "manifest with /etc/passwd": _edit_manifest(lambda m: m.update(
        files={"/etc/passwd": "0" * 64})),
    "manifest without files": _edit_manifest(lambda m: m.update(files={})),
    "manifest files a list": _edit_manifest(lambda m: m.update(files=list(m["files"]))),
    "manifest sum a number": _edit_manifest(lambda m: m["files"].update({ck._STATE: 1})),
    "manifest sum wrong": _edit_manifest(lambda m: m["files"].update({ck._STATE: "0" * 64})),
    "sums swapped": _edit_manifest(lambda m: m.update(files=dict(
        zip(m["files"], reversed(m["files"].values()))))),
    "manifest a folder": lambda s: ((s / ck._MANIFEST).unlink(), (s / ck._MANIFEST).mkdir()),
    **{f"{name} missing": lambda s, name=name: (s / name).unlink()
       for name in (ck._STATE, ck._TENSORS, ck._MANIFEST)},
    **{f"{name} a link": _to_link(name) for name in (ck._STATE, ck._TENSORS, ck._MANIFEST)},
    "files swapped": lambda s: _resealed(s, state=(s / ck._TENSORS).read_bytes(),
                                         tensors=(s / ck._STATE).read_bytes()),
    "state empty": _state_json(b""), "state not UTF-8": _state_json(b'{"\xff": 1}'),
    "state deep": _state_json(b"[" * 50_000 + b"]" * 50_000),
    "state deep, closed": _state_json(b"[" * 900 + b"]" * 901),
    "state key twice": _state_json(b'{"a": 1, "a": 2}'),
    "state of 5 MB": _state_json(b'"' + b"a" * (5 << 20) + b'"'),
    "state of many lists": _state_json(b"[" + b"[]," * 1_000_000 + b"[]]"),
    "unknown tensor": _state_json(b'{"a": {"$tensor": "nothing"}}'),
    "tensor a list": _state_json(b'{"a": {"$tensor": ["w"]}}'),
    "tensor null": _state_json(b'{"a": {"$tensor": null}}'),
    "list of two axes": _state_json(b'{"a": {"$list": "w"}}'),
    "list unknown": _state_json(b'{"a": {"$list": "nothing"}}'),
    "tuple of a number": _state_json(b'{"a": {"$tuple": 7}}'),
    "tuple of a text": _state_json(b'{"a": {"$tuple": "abc"}}'),
    "dict of numbers": _state_json(b'{"a": {"$dict": [1, 2]}}'),
    "dict with list keys": _state_json(b'{"a": {"$dict": [[[], 1]]}}'),
    "unknown tag": _state_json(b'{"a": {"$eval": "1 + 1"}}'),
    "two tags": _state_json(b'{"a": {"$tensor": "w", "$list": "w"}}'),
    "tensors cut": _tensors(lambda raw: raw[:-5]),
    "tensors longer": _tensors(lambda raw: raw + b"\0"),
    "tensors empty": _tensors(lambda raw: b""),
    "tensors a pickle": _tensors(lambda raw: pickle.dumps(_Code(os.system, "touch owned"))),
    "tensors a zip": _tensors(lambda raw: _torch_zip(w=torch.ones(3))),
    "tensors with a hole": _tensors(lambda raw: raw.replace(b'"data_offsets":[0,',
                                                            b'"data_offsets":[1,')),
}


def crafted(folder: Path):
    """(name, load, path) of every hostile checkpoint made by hand."""
    TRANSFORMS["probe"] = _probe
    good = ck.save_model(folder / "good.safetensors", tiny_model(vocab_size=257),
                         byte_tokenizer())
    raw = good.read_bytes()
    files = list(raw_cases(raw))
    for name, edit in HEADER_EDITS.items():
        header, meta, data = parts(ck.save_model(
            folder / "bare.safetensors", tiny_model()).read_bytes())
        made = edit(header, data)
        files.append((name, whole(header, meta, made if isinstance(made, bytes) else data)))
    for name, edit in META_EDITS.items():
        header, meta, data = parts(raw)
        edit(meta)
        files.append((f"metadata: {name}", whole(header, meta, data)))
    header, meta, data = parts(raw)
    files += [
        ("metadata: not JSON", whole(header, "{", data)),
        ("metadata: a list", whole(header, "[]", data)),
        ("metadata: no checksum", whole(header, json.dumps(
            {k: v for k, v in meta.items() if k != "sha256"}), data)),
        *((f"metadata: checksum {seal!r:.20}", whole(header, json.dumps(
            {**meta, "sha256": seal}), data)) for seal in (
            "", 0, None, "0" * 63, "Z" * 64, "f" * 64, "a" * 1000)),
        ("metadata: key twice", whole(header, json.dumps(meta)[:-1] + ', "format": 1}', data)),
        ("metadata: foreign", whole(header, None, data)),
        ("metadata: a number", whole({**header, "__metadata__": {"a": 1}}, None, data)),
        ("metadata: no dict", whole({**header, "__metadata__": [1]}, None, data)),
    ]
    files += [(f"pt: {name}", made) for name, made in pt_cases(tiny_model())]
    for i, (name, content) in enumerate(files):
        path = folder / f"{i}.{'pt' if i % 2 and name[:2] == 'pt' else 'safetensors'}"
        path.write_bytes(content)
        yield name, load_model, path
    yield from ((name, load_model, path) for name, path in odd_paths(folder, good))
    for i, (name, edit) in enumerate(STATE_EDITS.items()):
        edit(save := ck.save_state(folder / f"state{i}", 1, tiny_state(1)))
        yield f"state: {name}", load_state, save


def _probe(model: GPTModel, rank: int = 2, times: int = 1) -> None:
    """A transform that adds matrices, as LoRA does."""
    for i in range(times):
        model.register_parameter(f"probe{i}", torch.nn.Parameter(torch.zeros(rank, 4)))
    model.transforms.append(["probe", {"rank": rank, "times": times}])


def warm_up(folder: Path) -> None:
    """Load good files once, so that later imports are events."""
    good = ck.save_model(folder / "warm.safetensors", tiny_model(vocab_size=257),
                         byte_tokenizer())
    for path in (good, ck.export_pt(good)):
        load_model(path)
    (folder / "other.pt").write_bytes(_with_pickle(b"\x80\x02N."))
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
    with tempfile.TemporaryDirectory() as folder:
        mutated = list(mutation_trials(Path(folder), count, every))
    with tempfile.TemporaryDirectory() as folder:
        by_hand = list(crafted_trials(Path(folder), deep=every))
    bad = [(a.name, a.verdict) for a in mutated + by_hand if a.verdict != "ok"]
    return dict(mutations=len(mutated), crafted=len(by_hand), refused=len(mutated)
                + len(by_hand) - len(bad), failures=bad,
                slowest_seconds=round(max(a.seconds for a in mutated + by_hand), 3),
                most_memory_over_limit=max(
                    a.memory - 2 * a.size - (16 << 20) for a in mutated + by_hand))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the counts of make test")
    quick = parser.parse_args().quick
    r2, r3 = report_r2(), report_r3(300 if quick else 4000, not quick)
    print(f"R2  {r2['faults']} faults and {r2['power_cuts']} power cuts: {r2['lost']} lost")
    total = r3["mutations"] + r3["crafted"]
    print(f"R3  {r3['refused']}/{total} hostile checkpoints refused ({r3['mutations']} "
          f"mutated, {r3['crafted']} crafted), slowest {r3['slowest_seconds']} s")
    for name, verdict in r3["failures"]:
        print(f"    {name}: {verdict}")
    if not quick:
        result = dict(
            name="reliability of checkpoints", date=str(date.today()), R2=r2, R3=r3,
            command="python benchmarks/reliability_checkpoints.py",
            machine=dict(processor=platform.machine(), threads=torch.get_num_threads()),
            versions=dict(python=platform.python_version(), torch=torch.__version__))
        RESULTS.mkdir(exist_ok=True)
        ck.atomic_write(RESULTS / "reliability_checkpoints.json",
                        json.dumps(result, indent=1).encode() + b"\n")
    sys.exit(bool(r3["failures"]))


if __name__ == "__main__":
    main()
