"""`gptbook export`: formats, and what is never written over."""

import shlex

import torch

from commands_workspace import (  # noqa: F401, two of them are fixtures
    generate, here, tiny_model, workspace,
)
from gptbook.checkpoints import load_model, save_model
from gptbook.cli import main


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(x, b[name]) for name, x in a.items())


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
