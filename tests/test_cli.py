"""The commands: what works as written, what bad input gets (R17), and what must not change.

R17: at least 50 bad calls a command, in-process through `main`, and three a command through
a real process: exit 2, at most three lines, no traceback, nothing written."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptbook import cli
from gptbook.checkpoints import load_model, save_model
from gptbook.compilation import why_not_compile
from gptbook.cli import Command, commands, explain, main
from gptbook.core import GPTConfig, GPTModel, set_seed
from gptbook.critic import corrupt_story
from gptbook.generation import generate_text
from gptbook.stories import story_text
from gptbook.tokenizer import train_bpe
from gptbook.presets import PRESETS

ROOT = Path(__file__).parents[1]
GPTBOOK = str(Path(sys.executable).with_name("gptbook"))
TEXT = "The cat sat on the mat. It was fluffy. " * 60
FAST = "--preset tiny --precision fp32 --sample-every 0 --context-length 16 --batch-size 2"


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
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    assert made["other_shape.safetensors"] != good
    (folder / "folder").mkdir()
    (folder / "run").mkdir()
    settings = commands.commands["train"].make_context("train", []).params
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


NUMBERS = ["-1", "x", "", "nan", "1e", "--", "0x10"]
NAMES = ["''", "' '"]
BAD_CHECKPOINTS = [
    "missing.safetensors", "missing.pt", "no/such/folder/x.pt", "folder", "empty.txt",
    "empty.safetensors", "cut.safetensors", "text.safetensors", "flipped.safetensors",
    "other_shape.safetensors", "hostile.pt", "good.txt", "there.pt", "binary.bin", "/dev/null",
    "/dev/zero", "run", "x" * 300, "good.txt/x", "'\0'", *NAMES,
]
BAD_DATA = ["missing.txt", "empty.txt", "binary.bin", "folder", "latin.txt", "Stories",
            "/dev/null", "/dev/zero", "'\0'", "x" * 300, "good.txt/x", *NAMES]
BAD_ENCODINGS = ["klingon", "base64", "rot13", "utf-16", "''", "'\0'", "utf-32"]
BAD_SEEDS = ["-1", "1.5", "x", "''", str(2**63), "1e3"]
BAD_DEVICES = ["gpu", "cuda:99", "tpu", "meta", *NAMES, "cpu:x", "CPU0"]
BAD = {
    "generate": [
        *(f"--checkpoint {x}" for x in [*BAD_CHECKPOINTS, "mute.safetensors"]),
        *(f"--temperature {x}" for x in ["-1", "-0.1", "nan", "inf", "hot", "''", "1,0"]),
        *(f"--top-k {x}" for x in ["0", "-3", "1.5", "all", "''"]),
        *(f"--top-p {x}" for x in ["0", "-0.1", "1.1", "nan", "inf", "most", "''"]),
        *(f"--length {x}" for x in ["0", "-1", "1.5", "long", "1000000", "''"]),
        *(f"--number {x}" for x in ["0", "-1", "257", "2.5", "x"]),
        *(f"--quantize {x}" for x in ["int3", "8", "''"]),
        *(f"--seed {x}" for x in BAD_SEEDS), *(f"--device {x}" for x in BAD_DEVICES),
        "--prompt '" + "the mat " * 99 + "'", "--prompt '\ud800'", "--colour red", "more words",
        "--length", "--prompt Once upon a time", "--temp", "-x", "--top_k 5",
    ],
    "train": [
        *(f"--data {x}" for x in BAD_DATA),
        *(f"--data good.txt --encoding {x}" for x in BAD_ENCODINGS), "--data one.txt",
        *(f"--preset {x}" for x in ["huge", "''", "Small", "3"]),
        *(f"--out {x}" for x in ["good.txt", "good.txt/x", "/dev/null/x", "/proc/none/x", ".",
                                 "run", "x" * 300, "'\0'", *NAMES]),
        *(f"--resume --out {x}" for x in ["empty", "folder", "damaged", "foreign", "bare",
                                          "good.txt", "."]),
        "--resume --out run --steps 6", "--resume --out run --data stories",
        "--resume --out run --seed 1", "--resume --out run",
        *(f"--minutes {x}" for x in ["0", "-1", "nan", "inf", "x", "''"]),
        f"--data good.txt {FAST} --minutes 1e-9",
        *(f"--steps {x}" for x in ["0", "-1", "1.5", "x", str(2**63)]),
        *(f"--epochs {x}" for x in ["0", "-2", "1.5", "x"]),
        "--steps 5 --minutes 5", "--epochs 5 --steps 5", "--epochs 1 --minutes 1 --steps 1",
        *(f"--batch-size {x}" for x in ["0", "-1", "1.5", "x"]),
        "--data good.txt --preset tiny --batch-size 100000000000",
        *(f"--context-length {x}" for x in ["0", "-1", "1.5", "x"]),
        *(f"--learning-rate {x}" for x in ["0", "-1", "nan", "inf", "x"]),
        *(f"--vocab-size {x}" for x in ["0", "256", "1000000", "x"]),
        "--tokenizer wordpiece", "--precision fp64", "--precision ''",
        *(f"--seed {x}" for x in BAD_SEEDS), *(f"--device {x}" for x in BAD_DEVICES),
        *(f"--threads {x}" for x in ["0", "-1", "1000000", "x"]),
        *(f"--sample-every {x}" for x in ["-1", "x", "1.5"]),
        "--colour red", "my_text.txt", "--steps", "--learning_rate 1",
    ],
    "export": [
        "", "--to pt", "--checkpoint best_model.safetensors", "--to", "--colour red", "x",
        *(f"--checkpoint {x} --to pt --out new.pt" for x in BAD_CHECKPOINTS),
        *(f"--checkpoint {x} --to safetensors --out new.safetensors" for x in BAD_CHECKPOINTS),
        *(f"--checkpoint best_model.safetensors --to {x}" for x in ["onnx", "''", "PT", ".pt"]),
        *(f"--checkpoint best_model.safetensors --to pt --out {x}" for x in
          ["there.pt", "new.bin", "new", "folder", "good.txt/new.pt", "/dev/null/new.pt",
           "/proc/none/new.pt", "x" * 300 + ".pt", "'\0.pt'", *NAMES]),
        "--checkpoint best_model.safetensors --to safetensors",
        "--checkpoint best_model.safetensors --to safetensors --force",
        "--checkpoint best_model.pt --to safetensors",
        *(f"--checkpoint {x} --to transformers --out new" for x in BAD_CHECKPOINTS),
        *(f"--checkpoint best_model.safetensors --to transformers --out {x}" for x in
          ["there.pt", "run", "good.txt/new", "/dev/null/new", "/proc/none/new", "x" * 300,
           "'\0'", *NAMES]),
        "--checkpoint best_model.safetensors --to transformers --out new --force",
        "--checkpoint best_model.safetensors --to pt --out new.pt --quantize int8",
        "--checkpoint best_model.safetensors --to safetensors --out new.safetensors --quantize 8",
        "--checkpoint missing.gguf --to safetensors --out new.safetensors",
    ],
    "corpus": [
        *(f"--data {x}" for x in BAD_DATA),
        *(f"--data good.txt --encoding {x}" for x in BAD_ENCODINGS),
        *(f"--number {x}" for x in ["0", "-1", "1.5", "x", "''", "1000000"]),
        *(f"--vocab-size {x}" for x in ["0", "-1", "256", "1000000", "x", "''"]),
        *(f"--check {x}" for x in ["missing.txt", "empty.txt", "binary.bin", "folder",
                                   "latin.txt", "good.txt/x", "'\0'", "x" * 300, *NAMES]),
        *(f"--check good.txt --encoding {x}" for x in BAD_ENCODINGS[:4]),
        "--colour red", "stories", "--number", "--check", "--data", "--encoding", "-v",
        *(f"--number {x} --data good.txt" for x in NUMBERS),
    ],
}


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


@pytest.mark.parametrize("command", BAD)
def test_bad_calls_get_two_lines_and_write_nothing(command, here, capsys):
    assert len(set(BAD[command])) >= 50
    failed = []
    for line in BAD[command]:
        try:
            assert len(check_bad(capsys, here, [command, *shlex.split(line)])) < 900
        except AssertionError as error:
            failed.append(f"{line[:80]}: {str(error)[:200]}")
    assert not failed, "\n".join(failed)


def test_the_check_can_fail(here, capsys, monkeypatch):
    """Negative controls: a good call, a silent one, and one that writes before it fails."""
    def break_after_writing(*args, **kwargs):
        (here / "left_behind").write_text("x")
        raise ValueError("this came too late for the folder")

    with pytest.raises(AssertionError, match="exit 0"):
        check_bad(capsys, here, ["--help"])
    monkeypatch.setattr(cli, "open_corpus", break_after_writing)
    with pytest.raises(AssertionError, match="something was written"):
        check_bad(capsys, here, ["corpus"])
    (here / "left_behind").unlink()


@pytest.mark.parametrize("line", [
    "generate --temperature -1", "generate --checkpoint hostile.pt", "generate --nonsense",
    "train --data empty.txt", "train --out good.txt", "train --preset huge",
    "export --checkpoint missing.pt --to pt --out new.pt", "export", "export --to onnx",
    "corpus --data binary.bin", "corpus --check missing.txt", "corpus --number 0",
    "nonsense", "--nonsense",  # only four of these get as far as importing torch
])
def test_bad_calls_of_a_real_process(here, line):
    before = listing(here)
    done = subprocess.run([GPTBOOK, *shlex.split(line)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) <= 3 and done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr and listing(here) == before


def test_messages_name_both_values_and_a_cure(here, capsys):
    said = {line: check_bad(capsys, here, shlex.split(line)) for line in (
        "generate --checkpoint best_model.safetensors --prompt '" + "the mat " * 99 + "'",
        "train --data missing.txt", "train --preset huge", "train --out run",
        "generate --checkpoint missing.pt", "train --resume --out run --steps 6",
        "train --data good.txt --encoding utf-16",
    )}
    wanted = ["32", "stories, python_stdlib, shakespeare", "tiny", "--resume",
              "best_model.safetensors", "leave out --steps", "utf-16"]
    for (line, text), word in zip(said.items(), wanted):
        assert word in text, (line, text)


def test_a_bug_of_ours_keeps_its_traceback(here, monkeypatch, capsys):
    def bug(*args, **kwargs):
        raise KeyError("not the user's fault")

    monkeypatch.setattr(cli, "open_corpus", bug)
    with pytest.raises(KeyError):
        main(["corpus"])
    monkeypatch.setattr(cli, "open_corpus", lambda *a, **k: int("x"))
    assert main(["corpus"]) == 2
    monkeypatch.setenv("GPTBOOK_TRACEBACK", "1")
    with pytest.raises(ValueError):
        main(["corpus"])


@pytest.mark.parametrize("error, told", [
    (FileNotFoundError(2, "No such file", "x.txt"), "x.txt: No such file"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (OSError("odd"), "odd"), (ValueError("a\n  b\x1b[31m\u202e"), "a b [31m"),
    (MemoryError(), "there is not enough memory"),
    (RuntimeError("CUDA out of memory. Tried"), "there is not enough memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
     "there is not enough memory"),
    (FloatingPointError("not finite"), "not finite"), (ValueError(), "ValueError"),
    (RuntimeError("a bug"), None), (KeyError("x"), None), (TypeError("x"), None),
])
def test_explain(error, told):
    text = explain(error)
    assert text == told or told and text.startswith(told)


def test_ctrl_c_is_one_line_and_130(here, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_corpus", interrupted)
    before = listing(here)
    assert main(["train"]) == 130
    said = capsys.readouterr()
    assert said.err.split("\n") == ["", "Interrupted.", ""] and listing(here) == before


FLAGS = {
    "train": "data encoding preset out resume minutes steps epochs batch-size context-length "
             "learning-rate tokenizer vocab-size seed device precision schedule accumulate "
             "less-memory compile threads sample-every "
             "quiet",
    "generate": "checkpoint prompt length temperature top-k top-p number quantize seed device",
    "export": "checkpoint to out quantize force",
    "corpus": "data encoding number vocab-size check",
}


def test_the_flags_are_frozen():
    """Scripts of other people depend on them: a new flag is added here, none is taken away."""
    found = {name: [opt for p in command.params for opt in p.opts]
             for name, command in commands.commands.items()}
    assert found == {name: [f"--{flag}" for flag in flags.split()]
                     for name, flags in FLAGS.items()}
    defaults = commands.commands["generate"].make_context("generate", []).params
    assert (defaults["length"], defaults["temperature"]) == (200, 0.7)
    assert all(isinstance(c, Command) for c in commands.commands.values())


def test_presets_of_the_command_are_those_of_the_training_page():
    preset = next(p for p in commands.commands["train"].params if p.name == "preset")
    assert list(preset.type.choices) == list(PRESETS)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], *([c, "--help"] for c in FLAGS)])
def test_help_has_examples(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("Usage: gptbook")
    assert said.out.count("\n  gptbook ") >= 2
    assert max(map(len, said.out.splitlines())) <= 88


def test_every_example_in_help_is_a_call_that_parses():
    for name, command in commands.commands.items():
        text = command.help.replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("gptb")]
        for line in (part.split(">")[0] for whole in lines for part in whole.split("|")):
            _, called, *words = shlex.split(line)
            commands.commands[called].make_context(called, words)  # raises if it is wrong
        assert lines, name


def test_version_and_help_do_not_import_torch():
    """Against an empty package module, so that only the command's own imports count."""
    code = ("import sys, types; package = types.ModuleType('gptbook'); "
            f"package.__path__ = [{str(ROOT / 'gptbook')!r}]; sys.modules['gptbook'] = package\n"
            "from gptbook.cli import main\n"
            "assert main(['train', '--help']) == main(['--version']) == 0\n"
            "assert main(['train', '--preset', 'huge']) == 2\n"
            "assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# generate

def generate(capsys, line: str) -> tuple[str, str]:
    assert main(["generate", *shlex.split(line)]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_generate_writes_what_generate_text_does(here, capsys):
    out, err = generate(capsys, "--checkpoint best_model.safetensors --prompt 'The cat' "
                                "--length 9 --seed 4 --top-k 5 --temperature 0.9 --device cpu")
    loaded = load_model("best_model.safetensors")
    tokenizer = loaded.tokenizer
    ids = generate_text(loaded.model, [tokenizer.end_of_text, *tokenizer.encode("The cat")], 9,
                        0.9, 5, end_of_text=tokenizer.end_of_text, seed=4)[0]
    assert out == tokenizer.decode(i for i in ids if i != tokenizer.end_of_text) + "\n"
    for said in ("validation loss 2.5", "step 30", "epoch 1.5", "--seed 4", "on cpu"):
        assert said in err


def test_the_same_seed_gives_the_same_text_and_rows_have_seeds_in_a_row(here, capsys):
    line = "--checkpoint . --length 8 --prompt 'The '"
    one = [generate(capsys, f"{line} --seed {seed}")[0] for seed in (7, 8, 9)]
    assert generate(capsys, f"{line} --seed 7")[0] == one[0]
    assert len(set(one)) == 3
    several = generate(capsys, f"{line} --seed 7 --number 3")[0]
    assert several == "\n".join(one).replace("\n\n", "\n\n")
    fresh = {generate(capsys, line)[1].split("--seed ")[1] for _ in range(3)}
    assert len(fresh) == 3


def test_generate_edges(here, capsys):
    base = "--checkpoint best_model.safetensors --seed 1"
    assert generate(capsys, f"{base} --length 70")[0]  # the context of 32 slides
    assert generate(capsys, f"{base} --length 5 --top-k 99999 --top-p 1")[0] == generate(
        capsys, f"{base} --length 5")[0]
    greedy = {generate(capsys, f"{base} --length 5 --temperature 0 --seed {s}")[0]
              for s in range(3)}
    assert len(greedy) == 1
    assert generate(capsys, f"{base} --length 3 --prompt 'a <|endoftext|> b'")[0].startswith(
        "a <|endoftext|> b")


def test_generate_stops_at_end_of_text(tmp_path, capsys):
    model, tokenizer = tiny_model()
    with torch.no_grad():  # whatever it reads, the next token is end of text
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.tok_emb.weight[tokenizer.end_of_text] = 9.0
    path = save_model(tmp_path / "ends.safetensors", model, tokenizer)
    for number, wanted in ((1, "The cat\n"), (2, "The cat\n\nThe cat\n")):
        out, _ = generate(capsys, f"--checkpoint {path} --prompt 'The cat' --number {number}")
        assert out == wanted


def test_models_of_a_stream_start_without_end_of_text(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_model()
    end = tokenizer.end_of_text
    assert cli.start_ids(tokenizer, "The", documents=True) == [end, *tokenizer.encode("The")]
    assert cli.start_ids(tokenizer, "The", documents=False) == tokenizer.encode("The")
    assert cli.start_ids(tokenizer, "", documents=False) == tokenizer.encode("\n")
    seen = []
    monkeypatch.setattr("gptbook.generation.generate_steps",
                        lambda model, rows, *a, **k: seen.extend(rows) or iter(()))
    for kind in (True, False):
        path = save_model(tmp_path / "m.safetensors", model, tokenizer, documents=kind)
        generate(capsys, f"--checkpoint {path} --prompt The")
    assert [row[0] == end for row in seen] == [True, False]


def test_a_pt_that_is_not_there_means_the_safetensors_beside_it(here, capsys):
    out, err = generate(capsys, "--checkpoint best_model.pt --length 3 --seed 1")
    assert "best_model.pt is not there: using best_model.safetensors" in err
    assert out == generate(capsys, "--checkpoint best_model.safetensors --length 3 --seed 1")[0]


def test_the_example_script_and_a_reader_that_leaves(here):
    script = ROOT / "examples" / "generate_text.py"
    line = "--checkpoint best_model.pt --prompt 'The cat' --length 20 --top-k 50 --seed 1"
    done = subprocess.run([sys.executable, script, *shlex.split(line)], capture_output=True,
                          text=True, check=True)
    assert done.stdout.startswith("The cat") and "is not there: using" in done.stderr
    piped = subprocess.run(f"{shlex.quote(GPTBOOK)} generate --checkpoint . --length 99 "
                           "| head -c 1", shell=True, capture_output=True)
    assert len(piped.stdout) == 1
    assert piped.stderr.count(b"\n") < 8 and b"Traceback" not in piped.stderr


def test_the_demo_is_the_default(here, monkeypatch, capsys):
    monkeypatch.setattr(cli, "demo_path", lambda: here / "best_model.safetensors")
    assert generate(capsys, "--length 3 --prompt 'The cat'")[0].startswith("The cat")
    monkeypatch.undo()
    assert cli.demo_path().parts[-3:] == ("gptbook", "models", "stories.safetensors")


# train

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
        patch.setattr(cli, "write_sample", press)
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


# export

def test_export_there_and_back(here, tmp_path, capsys):
    run = lambda line: main(["export", *shlex.split(line)])
    pt, back = tmp_path / "sub" / "a.pt", tmp_path / "b.safetensors"
    assert run(f"--checkpoint best_model.safetensors --to pt --out {pt}") == 0
    held = torch.load(pt, weights_only=True)
    original = load_model("best_model.safetensors")
    assert held["config"]["emb_dim"] == 16 and held["step"] == 30
    assert same(original.model.state_dict(), held["model_state_dict"])
    assert run(f"--checkpoint {pt} --to safetensors --out {back}") == 0
    again = load_model(back)
    assert again.info == original.info and same(original.model.state_dict(),
                                                again.model.state_dict())
    assert again.tokenizer.to_dict() == original.tokenizer.to_dict()
    capsys.readouterr()
    assert run(f"--checkpoint best_model.safetensors --to pt --out {pt}") == 2
    assert "--force" in capsys.readouterr().err
    assert run(f"--checkpoint best_model.safetensors --to pt --out {pt} --force") == 0
    assert capsys.readouterr().out.startswith(f"{pt}: ")


def test_a_folder_that_is_there_is_not_written_over(here, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert main(["export", "--checkpoint", "best_model.safetensors", "--to", "transformers",
                 "--out", str(tmp_path / "full")]) == 2
    said = capsys.readouterr().err
    assert "is there already" in said and "bytes" not in said
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_quantized_checkpoints_are_written_and_used(here, tmp_path, capsys):
    small = tmp_path / "small.safetensors"
    assert main(["export", "--checkpoint", "best_model.safetensors", "--to", "safetensors",
                 "--quantize", "int8", "--out", str(small)]) == 0
    capsys.readouterr()
    settings = "--length 12 --temperature 0 --prompt 'The cat' "
    stored = generate(capsys, f"--checkpoint {small} {settings}")[0]
    assert stored == generate(
        capsys, f"--checkpoint best_model.safetensors --quantize int8 {settings}")[0]
    assert main(["generate", "--checkpoint", str(small), "--quantize", "int8"]) == 2
    assert "already" in capsys.readouterr().err


def test_export_to_transformers_and_back(here, tmp_path, capsys):
    def run(line):
        return main(["export", *shlex.split(line)])

    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert run(f"--checkpoint best_model.safetensors --to transformers --out {folder}") == 0
    assert "bytes" in capsys.readouterr().out and (folder / "config.json").is_file()
    original = load_model("best_model.safetensors")
    written = generate(capsys, "--checkpoint best_model.safetensors --length 9 --temperature 0 "
                       "--prompt 'The cat'")[0]
    assert generate(capsys, f"--checkpoint {folder} --length 9 --temperature 0 "
                    "--prompt 'The cat'")[0] == written
    assert run(f"--checkpoint {folder} --to safetensors --out {back}") == 0
    again = load_model(back)
    assert same(original.model.state_dict(), again.model.state_dict())
    text = "The cat sat on the mat."
    assert again.tokenizer.encode(text) == original.tokenizer.encode(text)
    capsys.readouterr()
    assert run(f"--checkpoint {folder} --to pt --out {tmp_path / 'x.pt'}") == 2
    assert "safetensors" in capsys.readouterr().err


def test_export_keeps_bfloat16(here, tmp_path):
    model, tokenizer = tiny_model()
    path = save_model(tmp_path / "half.safetensors", model, tokenizer, dtype=torch.bfloat16)
    assert main(["export", "--checkpoint", str(path), "--to", "pt"]) == 0
    held = torch.load(path.with_suffix(".pt"), weights_only=True)
    assert held["model_state_dict"]["tok_emb.weight"].dtype == torch.bfloat16
    back = tmp_path / "back.safetensors"
    assert main(["export", "--checkpoint", str(path.with_suffix(".pt")), "--to", "safetensors",
                 "--out", str(back)]) == 0
    assert load_model(back, dtype=None).model.tok_emb.weight.dtype == torch.bfloat16


# corpus

def test_corpus_of_a_file(here, capsys):
    assert main(shlex.split("corpus --data good.txt --vocab-size 300")) == 0
    said = capsys.readouterr()
    assert said.out.startswith(TEXT[:1000]) and "more)" in said.out
    assert f"train: {int(len(TEXT) * 0.9):,} bytes" in said.err
    assert "bytes a token" in said.err and "The| cat" in said.err.replace("|T", "The", 0)


def test_corpus_shows_stories_and_their_exact_size(capsys):
    assert main(shlex.split("corpus --number 2")) == 0
    said = capsys.readouterr()
    assert said.out.split("\n\n")[:2] == [story_text(0, 0), story_text(0, 1)]
    assert "bits" in said.err and "documents" in said.err


def test_corpus_checks_a_story(tmp_path, capsys):
    right, path = story_text(0, 5), tmp_path / "story.txt"
    wrong = corrupt_story(right, "wrong_pronoun").text
    for text, code, n in ((right, 0, "0 problems"), (wrong, 1, "should be")):
        path.write_text(text + "\n")
        assert main(["corpus", "--check", str(path)]) == code
        assert n in capsys.readouterr().out


def test_corpus_checks_each_story_of_a_file(tmp_path, capsys):
    """What `generate --number` writes: many stories, each judged as one."""
    right = [story_text(0, i) for i in range(3)]
    wrong = corrupt_story(story_text(0, 5), "wrong_pronoun").text
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(right) + "\n")
    assert main(["corpus", "--check", str(path)]) == 0
    assert capsys.readouterr().out == "0 problems in 3 stories\n"
    path.write_text(wrong)
    assert main(["corpus", "--check", str(path)]) == 1
    place, told = capsys.readouterr().out.split(":", 1)
    for before in ("\n\n", right[0] + "\n\n", right[1] + "\n \n\n" + right[2] + "\n\n"):
        path.write_text(before + wrong + "\n\n")  # the same slip, further down
        assert main(["corpus", "--check", str(path)]) == 1
        said = capsys.readouterr().out
        assert said.startswith(f"{int(place) + len(before)}:{told.splitlines()[0]}\n")


def test_corpus_checks_in_the_encoding_that_it_is_told(tmp_path, capsys, here):
    text = story_text(0, 5)
    (tmp_path / "wide.txt").write_text(text, encoding="utf-16")
    line = ["corpus", "--check", str(tmp_path / "wide.txt")]
    assert main([*line, "--encoding", "utf-16"]) == 0
    assert "0 problems" in capsys.readouterr().out
    said = check_bad(capsys, tmp_path, line)
    assert "wide.txt" in said and "utf-8" in said and "--encoding" in said


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
    whole, piece = (cli.memory_needed(sizes, rows, cpu) for rows in (4, 1))
    assert cli.memory_needed(sizes, 1, cpu, less=True) < piece < whole


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
