"""Checkpoints that no one should load: files and saves with one flaw each, made by hand.

`crafted(folder)` writes them and gives (name, how to load it, path). Whatever can be sealed
is sealed again, so that only the flaw itself can give a file away.
"""
import io
import json
import os
import pickle
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from gptbook import checkpoints as ck
from gptbook.checkpoints import load_model, load_state
from gptbook.core import TRANSFORMS, GPTConfig, GPTModel
from gptbook.tokenizer import Tokenizer


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


def torch_zip_with_pickle(raw: bytes) -> bytes:
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
    yield "memory bomb: FloatTensor", torch_zip_with_pickle(
        _calling("torch.FloatTensor", number(1 << 40) + b"\x85"))
    yield "memory bomb: bytearray", torch_zip_with_pickle(
        _calling("builtins.bytearray", number(1 << 40) + b"\x85"))
    yield "time bomb: tuples", torch_zip_with_pickle(
        b"\x80\x02})q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(60)) + b"Ns.")
    yield "deep tuples", torch_zip_with_pickle(b"\x80\x02}N" + b"\x85" * 190_000 + b"Ns.")
    yield "deep lists", torch_zip_with_pickle(b"\x80\x02" + b"]" * 150_000 + b"a" * 149_999 + b".")
    yield "many instructions", torch_zip_with_pickle(b"\x80\x02" + b"N0" * 400_000 + b"N.")
    yield "memo of 2^31", torch_zip_with_pickle(b"\x80\x02Nr\xff\xff\xff\x7f.")
    yield "lying string", torch_zip_with_pickle(b"\x80\x02X\xff\xff\xff\x7fabc.")
    yield "stack below zero", torch_zip_with_pickle(b"\x80\x02RRRR.")
    yield "no end", torch_zip_with_pickle(b"\x80\x02}N")
    yield "empty pickle", torch_zip_with_pickle(b"")
    yield "not a pickle", torch_zip_with_pickle(b"hello")
    yield "stack global", torch_zip_with_pickle(pickle.dumps(touch, 4))
    yield "pickle of 2 MB", torch_zip_with_pickle(b"\x80\x02" + b"N0" * (1 << 20) + b"N.")
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
