"""The shape of the repository. Each check is a function over a folder that returns what is
wrong; `test_repository` runs all on this one, and each check is shown to see a bad tree."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = ("README.md Makefile settings.ini pyproject.toml constraints.txt _toc.yml _config.yml "
             "CONTRIBUTING.md LICENSE nbs gptbook tests benchmarks examples book .ci/run "
             ".github/workflows/ci.yml").split()
NO_SECTIONS = ("index", "12_resources")       # pages without Summary, Exercises, Sources
GENERATED = ("__init__", "_modidx")           # modules that no notebook makes


# What the checks read ----------------------------------------------------------------
def notebooks(root: Path) -> dict:
    """{page name: cells}, in reading order."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8"))["cells"]
            for p in sorted((root / "nbs").glob("*.ipynb"))}


def source(cell) -> str:
    return "".join(cell["source"])


def module_of(cells) -> str | None:
    """The module a page exports to."""
    for cell in cells:
        if match := re.search(r"^#\s*\|\s*default_exp\s+(\w+)", source(cell), re.M):
            return match[1]
    return None


def modules(root: Path) -> dict:
    """{module name: syntax tree} of the package, but for the files no notebook makes."""
    return {p.stem: ast.parse(p.read_text(encoding="utf-8"))
            for p in sorted((root / "gptbook").glob("*.py")) if p.stem not in GENERATED}


def exported(tree: ast.Module) -> list[str]:
    """`__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def scripts(root: Path) -> dict:
    """{path: text} of every Python file that is ours to ship."""
    return {p.relative_to(root): p.read_text(encoding="utf-8")
            for folder in ("gptbook", "examples", "benchmarks", "book")
            for p in sorted((root / folder).rglob("*.py"))}


# The checks --------------------------------------------------------------------------
def import_order(root: Path) -> list[str]:
    """Exported code imports only from earlier pages, from the module itself and by name."""
    order = [m for cells in notebooks(root).values() if (m := module_of(cells))]
    wrong = []
    for name, tree in modules(root).items():
        if name not in order:
            continue                                       # an orphan: reported elsewhere
        for node in ast.walk(tree):
            targets = []
            if isinstance(node, ast.ImportFrom):
                base = node.module or ""
                full = f"gptbook.{base}".rstrip(".") if node.level == 1 else base
                targets = [f"{full}.{a.name}" for a in node.names] if full == "gptbook" else [full]
            elif isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            for target in targets:
                other = (target.split(".") + [""])[1]
                if target.split(".")[0] == "gptbook" and other not in order[:order.index(name)]:
                    wrong.append(f"gptbook/{name}.py imports {target}, which is no earlier page")
    return wrong


def orphans(root: Path) -> list[str]:
    """Each module has its page, and each page its module."""
    pages = [m for cells in notebooks(root).values() if (m := module_of(cells))]
    twice = [f"two pages export gptbook/{m}.py" for m, n in Counter(pages).items() if n > 1]
    found = set(modules(root))
    return (twice + [f"gptbook/{m}.py has no page" for m in sorted(found - set(pages))]
            + [f"gptbook/{m}.py is missing: nbdev_export" for m in sorted(set(pages) - found)])


def exported_twice(root: Path) -> list[str]:
    """No name is exported by two modules."""
    owners = {}
    for name, tree in modules(root).items():
        for public in exported(tree):
            owners.setdefault(public, []).append(name)
    return [f"{n} is exported by {' and '.join(o)}" for n, o in owners.items() if len(o) > 1]


def missing_docstrings(root: Path) -> list[str]:
    """Each exported function and class says what it is."""
    return [f"gptbook/{name}.py: {node.name} has no docstring"
            for name, tree in modules(root).items() for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
            and node.name in exported(tree) and not ast.get_docstring(node)]


def star_imports(root: Path) -> list[str]:
    """Nothing is imported with `*`."""
    texts = {str(p): t for p, t in scripts(root).items()}
    for page, cells in notebooks(root).items():
        texts |= {f"{page}, cell {i}": source(c) for i, c in enumerate(cells)
                  if c["cell_type"] == "code"}
    return [f"{where}: import *" for where, text in texts.items()
            if re.search(r"^\s*from\s+\S+\s+import\s+\*", text, re.M)]


def pickles(root: Path) -> list[str]:
    """Pickle is written by `export_pt` alone, and read with `weights_only=True` alone.

    Scripts under benchmarks/ may write hostile files on purpose."""
    wrong = []
    for path, text in scripts(root).items():
        if path.parts[0] not in ("gptbook", "examples"):
            continue
        tree = ast.parse(text)
        allowed = {id(node) for top in ast.walk(tree) if isinstance(top, ast.FunctionDef)
                   and top.name == "export_pt" for node in ast.walk(top)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            if call == "torch.save" and id(node) not in allowed:
                wrong.append(f"{path}:{node.lineno}: torch.save outside export_pt")
            if re.fullmatch(r"(c?[pP]ickle|_pickle|dill|cloudpickle|joblib|shelve|marshal)"
                            r"\.(dumps?|loads?|open|Pickler|Unpickler)", call):
                wrong.append(f"{path}:{node.lineno}: {call}")
            if call == "torch.load" and not any(
                    k.arg == "weights_only" and getattr(k.value, "value", None) is True
                    for k in node.keywords):
                wrong.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
    return wrong


NO_NETWORK = """
import importlib, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"{event} {args[1:] if event == 'socket.connect' else args}")
sys.addaudithook(refuse)
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def network_at_import(root: Path) -> list[str]:
    """Importing the package and all of its modules opens no connection."""
    names = ["gptbook", *(f"gptbook.{name}" for name in modules(root))]
    run = subprocess.run([sys.executable, "-c", NO_NETWORK, str(root), *names],
                         capture_output=True, text=True, timeout=300, cwd="/")
    return [] if run.returncode == 0 else [run.stderr.strip()[-600:] or "import failed"]


def local_paths(root: Path) -> list[str]:
    """No file of the repository names a folder of somebody's machine."""
    mine = re.compile(r"(?<![\w.:/~])(/(?:home|Users|root|work)/\w[\w.-]*|[A-Z]:\\+Users\\+\w+)")
    wrong = []
    files = [p for folder in ("nbs", "gptbook", "tests", "benchmarks", "examples", "book", ".github")
             for p in sorted((root / folder).rglob("*")) if "__pycache__" not in p.parts]
    for path in [*files, *root.glob("*.*"), root / "Makefile", root / ".ci/run"]:
        if path.suffix in (".safetensors", ".png", ".pyc", ".jpg") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        wrong += [f"{path.relative_to(root)}: {m[1]}" for m in mine.finditer(text)]
    return wrong


def unclean(root: Path) -> list[str]:
    """Notebooks hold no metadata but the kernel, no counts, and unique cell ids."""
    wrong = []
    for path in sorted((root / "nbs").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        kernel = notebook["metadata"].get("kernelspec", {})
        if set(notebook["metadata"]) - {"kernelspec"} or kernel.get("name") != "python3":
            wrong.append(f"{path.name}: metadata {sorted(notebook['metadata'])}, kernel {kernel}")
        cells = notebook["cells"]
        if len({c.get("id") for c in cells}) < len(cells):
            wrong.append(f"{path.name}: cell ids repeat or are missing")
        for i, cell in enumerate(cells):
            if set(cell["metadata"]) - {"tags", "mystnb"} or cell.get("execution_count"):
                wrong.append(f"{path.name}, cell {i}: run nbdev_clean")
    return wrong


def limits(root: Path) -> list[str]:
    """The hard limits of a page: 300 kB, 88 characters, one title, its last sections."""
    wrong = []
    for path in sorted((root / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if path.stat().st_size > 300_000:
            wrong.append(f"{path.name}: {path.stat().st_size // 1000} kB, at most 300")
        for i, cell in enumerate(cells):
            wide = [line for line in source(cell).split("\n") if len(line) > 88]
            if cell["cell_type"] == "code" and wide:
                wrong.append(f"{path.name}, cell {i}: {len(wide[0])} characters: {wide[0][:60]}…")
        text = "\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        if len(re.findall(r"^# ", text, re.M)) != 1:
            wrong.append(f"{path.name}: a page has one title")
        if path.stem not in NO_SECTIONS:
            wrong += [f"{path.name}: no section {s}" for s in ("Summary", "Exercises", "Sources")
                      if not re.search(rf"^## {s}\s*$", text, re.M)]
    return wrong


def never_run(root: Path) -> list[str]:
    """Pages whose cells end in something to show, and which show nothing: stored unrun."""
    wrong = []
    for page, cells in notebooks(root).items():
        shown = []
        for cell in cells:
            text = source(cell)
            apart = re.search(r"^#\s*\|\s*(export|exporti|eval|cuda|slow|network|hide)", text, re.M)
            if cell["cell_type"] != "code" or apart or text.rstrip().endswith(";"):
                continue
            try:
                body = ast.parse(text).body
            except SyntaxError:  # a magic
                continue
            if body and isinstance(body[-1], ast.Expr):
                shown.append(bool(cell["outputs"]))
        if len(shown) >= 4 and sum(shown) < len(shown) / 2:
            wrong.append(f"{page}: {len(shown) - sum(shown)} of {len(shown)} cells show nothing: "
                         "run the page before it is stored")
    return wrong


def white_legends(root: Path) -> list[str]:
    """Legends in matplotlib's own white frame, on which nothing can be read in the dark."""
    wrong = []
    for page, cells in notebooks(root).items():
        shown = json.dumps([cell.get("outputs") for cell in cells])
        if "opacity: 0.8; stroke: #cccccc" in shown:
            wrong.append(f"{page}: a legend has a white frame: ax.legend(frameon=False)")
    return wrong


def exercises(root: Path) -> list[str]:
    """Three to five exercises a page, each a stub, a solution and a check that says what is
    wrong."""
    wrong = []
    for page, cells in notebooks(root).items():
        if page in NO_SECTIONS:
            continue
        kinds, inside = [], False
        for cell in cells:
            text = source(cell)
            if cell["cell_type"] == "markdown":
                for heading in re.findall(r"^## (.+)$", text, re.M):
                    inside = heading.strip() == "Exercises"
            elif inside:
                kinds.append("stub" if re.search(r"^#\s*\|\s*eval:\s*false", text, re.M) else
                             "solution" if re.search(r"^#\s*\|\s*solution", text, re.M) else
                             "check" if re.search(r"\bassert\b[^\n]*,|raise |print\(|check", text)
                             else "code")
        solved = kinds.count("solution")
        if not 3 <= solved <= 5:
            wrong.append(f"{page}: {solved} exercises with a solution; three to five are asked")
        for i, kind in enumerate(kinds):
            if kind == "solution" and kinds[i - 1:i + 2] != ["stub", "solution", "check"]:
                wrong.append(f"{page}: an exercise is {kinds[max(0, i - 1):i + 2]}, "
                             "not stub, solution, check")
    return wrong


def results(root: Path) -> list[str]:
    """A stored result says on which machine, with what, when and how it was made."""
    wrong = []
    for path in sorted((root / "benchmarks" / "results").rglob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        wrong += [f"{path.name}: no {key}" for key in ("machine", "versions", "date", "command")
                  if not stored.get(key)]
    return wrong


def missing_files(root: Path) -> list[str]:
    """The files that every reader of the repository may count on."""
    return [f"{name} is missing" for name in TOP_LEVEL if not (root / name).exists()]


def outside_toc(root: Path) -> list[str]:
    """Each page is in the table of contents once, and no entry of it is empty."""
    yaml = pytest.importorskip("yaml")
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    entries = [toc["root"]] + [e.get("glob") or e.get("file") for part in toc["parts"]
                               for e in part["chapters"]]
    pages = {f"nbs/{p.stem}" for p in (root / "nbs").glob("*.ipynb")}
    hits = {e: [p for p in pages if Path(p).match(e)] for e in entries if e.startswith("nbs")}
    counts = Counter(p for found in hits.values() for p in found)
    return ([f"_toc.yml: {e} matches no page" for e, found in hits.items() if not found]
            + [f"{p} is {counts[p]} times in _toc.yml" for p in sorted(pages) if counts[p] != 1])


CHECKS = (import_order, orphans, exported_twice, missing_docstrings, star_imports, pickles,
          network_at_import, local_paths, unclean, limits, never_run, white_legends, exercises,
          results, missing_files, outside_toc)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_repository(check):
    assert check(ROOT) == []


# Each check sees a bad tree ----------------------------------------------------------
def code(*lines, **more):
    return {"cell_type": "code", "id": str(hash(lines)), "metadata": {}, "outputs": [],
            "execution_count": None, "source": "\n".join(lines), **more}


def prose(text):
    return {"cell_type": "markdown", "id": str(hash(text)), "metadata": {}, "source": text}


EXERCISE = [code("#| eval: false", "x = ..."), code("#| solution", "x = 1"),
            code("assert x == 1, 'x is one'")]


def good_cells(module):
    return [code(f"#| default_exp {module}"),
            prose(f"# {module}\n\n> A page.\n\n## Summary\n\nS.\n\n## Exercises\n\nE."),
            *[{**cell, "id": f"{i}{j}"} for i in range(3) for j, cell in enumerate(EXERCISE)],
            prose("## Sources\n\nP.")]


class Tree:
    """A small repository in which every check passes; `write` and `page` change it."""

    def __init__(self, root: Path):
        self.root = root
        for name in TOP_LEVEL:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if "." in path.name or name in ("Makefile", "LICENSE", ".ci/run"):
                path.write_text("")
            else:
                path.mkdir(exist_ok=True)
        self.write("_toc.yml", "root: nbs/index\n"
                   "parts: [{caption: A, chapters: [{glob: nbs/00*}]}]\n")
        self.page("index", [prose("# A book")])
        self.write("gptbook/__init__.py", "")
        for page, module in (("00_core", "core"), ("00a_figures", "figures")):
            self.page(page, good_cells(module))
            self.write(f"gptbook/{module}.py", "__all__ = []\n")
        self.write("benchmarks/results/a.json", json.dumps(
            dict(machine="m", versions={"torch": "2"}, date="2026-01-01", command="c")))

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def page(self, name, cells, **metadata):
        self.write(f"nbs/{name}.ipynb", json.dumps(
            {"cells": cells, "metadata": {"kernelspec": {"name": "python3"}, **metadata}}))


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_good_tree_passes(tree):
    for check in CHECKS:
        assert check(tree.root) == [], check.__name__


@pytest.mark.parametrize("line", [
    "from gptbook.figures import lines", "from .figures import lines", "import gptbook.figures",
    "from gptbook import lines", "def f():\n    from .figures import lines"])
def test_import_of_a_later_page_is_seen(tree, line):
    tree.write("gptbook/core.py", line)
    assert import_order(tree.root)
    tree.write("gptbook/core.py", "import torch")
    tree.write("gptbook/figures.py", "from .core import GPTModel\nfrom gptbook.core import Block")
    assert import_order(tree.root) == []


def test_orphans_are_seen(tree):
    tree.write("gptbook/old.py", "")
    assert "old" in orphans(tree.root)[0]
    (tree.root / "gptbook/old.py").unlink()
    (tree.root / "gptbook/core.py").unlink()
    assert "core" in orphans(tree.root)[0]
    tree.page("00a_figures", good_cells("core"))
    assert any("two pages" in line for line in orphans(tree.root))


def test_a_name_exported_twice_is_seen(tree):
    for module in ("core", "figures"):
        tree.write(f"gptbook/{module}.py", "__all__ = ['lines']\n")
    assert exported_twice(tree.root) == ["lines is exported by core and figures"]


@pytest.mark.parametrize("frame", [True, False])
def test_a_white_legend_is_seen(tree, frame):
    figures = pytest.importorskip("gptbook.figures")
    figure, ax = figures.canvas()
    ax.plot([0, 1], label="a")
    ax.legend(frameon=frame)
    shown = {"output_type": "display_data", "metadata": {},
             "data": {"text/html": figures.inline_svg(figure)}}
    tree.page("00_core", [*good_cells("core"), code("ax", outputs=[shown])])
    assert len(white_legends(tree.root)) == frame


def test_a_missing_docstring_is_seen(tree):
    tree.write("gptbook/core.py", "__all__ = ['f']\ndef f(): pass\ndef _g(): pass\n")
    assert len(missing_docstrings(tree.root)) == 1


def test_star_imports_are_seen(tree):
    tree.write("examples/a.py", "from torch import *\n")
    tree.page("00_core", [*good_cells("core"), code("from math import *")])
    assert len(star_imports(tree.root)) == 2


@pytest.mark.parametrize("line, bad", [
    ("torch.save(x, 'a.pt')", 1), ("pickle.dump(x, f)", 1), ("torch.load('a.pt')", 1),
    ("torch.load('a.pt', weights_only=False)", 1), ("torch.load('a.pt', weights_only=True)", 0),
    ("def export_pt(a, b): torch.save(a, b)", 0), ("json.dump(x, f)", 0)])
def test_pickles_are_seen(tree, line, bad):
    tree.write("gptbook/core.py", line)
    assert len(pickles(tree.root)) == bad


def test_network_at_import_is_seen(tree):
    tree.write("gptbook/core.py", "import socket\n"
               "try: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError: pass\n")
    assert "socket" in network_at_import(tree.root)[0]


@pytest.mark.parametrize("path", ["/ho" "me/ann/x", "/Us" "ers/ann", "C:" r"\\Users\\ann"])
def test_local_paths_are_seen(tree, path):
    tree.page("00_core", [*good_cells("core"), code(f"open('{path}')")])
    assert len(local_paths(tree.root)) == 1
    tree.page("00_core", [*good_cells("core"), code("open('checkpoints/homework/x')")])
    assert local_paths(tree.root) == []


@pytest.mark.parametrize("cells, metadata", [
    ([code("1", execution_count=3)], {}), ([code("1", metadata={"collapsed": True})], {}),
    ([code("1"), code("1")], {}), ([], {"widgets": {}}), ([], {"kernelspec": {"name": "conda"}})])
def test_unclean_notebooks_are_seen(tree, cells, metadata):
    tree.page("00_core", [*good_cells("core"), *cells], **metadata)
    assert unclean(tree.root)


@pytest.mark.parametrize("cells, what", [
    ([code("x = 1" + " " * 80 + "# wide")], "characters"), ([prose("# Second title")], "one title"),
    ([code("1", outputs=["x" * 300_000])], "kB")])
def test_limits_are_seen(tree, cells, what):
    tree.page("00_core", [*good_cells("core"), *cells])
    assert what in limits(tree.root)[0]
    tree.page("00_core", [prose("# Title")])
    assert len(limits(tree.root)) == 3


def test_pages_that_were_never_run_are_seen(tree):
    cells = [code(f"x + {i}") for i in range(5)]
    tree.page("00_core", [*good_cells("core"), *cells])
    assert never_run(tree.root) == [
        "00_core: 5 of 5 cells show nothing: run the page before it is stored"]
    ran = [{**cell, "outputs": [{"output_type": "stream"}]} for cell in cells[:3]]
    tree.page("00_core", [*good_cells("core"), *ran, *cells[3:]])
    assert never_run(tree.root) == []


def test_exercises_without_their_cells_are_seen(tree):
    good = good_cells("core")
    for cut in (2, 3, 4):                                # a stub, a solution, a check
        tree.page("00_core", good[:cut] + good[cut + 1:])
        assert exercises(tree.root)
    tree.page("00_core", [good[0], good[1]])
    assert "0 exercises" in exercises(tree.root)[0]


def test_results_without_machine_are_seen(tree):
    tree.write("benchmarks/results/a.json", '{"date": "2026-01-01", "command": "c"}')
    assert results(tree.root) == ["a.json: no machine", "a.json: no versions"]


def test_missing_files_are_seen(tree):
    (tree.root / "Makefile").unlink()
    assert missing_files(tree.root) == ["Makefile is missing"]


def test_pages_outside_the_toc_are_seen(tree):
    tree.page("05_attention", [])
    assert outside_toc(tree.root) == ["nbs/05_attention is 0 times in _toc.yml"]
    tree.write("_toc.yml", "root: nbs/index\nparts: [{caption: A, chapters: "
               "[{glob: nbs/0*}, {glob: nbs/09*}]}]\n")
    assert outside_toc(tree.root) == ["_toc.yml: nbs/09* matches no page"]
