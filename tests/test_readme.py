"""The README does what it says: its Python runs, its commands run in their order, its links
lead somewhere, its make targets exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GPTBOOK = str(Path(sys.executable).with_name("gptbook"))
SHORT = ["--preset", "tiny", "--steps", "2", "--quiet"]  # the command, in less time


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    """Every `gptbook …` line of the README, in order, as words."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("gptbook ")]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_python_runs(tmp_path):
    assert len(blocks("python")) == 1
    script = tmp_path / "readme.py"
    script.write_text(blocks("python")[0])
    done = run([sys.executable, "-W", "error", str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and "[" in done.stdout


def test_commands_run_in_their_order(tmp_path):
    (tmp_path / "my_text.txt").write_text("A small text that somebody brought along. " * 400)
    kinds = [words[1] for words in commands()]
    assert {"generate", "train", "export"} <= set(kinds)
    for words in commands():
        done = run([GPTBOOK, *words[1:], *(SHORT if words[1] == "train" else [])], tmp_path)
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        if words[1] == "generate":
            assert done.stdout.startswith("Once upon a time")
    assert (tmp_path / "checkpoints" / "best_model.pt").exists()
    assert (tmp_path / "runs" / "mine" / "best_model.safetensors").exists()


def test_a_command_that_is_not_there_would_be_seen(tmp_path):
    assert run([GPTBOOK, "generat"], tmp_path).returncode == 2


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z]+)", README))))
def test_targets_are_in_the_makefile(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_page_is_on_the_map():
    pages = {p.name for p in (ROOT / "nbs").glob("*.ipynb")} - {"index.ipynb"}
    front = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    for page in pages:
        assert f"nbs/{page}" in README, f"{page} is not in the README"
        assert f"({page})" in front, f"{page} is not on the front page"
