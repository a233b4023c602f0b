"""The command line: what bad input gets (R17), the frozen flags, help.

R17: at least 50 bad calls a command, in-process through `main`, and three a command through
a real process: exit 2, at most three lines, no traceback, nothing written."""

import ast
import re
import shlex
import subprocess
import sys

import click
import pytest

from commands_workspace import (  # noqa: F401, two of them are fixtures
    GPTBOOK, ROOT, FAST, check_bad, command, here, listing, workspace,
)
from gptbook import cli, cli_corpus, cli_train
from gptbook.cli import EXTRAS, TABLE, Command, call, commands, explain, main
from gptbook.presets import PRESETS


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
        *(f"--min-p {x}" for x in ["-0.1", "1.1", "nan", "inf", "''"]),
        *(f"--typical-p {x}" for x in ["0", "-1", "1.01", "nan", "''"]),
        *(f"--repetition-penalty {x}" for x in ["0", "-1", "nan", "inf", "x"]),
        *(f"--presence-penalty {x}" for x in ["nan", "inf", "x", "1e9"]),
        *(f"--frequency-penalty {x}" for x in ["nan", "-inf", "''", "1e9"]),
        *(f"--no-repeat-ngram {x}" for x in ["0", "-1", "1.5", "x"]),
        *(f"--min-length {x}" for x in ["-1", "201", "x", "9 --length 8"]),
        *(f"--num-samples {x}" for x in ["0", "-1", "257", "x"]), "--stop ''",
        *(f"--beams {x}" for x in ["0", "-1", "65", "x", "1.5", "2 --num-samples 3"]),
        *(f"--beams 2 {x}" for x in [
            "--temperature 1", "--top-k 5", "--top-p 0.5", "--min-p 0.1", "--typical-p 0.5",
            "--repetition-penalty 2", "--presence-penalty 1", "--frequency-penalty 1",
            "--seed 1", "--stop x", "--lookup", "--length-penalty nan",
            "--length-penalty 11", "--prompt '" + "the mat " * 99 + "'"]),
        *(f"--lookup {x}" for x in ["--min-length 2", "--regex a", "--beams 2",
                                    "--json-schema schema.json"]),
        "--length-penalty 1", "--each-line", "--prompt x --prompt-file good.txt",
        *(f"--prompt-file {x}" for x in [
            "missing.txt", "empty.txt", "binary.bin", "folder", "latin.txt", "/dev/null",
            "/dev/zero", "'\0'", "x" * 300, "good.txt/x", "blank.txt", "good.txt", *NAMES]),
        "--prompt-file blank.txt --each-line",
        *(f"--regex '{x}'" for x in ["(", "[a", "a{2,1}", "(?=a)b", "a++", "", " ", r"\1",
                                     "a{900}", "[^\\s\\S]"]),
        "--regex a --json-schema schema.json", "--regex a --min-length 2", "--regex a --stop b",
        *(f"--json-schema {x}" for x in [
            "missing.json", "empty.txt", "good.txt", "binary.bin", "folder", "list.json",
            "unknown.json", "deep.json", "/dev/zero", *NAMES]),
        "--json-schema schema.json --stop x", "--json-schema schema.json --min-length 1",
        "--json x", "--prompt-file - --prompt a",
    ],
    "chat": [
        *(f"--checkpoint {x}" for x in [*BAD_CHECKPOINTS, "mute.safetensors"]),
        *(f"--temperature {x}" for x in ["-1", "nan", "inf", "hot", "''"]),
        *(f"--top-k {x}" for x in ["0", "-3", "1.5", "''"]),
        *(f"--top-p {x}" for x in ["0", "1.1", "nan", "''"]),
        *(f"--min-p {x}" for x in ["-0.1", "1.1", "nan"]),
        *(f"--repetition-penalty {x}" for x in ["0", "nan", "x"]),
        *(f"--length {x}" for x in ["0", "-1", "long"]), "--context 15", "--context x",
        *(f"--seed {x}" for x in BAD_SEEDS), *(f"--device {x}" for x in BAD_DEVICES),
        *(f"--checkpoint . --transcript {x}" for x in [
            "good.txt", "binary.bin", "folder", "/dev/zero", "'\0'", "x" * 300, *NAMES]),
        "--checkpoint . --system '" + "the mat " * 99 + "' --transcript missing/talk.jsonl",
        "--quantize int3", "--colour red", "Hello there", "--system", "--prompt x",
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
    "analyze-attention": [
        *(f"--checkpoint {x}" for x in [*BAD_CHECKPOINTS, "mute.safetensors"]),
        *(f"--layer {x}" for x in ["-1", "x", "1.5", "''", str(2**63)]),
        *(f"--head {x}" for x in ["-1", "x", "1.5", "''"]),
        *(f"--seed {x}" for x in BAD_SEEDS), *(f"--device {x}" for x in BAD_DEVICES),
        *(f"--checkpoint best_model.safetensors {x}" for x in [
            "--layer 1", "--head 2", "--text ''", "--text ' '", "--text '\ud800'",
            "--text '" + "the mat " * 99 + "'", "--out good.txt", "--out good.txt/x",
            "--out /dev/null/x", "--out '\0'", *(f"--out {x}" for x in NAMES)]),
        "--colour red", "some words", "--text", "--word", "--show-plots yes",
    ],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_get_two_lines_and_write_nothing(name, here, capsys):
    assert len(set(BAD[name])) >= 50
    failed = []
    for line in BAD[name]:
        try:
            assert len(check_bad(capsys, here, [name, *shlex.split(line)])) < 900
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
    monkeypatch.setattr(cli_corpus, "open_corpus", break_after_writing)
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

    monkeypatch.setattr(cli_corpus, "open_corpus", bug)
    with pytest.raises(KeyError):
        main(["corpus"])
    monkeypatch.setattr(cli_corpus, "open_corpus", lambda *a, **k: int("x"))
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
    (ModuleNotFoundError("No module named 'cycler'", name="cycler"),
     'this needs cycler, which is not installed: pip install "gptbook[plots]"'),
    (ModuleNotFoundError(name="tokenizers"),
     'this needs tokenizers, which is not installed: pip install "gptbook[pretrained]"'),
    (ModuleNotFoundError(name="gptbook.nothing"), None), (ModuleNotFoundError(), None),
    (ModuleNotFoundError(name="matplotlib.nothing"), None),
    (ImportError("cannot import name 'x'", name="matplotlib"), None),
])
def test_explain(error, told):
    text = explain(error)
    assert text == told or told and text.startswith(told)


def listed(what: str) -> set:
    """The packages in a list of pyproject.toml."""
    rows = re.search(rf"^{what} = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    return set(re.findall(r'"(\w+)', rows[1]))


def test_extras_are_those_of_the_package():
    brings = {name: extra for extra in ("plots", "gpt2", "pretrained") for name in listed(extra)}
    assert EXTRAS == {**brings, "cycler": "plots"}  # which matplotlib brings


def test_whatever_is_imported_is_a_dependency_or_an_extra():
    found = set()
    for node in (n for path in (ROOT / "gptbook").glob("*.py")
                 for n in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    others = found - sys.stdlib_module_names - listed("dependencies") - {"gptbook"}
    assert others - set(EXTRAS) == {"IPython", "triton"}  # a notebook's, and PyTorch's for CUDA


PLAIN = ("import sys\nfrom gptbook.cli import EXTRAS, main\n"
         "sys.modules.update(dict.fromkeys(EXTRAS))  # None: as if it were not installed\n")


def test_a_plain_install_says_what_is_missing(here):
    code = PLAIN + "sys.exit(main(sys.argv[1:]))"
    words = ["analyze-attention", "--checkpoint", "best_model.safetensors", "--out", "looks"]
    before = listing(here)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and listing(here) == before, done.stderr
    error, hint = done.stderr.splitlines()
    assert error.startswith("Error: this needs ") and error.endswith('pip install "gptbook[plots]"')
    assert hint == "Try 'gptbook analyze-attention --help'."


def test_a_plain_install_has_all_other_commands(here, tmp_path):
    demo = "--checkpoint best_model.safetensors"
    lines = [f"generate {demo} --length 3", "corpus --data good.txt", f"chat {demo} --length 3",
             f"export {demo} --to pt --out {tmp_path}/x.pt", "analyze-attention --help",
             f"train --data good.txt {FAST} --steps 2 --out {tmp_path}/run"]
    code = PLAIN + f"for line in {[*map(shlex.split, lines)]}: assert main(line) == 0, line"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="")
    assert done.returncode == 0, done.stderr


def test_advice_for_training_is_given_where_it_trains():
    told = explain(RuntimeError("no memory for step 3. In this order: smaller; out of memory"))
    assert told.startswith("no memory for step 3: try --accumulate 1")
    assert "--accumulate" not in explain(MemoryError())  # of `gptbook generate`, say


def test_ctrl_c_is_one_line_and_130(here, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_train, "open_corpus", interrupted)
    before = listing(here)
    assert main(["train"]) == 130
    said = capsys.readouterr()
    assert said.err.split("\n") == ["", "Interrupted.", ""] and listing(here) == before


FLAGS = {
    "train": "data encoding preset out resume minutes steps epochs batch-size context-length "
             "learning-rate tokenizer vocab-size seed device precision schedule accumulate "
             "less-memory compile threads sample-every "
             "quiet",
    "generate": "checkpoint device quantize prompt prompt-file each-line length min-length stop "
                "temperature top-k top-p min-p typical-p repetition-penalty presence-penalty "
                "frequency-penalty no-repeat-ngram seed beams length-penalty lookup regex "
                "json-schema num-samples number json",
    "chat": "checkpoint device quantize system transcript length context temperature top-k "
            "top-p min-p repetition-penalty seed",
    "export": "checkpoint to out quantize force",
    "corpus": "data encoding number vocab-size check",
    "analyze-attention": "checkpoint text layer head word out show-plots seed device",
}


def test_the_flags_are_frozen():
    """Scripts of other people depend on them: a new flag is added here, none is taken away."""
    found = {name: [opt for p in command(name).params for opt in p.opts] for name in TABLE}
    assert found == {name: [f"--{flag}" for flag in flags.split()]
                     for name, flags in FLAGS.items()}
    defaults = command("generate").make_context("generate", []).params
    assert (defaults["length"], defaults["temperature"]) == (200, 0.7)
    assert all(isinstance(command(name), Command) for name in TABLE)


def test_presets_of_the_command_are_those_of_the_training_page():
    preset = next(p for p in command("train").params if p.name == "preset")
    assert list(preset.type.choices) == list(PRESETS)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], *([c, "--help"] for c in FLAGS)])
def test_help_has_examples(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("Usage: gptbook")
    assert said.out.count("\n  gptbook ") >= 2
    assert max(map(len, said.out.splitlines())) <= 88


def test_every_example_in_help_is_a_call_that_parses():
    for name in commands.list_commands(click.Context(commands)):
        text = re.sub(r"\\\n\s*", " ", command(name).help)
        lines = [re.split(" {4,}", line.strip())[0]  # a remark may stand behind a call
                 for line in text.splitlines() if line.strip().startswith("gptb")]
        for line in (part.split(">")[0] for whole in lines for part in whole.split("|")):
            _, called, *words = shlex.split(line)
            command(called).make_context(called, words)  # raises if it is wrong
        assert lines, name


LIGHT = ("import sys, types; package = types.ModuleType('gptbook'); "
         f"package.__path__ = [{str(ROOT / 'gptbook')!r}]; sys.modules['gptbook'] = package\n"
         "from gptbook.cli import main\n")  # an empty package: only the command's own imports


def test_version_and_help_do_not_import_torch():
    code = LIGHT + ("assert main(['train', '--help']) == main(['--version']) == 0\n"
                    "assert main(['train', '--preset', 'huge']) == 2\n"
                    "assert main(['generate', '--beams', '3', '--seed', '1']) == 2\n"
                    "assert main(['--help']) == main(['chat', '--help']) == 0\n"
                    "assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_command_is_imported_when_it_is_typed():
    code = LIGHT + ("assert main(['generate', '--help']) == 0\n"
                    "held = {name for name in sys.modules if name.startswith('gptbook.cli')}\n"
                    "assert held == {'gptbook.cli', 'gptbook.cli_generate'}, held\n"
                    "assert main(['nonsense']) == 2 and main(['corpus', '--help']) == 0\n"
                    "assert 'gptbook.cli_corpus' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_list_of_commands_has_each_with_a_line():
    said = call("gptbook --help").out
    for name in TABLE:
        assert re.search(rf"^  {name} +\S.*[a-z]", said, re.M), name
    assert [name for name in commands.list_commands(None)] == list(TABLE)
    assert call("gptbook nonsense").code == 2


def test_call_keeps_both_streams_and_the_code():
    said = call("gptbook --version")
    assert said.code == 0 and said.out == said.both and said.err == ""
    bad = call("gptbook generate --temprature 1")
    assert bad.code == 2 and bad.out == "" and bad.err == bad.both
    assert repr(bad).startswith("$ gptbook generate") and repr(bad).endswith("[exit 2]")
    assert "--temperature" in bad.err


@pytest.mark.parametrize("kind, good, bad", [
    (cli.Number(0), ["0", "1e3", "2.5"], ["nan", "inf", "-1", "x", ""]),
    (cli.Number(0, 1, min_open=True), ["1", "1e-9"], ["0", "1.1", "nan"]),
    (cli.Whole(1), ["1", str(2**63 - 1)], ["0", "1.5", str(2**63), "1e3"]),
    (cli.Name(), ["a", " a"], ["", " ", "\t", "a\0b"]),
])
def test_types_say_no(kind, good, bad):
    for text in good:
        kind.convert(text, None, None)
    for text in bad:
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)
