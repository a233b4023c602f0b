"""The command that looks: files, numbers, formats of checkpoints, and what it says to mistakes."""
import json
import re
import shutil
import subprocess
import sys
import time
import warnings

import pytest
import torch

from commands_workspace import ROOT, tiny_model, workspace  # noqa: F401
from gptbook.attention import capture_attention
from gptbook.checkpoints import load_model, save_model
from gptbook.cli import call
from gptbook.cli_attention import look_at, told, write_look
from gptbook.core import GPTConfig, GPTModel
from gptbook.stories import story
from gptbook.structured_pruning import prune_heads

sys.path.append(str(ROOT / "book"))
from chromium import Browser, find_chromium  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(workspace, monkeypatch):  # noqa: F811
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return workspace


def analyze(words="", out="looks"):
    return call(f"gptbook analyze-attention --device cpu --out {out} {words}")


def test_the_numbers_are_those_of_the_model(here, tmp_path):
    said = analyze("--checkpoint best_model.safetensors --text 'The cat sat.'", tmp_path / "a")
    assert said.code == 0, said.err
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "attention.json", "layer_0.png", "model.png", "view.html"]
    found = json.loads((tmp_path / "a" / "attention.json").read_text())
    checkpoint = load_model("best_model.safetensors")
    ids = [checkpoint.tokenizer.end_of_text, *checkpoint.tokenizer.encode("The cat sat.")]
    assert found["ids"] == ids and found["layers"] == [0] and found["text"] == "The cat sat."
    with torch.no_grad(), capture_attention(checkpoint.model.eval()) as captured:
        checkpoint.model(torch.tensor([ids]))
    torch.testing.assert_close(torch.tensor(found["weights"]["0"]), captured.weights[0][0],
                               atol=5.1e-5, rtol=0)
    assert set(found["scores"]) == {"previous token", "first token", "itself", "same token",
                                    "induction", "even"}
    assert "Layer 0:" in said.out and "attends most to:" in said.out
    assert (tmp_path / "a" / "model.png").read_bytes().startswith(b"\x89PNG")
    assert "http" not in (tmp_path / "a" / "view.html").read_text()


def test_a_layer_a_head_and_a_word(here, tmp_path):
    said = analyze("--checkpoint best_model.safetensors --layer 0 --head 1 --word cat", tmp_path / "b")
    assert said.code == 0, said.err
    assert sorted(p.suffix for p in (tmp_path / "b").iterdir()) == [".html", ".json", ".png", ".png"]
    assert (tmp_path / "b" / "layer_0_head_1.png").is_file()
    assert "Layer 0, head 1:" in said.out and "'cat' attends most to:" in said.out


def test_without_a_checkpoint_it_is_untrained_and_says_so(here, tmp_path):
    said = analyze("--text 'The cat sat on the mat. It was fluffy.'", tmp_path / "c")
    assert said.code == 0 and "not trained" in said.err
    assert said.out.startswith("Warning: uniform") and "Warning: random-like" in said.out
    assert "Layer 3:\n  'It' attends most to:\n    1. '" in said.out
    again = analyze("--text 'The cat sat on the mat. It was fluffy.'", tmp_path / "c")
    other = analyze("--seed 1 --text 'The cat sat on the mat. It was fluffy.'", tmp_path / "d")
    assert again.out == said.out, "the same seed, the same report"
    a, b = (json.loads((tmp_path / x / "attention.json").read_text()) for x in "cd")
    assert a["weights"] != b["weights"]


def test_a_trained_model_has_no_warnings(here, tmp_path):
    demo = ROOT / "gptbook" / "models" / "stories.safetensors"
    said = analyze(f"--checkpoint {demo}", tmp_path / "e")
    assert said.code == 0 and "Warning" not in said.out and "# coreference" in said.out


@pytest.mark.parametrize("words, told", [
    ("--layer 7", "layer 7 is not there: the model has layers 0 to 0"),
    ("--layer 0 --head 2", "head 2 is not there"), ("--head 5", "head 5 is not there"),
    ("--layer -1", "-1"), ("--text ''", "empty"), ("--text ' '", "empty"),
    ("--text " + "a" * 99, "the model reads 32 at most"), ("--word dragon", "dragon"),
    ("--checkpoint nowhere.pt", "no such file"), ("--checkpoint hostile.pt", "hostile.pt"),
    ("--checkpoint cut.safetensors", "cut.safetensors"), ("--checkpoint mute.safetensors", "tokenizer"),
    ("--device toaster", "toaster"), ("--seed x", "x"),
])
def test_mistakes_get_one_line_and_write_nothing(here, tmp_path, words, told):
    checkpoint = "" if "--checkpoint" in words else "--checkpoint best_model.safetensors"
    said = analyze(f"{checkpoint} {words}", tmp_path / "f")
    assert said.code == 2 and told in said.err and said.out == ""
    assert len(said.err.splitlines()) == 2 and not (tmp_path / "f").exists()


def test_any_text_can_be_drawn(here, tmp_path):
    """Two dollars are no formula, and a font without a letter says nothing on the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ("$$ cat", "$5_x$ cat", "\u732b cat"):
            said = analyze(f"--checkpoint best_model.safetensors --text '{text}'", tmp_path / "m")
            assert said.code == 0, said.err
        shutil.copy("best_model.safetensors", tmp_path / "$x^$.safetensors")
        said = analyze(f"--checkpoint '{tmp_path}/$x^$.safetensors'", tmp_path / "m")
        assert said.code == 0, said.err


def test_one_layer_of_a_trained_model_is_not_called_untrained(here, tmp_path):
    """The last layer has no habit; that is a warning only if no other layer has one."""
    demo, text = ROOT / "gptbook" / "models" / "stories.safetensors", story(977, 9000).text
    assert "'" not in text
    for words in ("--layer 3", "--layer 3 --head 0", ""):
        said = analyze(f"--checkpoint {demo} {words} --text '{text}'", tmp_path / "q")
        assert said.code == 0 and "Warning" not in said.out
        assert json.loads((tmp_path / "q" / "attention.json").read_text())["warnings"] == []
    untrained = analyze(f"--layer 3 --text '{text}'", tmp_path / "q").out
    assert untrained.startswith("Warning: uniform"), "what one layer can show, is said"


def test_the_view_of_one_layer_has_its_number(here, tmp_path):
    demo = ROOT / "gptbook" / "models" / "stories.safetensors"
    for words, at in (("--layer 2", "n"), ("", "o")):
        assert analyze(f"--checkpoint {demo} {words}", tmp_path / at).code == 0
    one, whole = (tmp_path / at / "view.html" for at in "no")
    assert '"first": 2' in one.read_text() and '"first": 0' in whole.read_text()
    if find_chromium() is None:
        pytest.skip("no Chromium here")
    with Browser() as browser:
        page = browser.page(900, 900, "light").open(one.as_uri(), 0.4)
        assert page.errors == []
        assert page.evaluate("document.querySelector('.gba .s').textContent").startswith("layer 2, head 0")
        assert page.evaluate("document.querySelector('.gba .h span').textContent") == "layer 2"
        page.close()


def test_layers_with_different_numbers_of_heads(here, tmp_path):
    checkpoint = load_model(ROOT / "gptbook" / "models" / "stories.safetensors")
    prune_heads(checkpoint.model, {1: [0, 3]})
    path = save_model(tmp_path / "pruned.safetensors", checkpoint.model, checkpoint.tokenizer)
    for words, told in (("", "numbers of heads, [4, 2, 4, 4]"), ("--layer 1 --head 2", "0 to 1")):
        said = analyze(f"--checkpoint {path} {words}", tmp_path / "p")
        assert said.code == 2 and told in said.err and not (tmp_path / "p").exists()
    said = analyze(f"--checkpoint {path} --layer 1 --head 1", tmp_path / "p")
    assert said.code == 0 and (tmp_path / "p" / "layer_1_head_1.png").is_file()


def test_nothing_is_written_by_halves(here, tmp_path, monkeypatch):
    """If the last file cannot be computed, the first is not written."""
    import gptbook.cli_attention as module

    def broken(look):
        raise ValueError("no numbers today")

    monkeypatch.setattr(module, "numbers", broken)
    said = analyze("--checkpoint best_model.safetensors", tmp_path / "g")
    assert said.code == 2 and "no numbers today" in said.err and not (tmp_path / "g").exists()


def test_a_text_too_large_for_the_memory_bound(here, tmp_path, monkeypatch):
    import gptbook.attention as module

    real = module.capture_attention
    monkeypatch.setattr(module, "capture_attention",
                        lambda model, layers=None: real(model, layers, max_bytes=100))
    said = analyze("--checkpoint best_model.safetensors", tmp_path / "h")
    assert said.code == 2 and "max_bytes" in said.err and not (tmp_path / "h").exists()


def test_the_plots_are_shown(here, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("click.launch", lambda path: shown.append(path) or 0)
    analyze("--checkpoint best_model.safetensors --show-plots", tmp_path / "i")
    assert sorted(p.rpartition("/")[2] for p in shown) == ["layer_0.png", "model.png", "view.html"]
    shown.clear()
    analyze("--checkpoint best_model.safetensors", tmp_path / "i")
    assert shown == []


def test_the_example_script_and_a_pt(here, tmp_path):
    assert call("gptbook export --checkpoint best_model.safetensors --to pt --out x.pt --force").code == 0
    for words in (["--checkpoint", "x.pt", "--text", "The cat"], ["--text", "The cat sat"]):
        run = subprocess.run([sys.executable, str(ROOT / "examples" / "analyze_attention.py"), *words,
                              "--out", str(tmp_path / "j")], capture_output=True, text=True, cwd=here)
        assert run.returncode == 0, run.stderr
        assert "attends most to:" in run.stdout
    run = subprocess.run([sys.executable, str(ROOT / "examples" / "analyze_attention.py"), "--layer", "9"],
                         capture_output=True, text=True, cwd=here)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 2


def test_a_folder_of_transformers(here, tmp_path):
    assert call(f"gptbook export --checkpoint best_model.safetensors --to transformers --out {tmp_path}/t"
                ).code == 0
    said = analyze(f"--checkpoint {tmp_path}/t --text 'The cat sat'", tmp_path / "k")
    assert said.code == 0, said.err
    assert (tmp_path / "k" / "view.html").is_file()


@pytest.mark.slow
def test_64_tokens_of_the_124m_shape_in_time(tmp_path):
    """Model grid, one layer's grid, view and JSON: five seconds, when nothing else runs."""
    model, (_, tokenizer) = GPTModel(GPTConfig()), tiny_model()
    path = save_model(tmp_path / "m.safetensors", model, tokenizer)
    checkpoint = load_model(path)
    text = "The cat sat on the mat. " * 9
    while len(tokenizer.encode(text)) > 63:
        text = text[:-1]
    seconds = []
    for _ in range(2):  # the first has to find its fonts
        start = time.perf_counter()
        look = look_at(checkpoint, "m", text, None, None)
        told(look, None)
        write_look(look, tmp_path / "out", None, None)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5, seconds
    assert (tmp_path / "out" / "view.html").stat().st_size <= 450_000
