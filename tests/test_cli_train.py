"""`gptbook train`: from a text to weights, stopped and gone on, and what it refuses."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from commands_workspace import (
    FAST, GPTBOOK, TEXT, check_bad, generate, losses, same, train, weights,
)
from gptbook import cli_train
from gptbook.checkpoints import load_model
from gptbook.cli import main
from gptbook.compilation import why_not_compile
from gptbook.core import GPTConfig


def test_train_to_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text(TEXT)
    out, _ = train(capsys, f"--data 'my text.txt' --out runs/mine {FAST} --steps 12")
    for said in ("my text.txt", "12 steps of 2 x 16", "about", "GB", "runs/mine",
                 "gptbook generate --checkpoint runs/mine"):
        assert said in out
    assert len(losses("runs/mine")) == 12
    out, err = generate(capsys, "--checkpoint runs/mine --length 5 --prompt 'The cat'")
    assert out.startswith("The cat") and "data: my text.txt" in err and "step 12" in err
    assert sorted(p.name for p in Path("runs/mine").iterdir()) == [
        "best_model.safetensors", "log.jsonl", "run.json", "state"]


def test_stopped_and_resumed_is_the_run_never_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = f"--data text.txt {FAST} --steps 8 --seed 3"
    train(capsys, f"{line} --out whole")

    def press(*args, done=[]):
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(cli_train, "write_sample", press)
        out, _ = train(capsys, f"{line} --out parts --sample-every 1", code=130)
    assert "go on with: gptbook train --resume --out parts" in out
    done = len(losses("parts"))
    assert 3 <= done < 8
    Path("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the text is found again
    train(capsys, "--resume --out ../parts --quiet")
    monkeypatch.chdir(tmp_path)
    assert losses("parts") == losses("whole") and same(weights("parts"), weights("whole"))
    train(capsys, f"{line} --out parts --resume")  # the old line with --resume; nothing left
    assert losses("parts") == losses("whole")
    train(capsys, f"{line.replace('seed 3', 'seed 4')} --out control")
    assert not same(weights("control"), weights("whole"))


def test_a_run_that_never_saved_begins_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    train(capsys, f"--data text.txt {FAST} --steps 3 --out a")
    Path("b").mkdir()
    Path("b/run.json").write_text(Path("a/run.json").read_text())
    train(capsys, "--resume --out b")
    assert losses("a") == losses("b")


def test_a_second_run_or_another_text_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = f"--data text.txt {FAST} --steps 3 --out a"
    train(capsys, line)
    assert "holds a run already" in check_bad(capsys, tmp_path, ["train", *shlex.split(line)])
    Path("text.txt").write_text(TEXT.replace("cat", "dog"))
    said = check_bad(capsys, tmp_path, shlex.split("train --resume --out a"))
    assert "not the text" in said
    Path("a/run.json").unlink()
    check_bad(capsys, tmp_path, ["train", *shlex.split(line)])


@pytest.mark.parametrize("size", [2, 3, 9, 40])
def test_text_shorter_than_the_context_shortens_it(tmp_path, monkeypatch, capsys, size):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("abcdefghij"[:size] * (size // 10 or 1))
    line = ("--data short.txt --preset tiny --precision fp32 --steps 2 --batch-size 2 "
            "--context-length 64")
    if size == 2:  # one token is nothing to learn from
        check_bad(capsys, tmp_path, ["train", *shlex.split(line)])
        return
    out, _ = train(capsys, line)
    assert "shortened" in out and load_model("checkpoints").config.context_length < 64


def test_watching_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = f"--data text.txt {FAST} --steps 5"
    out = [train(capsys, f"{line} {watch} --out {i}")[0] for i, watch in
           enumerate(["--sample-every 0", "--sample-every 1", "--quiet"])]
    assert out[1].count("step ") >= 5 > out[0].count("step ")
    assert len(out[2].splitlines()) == 2
    assert same(weights("0"), weights("1")) and same(weights("0"), weights("2"))


@pytest.mark.parametrize("how, steps", [("--epochs 2", None), ("--steps 4", 4),
                                        ("--minutes 0.005", None)])
def test_how_long(tmp_path, monkeypatch, capsys, how, steps):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    train(capsys, f"--data text.txt {FAST} {how} --vocab-size 300 --learning-rate 1e-3")
    saved = json.loads(Path("checkpoints/run.json").read_text())
    assert len(losses("checkpoints")) == saved["steps"] == (steps or saved["steps"]) >= 1


def test_a_run_that_diverges_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = f"train --data text.txt {FAST} --steps 60 --learning-rate 1e30"
    assert main(shlex.split(line)) == 1  # the input was fine, the outcome is not
    err = capsys.readouterr().err
    assert "lower learning rate" in err and len(err.splitlines()) <= 3


def test_a_disk_that_fails_says_so_and_keeps_what_was_there(tmp_path, monkeypatch, capsys):
    from gptbook import atomic_files
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)

    def full(call, *args):
        if call is os.write:
            raise OSError(28, "No space left on device")
        return call(*args)

    monkeypatch.setattr(atomic_files, "_disk", full)
    assert main(shlex.split(f"train --data text.txt {FAST} --steps 3")) == 2
    err = capsys.readouterr().err
    assert "No space left" in err and len(err.splitlines()) <= 3


def test_ctrl_c_of_a_real_process(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = shlex.split(f"train --data text.txt {FAST} --steps 100000 --sample-every 1")
    run = subprocess.Popen([GPTBOOK, *words], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    for line in run.stdout:
        if line.startswith("step 2:"):
            run.send_signal(signal.SIGINT)
            break
    out, err = run.communicate(timeout=120)
    assert run.returncode == 130 and "Traceback" not in err
    assert "gptbook train --resume --out checkpoints" in out


PARTS = ["--schedule linear", "--schedule wsd", "--schedule one-cycle", "--schedule constant",
         "--precision fp16", "--accumulate 1", "--less-memory", "--accumulate 99 --less-memory"]


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_the_training_chapter_have_names(tmp_path, monkeypatch, capsys, parts):
    """Each option trains; those that only change how a step is computed lead to the same run."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = f"--data text.txt {FAST} --steps 6 --quiet"
    train(capsys, f"{line} --out plain")
    train(capsys, f"{line} --out other {parts}")
    if "schedule" in parts or "precision" in parts:
        assert not same(weights("plain"), weights("other"))
    else:
        assert losses("other") == pytest.approx(losses("plain"), abs=1e-4)


def test_memory_is_a_matter_of_the_pieces():
    sizes, cpu = GPTConfig(**{"context_length": 512}), torch.device("cpu")
    whole, piece = (cli_train.memory_needed(sizes, rows, cpu) for rows in (4, 1))
    assert cli_train.memory_needed(sizes, 1, cpu, less=True) < piece < whole


def test_a_run_killed_before_its_first_save_goes_on_from_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = f"--data text.txt {FAST} --steps 4 --quiet --out"
    for run in ("whole", "killed"):
        train(capsys, f"{line} {run}")
    for path in sorted(Path("killed").rglob("*"), reverse=True):
        if path.name != "run.json" and path.name != "state":
            path.rmdir() if path.is_dir() else path.unlink()
    train(capsys, "--resume --quiet --out killed")
    assert losses("killed") == losses("whole") and same(weights("killed"), weights("whole"))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_compiled_run_leads_to_the_same_losses(tmp_path, monkeypatch, capsys):
    why_not_compile.cache_clear()
    if why := why_not_compile("cpu"):
        pytest.skip(why)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = f"--data text.txt {FAST} --steps 4 --quiet --out"
    train(capsys, f"{line} plain")
    out, _ = train(capsys, f"{line} fast --compile --less-memory")
    assert "without it" not in out
    assert losses("fast") == pytest.approx(losses("plain"), abs=1e-4)
