"""The tools under book/: directives, docments in the reference, fresh outputs, no-op export."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "book"), str(ROOT / "book/_ext")]
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("sphinx")
import changed  # noqa: E402
from fresh import same, text_of  # noqa: E402
from gptbook_site import describe, directives, parameters, read_notebook, rst  # noqa: E402
from same_export import differences  # noqa: E402
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output  # noqa: E402


# Directives --------------------------------------------------------------------------
def read(*sources):
    cells = [new_markdown_cell("# T"), *(new_code_cell(s) for s in sources)]
    return read_notebook(nbformat.writes(new_notebook(cells=cells))).cells[1:]


@pytest.mark.parametrize("line, tag", [
    ("#| echo: false", "remove-input"), ("#|echo:false", "remove-input"),
    ("# | code-fold: true", "hide-input"), ("#| solution", "hide-cell"),
    ("#| export", "exported"), ("#| exporti", "exported"), ("#| eval: false", "not-run")])
def test_directives_become_tags_and_leave(line, tag):
    (cell,) = read(f"{line}\nx = 1")
    assert cell.source == "x = 1" and cell.metadata.tags == [tag]


@pytest.mark.parametrize("line", ["#| hide", "#| default_exp core", "#| include: false"])
def test_hidden_cells_leave(line):
    assert read(f"{line}\nx = 1") == []


def test_other_comments_stay():
    (cell,) = read("#| slow\n# | a remark\nx = 1  #| not at the top")
    assert cell.source == "x = 1  #| not at the top" and cell.metadata.tags == []
    assert directives("# plain\n#| hide") == ([], "# plain\n#| hide")


def test_exported_cells_know_their_module_and_solutions_their_prompt():
    cells = read("#| default_exp core", "#| export\nx = 1", "#| solution\ny = 2")
    assert cells[0].metadata.gptbook_module == "core"
    assert cells[1].metadata.mystnb["code_prompt_show"] == "Show solution"


def test_widgets_without_a_kernel_are_not_shown():
    view = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {},
                                       "text/plain": "interactive(…)"})
    kept = new_output("display_data", {"text/html": "<b>1</b>"})
    cells = [new_code_cell("f()", outputs=[view, kept])]
    assert read_notebook(nbformat.writes(new_notebook(cells=cells))).cells[0].outputs == [kept]


# The reference -----------------------------------------------------------------------
def example(
    rank: int = 8,        # r, the *rank* of `update`
    *names: str,          # which ones
    scale: float = 16.0,  # times $1/r$
) -> list[str]:           # names of the_modules
    """Do a thing with x_1 and *args.

    - one
    - two
    """
    return [rank, names, scale]


class Example:
    """A class."""

    def __init__(
        self,
        path: Path,  # where
    ):
        self.path = path


def test_trailing_comments_become_parameters():
    assert parameters(example) == [
        ("rank", "int", "8", "r, the *rank* of `update`"), ("*names", "str", "", "which ones"),
        ("scale", "float", "16.0", "times $1/r$"), ("return", "list[str]", "", "names of the_modules")]
    assert parameters(Example)[0] == ("path", "Path", "", "where")
    assert parameters(len) == [] or parameters(len)[0][0] != "rank"


def test_docstrings_become_plain_rst():
    lines = inspect.getdoc(example).split("\n")
    describe(None, "function", "example", example, {}, lines)
    assert lines[0] == r"Do a thing with x\_1 and \*args."
    assert "- one" in lines and "- two" in lines
    assert r":param rank: ``int = 8`` · r, the \*rank\* of \ ``update``\ " in lines
    assert r":param \*names: ``str`` · which ones" in lines
    assert r":returns: ``list[str]`` · names of the\_modules" in lines
    assert rst("times $1/r$") == r"times \ :math:`1/r`\ "


# Fresh outputs -----------------------------------------------------------------------
@pytest.mark.parametrize("stored, fresh", [
    ("loss 1.2345", "loss 1.2346"), ("took 1.2 s", "took 9.9 s"), ("812 tok/s", "5 tok/s"),
    ("<f at 0x7f12>", "<f at 0x8a91>"), ("10%|##   | 1/10", "20%|####  | 2/10"),
    ("2.7× faster", "3.1× faster"), ("made 2026-11-23", "made 2026-12-01"),
    ("1,024 tokens", "1024 tokens"), ("a  b\n", "a b")])
def test_outputs_that_agree(stored, fresh):
    assert same(stored, fresh)


@pytest.mark.parametrize("stored, fresh", [
    ("loss 1.23", "loss 1.25"), ("ok", "not ok"), ("3 stories", "4 stories"), ("x", ""),
    ("tensor([1, 2])", "tensor([1, 3])"), ("-1.5", "1.5"), ("12 heads", "13 heads")])
def test_outputs_that_differ(stored, fresh):
    assert not same(stored, fresh)


def test_text_of_tables_and_streams():
    cell = new_code_cell("f()", outputs=[
        new_output("stream", name="stdout", text="a"), new_output("stream", name="stderr", text="b"),
        new_output("display_data", {"text/html": "<style>x</style><td>c</td>", "text/plain": "t"}),
        new_output("display_data", {"image/png": "", "text/plain": "<Figure>"})])
    assert text_of(cell).split() == ["a", "c"]


# Export is a no-op -------------------------------------------------------------------
def test_a_module_edited_by_hand_is_seen(tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "gptbook").mkdir()
    (tmp_path / "nbs").mkdir()
    (tmp_path / "gptbook/__init__.py").write_text('__version__ = "0.1.0"\n')
    cells = [new_code_cell("#| default_exp a"), new_code_cell("#| export\nx = 1")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "nbs/00_a.ipynb")
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True)
    assert differences(tmp_path) == []
    module = tmp_path / "gptbook/a.py"
    module.write_text(module.read_text().replace("x = 1", "x = 2"))
    assert differences(tmp_path) == ["gptbook/a.py: differs"]
    module.unlink()
    assert differences(tmp_path) == ["gptbook/a.py: would be written"]


def test_changed_pages_and_their_tests(tmp_path):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *args],
                       cwd=tmp_path, check=True, capture_output=True)
    for path in ("nbs/00_core.ipynb", "nbs/00b_data.ipynb", "tests/test_core.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("1")
    git("init", "-b", "main"), git("add", "."), git("commit", "-m", "one")
    assert changed.changed_pages(tmp_path) == []
    (tmp_path / "nbs/00_core.ipynb").write_text("2")
    (tmp_path / "nbs/01_new.ipynb").write_text("2")
    assert changed.changed_pages(tmp_path) == ["00_core", "01_new"]
    assert changed.tests_of(["00_core", "01_new"], tmp_path) == ["tests/test_core.py"]
