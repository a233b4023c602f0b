"""`gptbook generate`: the text that it writes, from which prompts, in which form."""

import shlex
import subprocess
import sys

import torch

from commands_workspace import (  # noqa: F401, two of them are fixtures
    GPTBOOK, ROOT, generate, here, tiny_model, workspace,
)
from gptbook import cli
from gptbook.checkpoints import load_model, save_model
from gptbook.cli_generate import start_ids
from gptbook.generation import generate_text


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
    assert start_ids(tokenizer, "The", documents=True) == [end, *tokenizer.encode("The")]
    assert start_ids(tokenizer, "The", documents=False) == tokenizer.encode("The")
    assert start_ids(tokenizer, "", documents=False) == tokenizer.encode("\n")
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
