"""What the tests of the commands share: a folder with everything that lies around, and the
contract that every bad call is held to (R17): exit 2, two or three lines, nothing written."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from gptbook.checkpoints import load_model, save_model
from gptbook.cli import commands, main
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.tokenizer import train_bpe

ROOT = Path(__file__).parents[1]
GPTBOOK = str(Path(sys.executable).with_name("gptbook"))
TEXT = "The cat sat on the mat. It was fluffy. " * 60
FAST = "--preset tiny --precision fp32 --sample-every 0 --context-length 16 --batch-size 2"


def command(name: str):
    """A command of the group, by its name."""
    return commands.get_command(None, name)


def tiny_model(context_length: int = 32) -> tuple:
    set_seed(0)
    tokenizer = train_bpe(TEXT, 280)
    return GPTModel(GPTConfig(tokenizer.n_vocab, context_length, 16, 1, 2)), tokenizer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with everything that a careless user has lying around."""
    folder = tmp_path_factory.mktemp("workspace")
    model, tokenizer = tiny_model()
    info = dict(epoch=1.5, step=30, validation_loss=2.5)
    save_model(folder / "best_model.safetensors", model, tokenizer, **info)
    save_model(folder / "mute.safetensors", model, **info)
    good = (folder / "best_model.safetensors").read_bytes()
    made = {
        "empty.txt": b"", "good.txt": TEXT.encode(), "one.txt": b"a",
        "binary.bin": bytes(range(256)) * 9, "latin.txt": "déjà vu ".encode("latin-1") * 99,
        "empty.safetensors": b"", "cut.safetensors": good[:-100], "text.safetensors": b"hello",
        "flipped.safetensors": good[:-9] + b"\x77" + good[-8:], "there.pt": b"precious",
        "hostile.pt": b"\x80\x04cposix\nsystem\n(X\x04\x00\x00\x00exit\x85R.",
        "other_shape.safetensors": good.replace(b'\\"emb_dim\\": 16', b'\\"emb_dim\\": 32'),
        "blank.txt": b" \n\n \n", "schema.json": b'{"type": "boolean"}', "list.json": b"[1]",
        "unknown.json": b'{"type": "date"}', "deep.json": b"[" * 100_000,
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    assert made["other_shape.safetensors"] != good
    (folder / "folder").mkdir()
    (folder / "run").mkdir()
    settings = command("train").make_context("train", []).params
    run = dict(settings={**settings, "data": "good.txt", "steps": 5}, steps=5, text="another",
               precision="float32", tokenizer=tokenizer.to_dict())
    (folder / "run" / "run.json").write_text(json.dumps(run))
    for name, content in {"damaged": "{", "foreign": "[1, 2]", "bare": "{}"}.items():
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(content)
    return folder


@pytest.fixture
def here(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


def listing(folder: Path) -> dict:
    """Everything in a folder, by name, with size and time."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def check_bad(capsys, folder: Path, words: list) -> str:
    """Run one bad call and hold it to the contract; returns what it said."""
    before = listing(folder)
    code = main(words)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert code == 2, f"exit {code}: {said.out}{said.err}"
    assert 2 <= len(lines) <= 3 and lines[-2].startswith("Error: "), said.err
    assert len(lines[-2]) > 15 and lines[-1].startswith("Try 'gptbook"), said.err
    assert "Traceback" not in said.err and said.out == ""
    assert listing(folder) == before, "something was written"
    return said.err


def generate(capsys, line: str) -> tuple[str, str]:
    """Standard output and error of `gptbook generate`."""
    assert main(["generate", *shlex.split(line)]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def train(capsys, line: str, code: int = 0) -> tuple[str, str]:
    assert main(["train", *shlex.split(line)]) == code, capsys.readouterr()
    said = capsys.readouterr()
    return said.out, said.err


def weights(folder) -> dict:
    return load_model(Path(folder, "best_model.safetensors")).model.state_dict()


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(x, b[name]) for name, x in a.items())


def losses(folder) -> list:
    rows = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]
