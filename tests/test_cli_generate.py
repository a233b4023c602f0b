"""`gptbook generate`: the text that it writes, from which prompts, in which form."""

import importlib.util
import io
import json
import math
import re
import shlex
import subprocess
import sys
import time

import pytest
import torch

from commands_workspace import (  # noqa: F401, two of them are fixtures
    GPTBOOK, ROOT, check_bad, generate, here, tiny_model, workspace,
)
from gptbook import cli
from gptbook.beam import beam_search
from gptbook.checkpoints import export_pt, load_model, save_model
from gptbook.cli import call
from gptbook.cli_generate import CLASHES, GENERATE_OPTIONS, NEEDS, WaitLine, flag
from gptbook.constrained import Constraint
from gptbook.generation import generate_text, new_text, prompt_ids
from gptbook.sampler import Sampler


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


SCRIPT = ROOT / "examples" / "generate_text.py"


def example(*words, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True,
                          cwd=cwd)


def test_the_example_script(here, tmp_path, capsys):
    """With a .pt, from another folder, and with the defaults that it promises."""
    path = export_pt(here / "best_model.safetensors", tmp_path / "sub" / "best_model.pt")
    (tmp_path / "elsewhere").mkdir()
    done = example("--checkpoint", "../sub/best_model.pt", "--seed", "1",
                   cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    wanted, _ = generate(capsys, "--checkpoint best_model.safetensors --prompt 'Once upon a time' "
                         "--length 150 --temperature 0.7 --top-k 50 --seed 1")
    assert done.stdout == wanted and "validation loss 2.5" in done.stderr
    done = example("--checkpoint", "hostile.pt", cwd=here)  # weights only
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_the_example_script_keeps_what_is_typed():
    spec = importlib.util.spec_from_file_location("example_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for words, gone in ((["--prompt=a"], "--prompt"), (["--top-k", "3"], "--top-k"),
                        (["--prompt-file", "x"], "--prompt"), (["--beams", "3"], "--temperature")):
        given = script.with_defaults(words)
        assert gone not in given[: -len(words)] and given[-len(words):] == words
    assert script.with_defaults([]) == ["--prompt", "Once upon a time", "--length", "150",
                                        "--temperature", "0.7", "--top-k", "50"]


def test_a_pt_beside_it_and_a_reader_that_leaves(here):
    done = example("--checkpoint", "best_model.pt", "--prompt", "The cat", "--seed", "1", cwd=here)
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


# Every rule of chapter 6 has a name

def parts(path="best_model.safetensors", prompt="The cat"):
    """A model, its tokenizer, and a prompt's ids."""
    loaded = load_model(path)
    return loaded.model, loaded.tokenizer, prompt_ids(loaded.tokenizer, prompt)


@pytest.mark.parametrize("flags, settings", [
    ("--min-p 0.9", dict(min_p=0.9)), ("--typical-p 0.5", dict(typical_p=0.5)),
    ("--repetition-penalty 30", dict(repetition_penalty=30.0)),
    ("--presence-penalty 3", dict(presence_penalty=3.0)),
    ("--frequency-penalty -2.5", dict(frequency_penalty=-2.5)),
    ("--no-repeat-ngram 1", dict(no_repeat_ngram=1)),
    ("--temperature 1.5 --top-k 7 --top-p 0.6 --min-p 0.01",
     dict(temperature=1.5, top_k=7, top_p=0.6, min_p=0.01)),
])
def test_each_rule_of_the_sampler_has_an_option(here, capsys, flags, settings):
    out, _ = generate(capsys, f"--checkpoint . --prompt 'The cat' --length 20 --seed 5 {flags}")
    model, tokenizer, ids = parts()
    sampler = Sampler(**{"temperature": 0.7, **settings})
    end = tokenizer.end_of_text
    row = generate_text(model, ids, 20, sampler=sampler, end_of_text=end, seed=5)[0]
    assert out == "The cat" + new_text(tokenizer, row, len(ids)) + "\n"
    other, _ = generate(capsys, "--checkpoint . --prompt 'The cat' --length 20 --seed 5")
    assert out != other  # else nothing was tried


def test_stop_and_min_length(here, capsys):
    line = "--checkpoint . --prompt 'The cat' --length 25 --seed 3"
    whole = generate(capsys, line)[0]
    new = whole[len("The cat"):-1]
    stop = new[7:9]
    cut = generate(capsys, f"{line} --stop {shlex.quote(stop)} --stop nowhere")[0]
    assert cut == "The cat" + new[:new.index(stop)] + "\n"
    told = json.loads(generate(capsys, f"{line} --json --stop {shlex.quote(stop)}")[0])
    assert told["finished"] == "stop" and told["text"] == new[:new.index(stop)]
    assert json.loads(generate(capsys, f"{line} --json")[0])["finished"] == "length"


def test_min_length_forbids_an_early_end(tmp_path, capsys):
    model, tokenizer = tiny_model()
    with torch.no_grad():  # end of text is the likeliest, whatever it reads
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.tok_emb.weight[tokenizer.end_of_text] = 9.0
    path = save_model(tmp_path / "ends.safetensors", model, tokenizer)
    for least in (0, 1, 6):
        told = json.loads(generate(capsys, f"--checkpoint {path} --json --length 9 --seed 1 "
                                           f"--min-length {least}")[0])
        assert (told["tokens"], told["finished"]) == (least + 1, "end_of_text")


def test_json_says_what_happened(here, capsys):
    out, err = generate(capsys, "--checkpoint . --prompt 'The cat' --length 9 --seed 4 --json "
                                "--num-samples 3")
    told = [json.loads(line) for line in out.splitlines()]
    model, tokenizer, ids = parts()
    rows, log_probs = generate_text(model, [ids] * 3, 9, 0.7, seed=4, log_probs=True,
                                    end_of_text=tokenizer.end_of_text)
    for i, (one, row) in enumerate(zip(told, rows, strict=True)):
        assert one["prompt"] == "The cat" and one["text"] == new_text(tokenizer, row, len(ids))
        assert one["log_prob"] == pytest.approx(sum(log_probs[i]), abs=1e-5)
        assert (one["tokens"], one["seed"]) == (len(row) - len(ids), 4 + i)
        assert one["tokens_per_second"] > 0
        about = one["checkpoint"]
        assert (about["epoch"], about["step"], about["validation_loss"]) == (1.5, 30, 2.5)
        assert about["file"] == "best_model.safetensors" and about["recipe"] == "gpt2"
        assert about["parameters"] == sum(p.numel() for p in model.parameters())
    assert "--seed 4" in err
    alone = generate(capsys, "--checkpoint . --prompt 'The cat' --length 9 --seed 6")[0]
    assert alone == "The cat" + told[2]["text"] + "\n"


def test_number_is_another_name_of_num_samples(here, capsys):
    line = "--checkpoint . --length 5 --seed 1"
    assert generate(capsys, f"{line} --number 2") == generate(capsys, f"{line} --num-samples 2")


def test_prompts_from_a_file_and_from_standard_input(here, capsys):
    path = here / "prompts.txt"
    path.write_bytes("\ufeffThe cat\r\n\n  \nIt was fluffy\n".encode())
    line = "--checkpoint . --length 7 --seed 3"
    lines = generate(capsys, f"{line} --prompt-file prompts.txt --each-line")[0]
    assert [text.split("\n")[0][:7] for text in lines.split("\n\n")][0] == "The cat"
    told = generate(capsys, f"{line} --prompt-file prompts.txt --each-line --json --number 2")[0]
    told = [json.loads(row) for row in told.splitlines()]
    assert [t["prompt"] for t in told] == ["The cat"] * 2 + ["It was fluffy"] * 2
    assert [t["seed"] for t in told] == [3, 4, 5, 6]
    alone = generate(capsys, f"{line[:-1]}5 --prompt 'It was fluffy'")[0]
    assert alone == "It was fluffy" + told[2]["text"] + "\n"  # lengths differ: padded rows
    whole = json.loads(generate(capsys, f"{line} --prompt-file prompts.txt --json")[0])
    assert whole["prompt"] == "The cat\n\n  \nIt was fluffy"
    path.unlink()
    said = call(f"gptbook generate {line} --prompt-file -", stdin="The cat\n")
    assert said.code == 0
    assert said.out == generate(capsys, f"{line} --prompt 'The cat'")[0]
    assert call(f"gptbook generate {line} --prompt-file -").code == 2  # nothing came


def test_many_texts_are_written_in_batches(here, capsys, monkeypatch):
    line = "--checkpoint . --length 6 --seed 2 --num-samples 7"
    together = generate(capsys, line)[0]
    monkeypatch.setattr("gptbook.cli_generate.AT_ONCE", 3)
    assert generate(capsys, line)[0] == together


@pytest.mark.parametrize("flags, settings", [
    ("", {}), ("--length-penalty 0", dict(length_penalty=0.0)),
    ("--no-repeat-ngram 2", dict(no_repeat_ngram=2)), ("--min-length 8", dict(min_length=8)),
])
def test_beams(here, capsys, flags, settings):
    out, err = generate(capsys, "--checkpoint . --prompt 'The cat' --length 8 --beams 4 --json "
                                f"--num-samples 2 {flags}")
    model, tokenizer, ids = parts()
    found = beam_search(model, ids, 4, 8, end_of_text=tokenizer.end_of_text, **settings)
    told = [json.loads(row) for row in out.splitlines()]
    assert len(told) == 2 and "a search of 4 beams" in err
    for one, best in zip(told, found):
        assert one["text"] == new_text(tokenizer, best.ids, len(ids))
        assert one["log_prob"] == pytest.approx(best.log_prob, abs=1e-4)
        assert one["seed"] is None and one["tokens"] == len(best.new_ids)
    shown = generate(capsys, f"--checkpoint . --prompt 'The cat' --length 8 --beams 4 {flags}")[0]
    assert shown == "The cat" + told[0]["text"] + "\n"


@pytest.mark.parametrize("flags", ["--temperature 0", "--seed 3", "--seed 4 --top-k 5 --top-p 0.9",
                                   "--seed 5 --repetition-penalty 1.5", "--seed 6 --min-p 0.5"])
def test_lookup_writes_the_same_text(capsys, flags):
    line = f"--prompt 'Once upon a time' --length 60 {flags}"  # the demo: it has a text to copy
    assert generate(capsys, f"{line} --lookup")[0] == generate(capsys, line)[0]


def test_lookup_with_stops_several_texts_and_json(here, capsys):
    line = "--checkpoint . --prompt 'The cat' --length 12 --seed 3 --num-samples 3 --json"
    told = [[json.loads(row) for row in generate(capsys, f"{line} {flags}")[0].splitlines()]
            for flags in ("", "--lookup")]
    for plain, ahead in zip(*told, strict=True):
        assert ahead["log_prob"] is None and ahead["seed"] == plain["seed"]
        assert ahead["text"] == plain["text"] and ahead["tokens"] == plain["tokens"]
    stop = told[0][1]["text"][3:5]
    row = generate(capsys, f"{line} --lookup --stop {shlex.quote(stop)}")[0].splitlines()[1]
    cut = json.loads(row)
    assert cut["finished"] == "stop" and stop not in cut["text"]
    assert cut["text"] == told[0][1]["text"][: len(cut["text"])]
    out = generate(capsys, "--checkpoint . --seed 8 --length 99 --lookup --json")[0]
    assert json.loads(out)["tokens"] <= 31  # the context of 32 does not slide


def test_a_search_ends_at_the_context(here, capsys):
    told = json.loads(generate(capsys, "--checkpoint . --prompt The --beams 2 --json")[0])
    _, _, ids = parts(prompt="The")
    assert told["tokens"] == 32 - len(ids) and told["finished"] == "length"


def test_regex_and_schema(here, capsys):
    for seed in range(4):
        line = f"--checkpoint . --prompt 'The cat' --seed {seed} --temperature 3"
        out = generate(capsys, f"{line} --regex ' (dog|cat|mouse){{2}}!'")[0]
        assert re.fullmatch("The cat (dog|cat|mouse){2}!\n", out)
        schema = dict(type="object", properties=dict(name=dict(enum=["Ben", "Ada"]),
                                                     old=dict(type="boolean")),
                      required=["name", "old"])
        (here / "person.json").write_text(json.dumps(schema))
        told = json.loads(generate(capsys, f"{line} --json --json-schema person.json")[0])
        (here / "person.json").unlink()
        made = json.loads(told["text"])
        assert made["name"] in ("Ben", "Ada") and type(made["old"]) is bool
        assert told["finished"] == "end_of_text" and told["log_prob"] < 0
    out = generate(capsys, "--checkpoint . --beams 3 --regex '[ab]{3}'")[0]
    assert re.fullmatch("[ab]{3}\n", out)
    many = generate(capsys, "--checkpoint . --seed 1 --num-samples 5 --regex '(yes|no|maybe)'")[0]
    assert set(many.split()) <= {"yes", "no", "maybe"} and len(many.split()) == 5


def test_the_constraint_is_what_holds_the_text(here, capsys, monkeypatch):
    """Negative control: without its mask the text does not match."""
    monkeypatch.setattr(Constraint, "__call__", lambda self, logits, *rest: logits)
    out = generate(capsys, "--checkpoint . --seed 1 --regex 'yes|no' --length 8")[0]
    assert out not in ("yes\n", "no\n")


def test_quantized_rows_stops_and_penalties_together(here, capsys):
    line = ("--checkpoint . --length 30 --seed 5 --repetition-penalty 1.2 --min-p 0.02 "
            "--quantize int8 --prompt 'The cat' --stop . --num-samples 3 --json")
    told = [json.loads(row) for row in generate(capsys, line)[0].splitlines()]
    assert all("." not in one["text"] for one in told)
    assert all(math.isfinite(one["log_prob"]) for one in told)


def test_clashes_name_options_that_exist():
    import click
    command = click.Command("x", params=[])
    for option in GENERATE_OPTIONS:
        option(command)
    names = {p.name for p in command.params}
    used = {*CLASHES, *NEEDS, *NEEDS.values(), *(n for o, _ in CLASHES.values() for n in o)}
    assert used <= names
    typed = {opt for p in command.params for opt in p.opts}
    assert {flag(name) for name in names} <= typed


@pytest.mark.parametrize("line, words", [
    ("--beams 3 --temperature 1", ["--beams", "--temperature", "Leave out one"]),
    ("--lookup --regex a", ["--lookup", "--regex", "Leave out one"]),
    ("--each-line", ["--each-line", "--prompt-file"]),
    ("--beams 2 --num-samples 3", ["--num-samples 3", "--beams 2"]),
    ("--min-length 9 --length 8", ["--min-length 9", "--length 8"]),
    ("--regex '(?=a)b'", ["lookahead", "position"]),
    ("--json-schema unknown.json", ["date", "schema"]),
    ("--prompt-file blank.txt", ["blank.txt is empty"]),
])
def test_messages_say_what_to_do(here, line, words):
    said = call(f"gptbook generate --checkpoint . {line}")
    assert said.code == 2 and said.out == "" and len(said.err.splitlines()) == 2
    assert all(word in said.err for word in words), said.err


def test_a_bad_combination_is_told_before_the_model_is_loaded(here, monkeypatch):
    monkeypatch.setattr("gptbook.cli_generate.load_checkpoint", lambda *a: 1 / 0)
    assert call("gptbook generate --beams 3 --seed 1").code == 2
    assert call("gptbook generate --prompt-file empty.txt").code == 2
    with pytest.raises(ZeroDivisionError):  # the control: this one gets as far
        call("gptbook generate --seed 1")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind, age, shown", [(Terminal, 3, True), (Terminal, 1, False),
                                              (io.StringIO, 3, False)])
def test_progress_is_for_terminals_and_patience(monkeypatch, kind, age, shown):
    monkeypatch.setattr(sys, "stderr", kind())
    progress = WaitLine(7)
    progress.started = time.perf_counter() - age
    progress.tell(2, 300)
    progress.clear()
    said = sys.stderr.getvalue()
    assert ("2 of 7 texts" in said) == shown and (said == "") == (not shown)
    assert said.endswith("\r\x1b[K") or not shown


def test_pieces_come_while_it_writes(here, monkeypatch):
    """A text is printed token by token: the first piece is there before the last is drawn."""
    from gptbook import generation
    drawn, seen, steps = [], [], generation.generate_steps

    def slow(*args, **kwargs):
        for tokens in steps(*args, **kwargs):
            drawn.append(tokens)
            yield tokens

    monkeypatch.setattr(generation, "generate_steps", slow)
    monkeypatch.setattr("click.echo", lambda text="", nl=True, err=False:
                        None if err else seen.append((len(drawn), text)))
    cli.main(shlex.split("generate --checkpoint . --length 9 --prompt 'The cat' --seed 1"))
    assert [n for n, _ in seen[1:6]] == [1, 2, 3, 4, 5] and seen[0] == (0, "The cat")


def test_a_schema_that_is_nested_without_end_is_bad_input(here, tmp_path, capsys):
    """Deep enough for the walk through it, not for the reader of JSON."""
    schema = '{"anyOf": [' * 900 + '{"type": "null"}' + "]}" * 900
    (tmp_path / "nested.json").write_text(schema)
    said = check_bad(capsys, tmp_path, ["generate", "--json-schema", str(tmp_path / "nested.json")])
    assert "too deep" in said
