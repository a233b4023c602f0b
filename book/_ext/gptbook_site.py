"""What the site needs beyond jupyter-book, in one Sphinx extension.

1. nbdev's `#|` directives: `read_notebook` maps them to MyST-NB tags and drops the lines.
2. Exported cells carry a marker that names their module and links to its reference.
3. The API reference: a page a module (`book/api/*.md`, written here, never committed),
   whose docstrings get a parameter list made from trailing comments (*docments*).
4. No network: MathJax is copied into the site.
5. Repository buttons appear only where a repository URL is known.
"""

import ast
import html
import inspect
import json
import os
import re
import shutil
import textwrap
from importlib.util import find_spec
from pathlib import Path

import nbformat
from docutils import nodes
from fastcore.docments import docments
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
DIRECTIVE = re.compile(r"#\s*\|\s*(.+?)\s*$")
TAGS = {  # directive -> tag of MyST-NB (or of our own: CSS class tag_…)
    "echo: false": "remove-input",
    "output: false": "remove-output",
    "code-fold: true": "hide-input",
    "eval: false": "not-run",
    "solution": "hide-cell",
    "export": "exported",
    "exporti": "exported",
    "exports": "exported",
}
DROPPED = {"hide", "default_exp", "include: false"}
PROMPTS = {"solution": "solution", "code-fold: true": "code"}
WIDGET = "application/vnd.jupyter.widget-view+json"


# 1. Notebooks ------------------------------------------------------------------------
def directives(
    source: str,  # the text of a code cell
) -> tuple[list[str], str]:  # its leading directives, and the code below them
    """Split the leading `#|` lines from a cell."""
    lines, found = source.split("\n"), []
    while lines and (match := DIRECTIVE.match(lines[0])):
        found.append(re.sub(r"\s*:\s*", ": ", match[1]))
        lines.pop(0)
    return found, "\n".join(lines).lstrip("\n")


def read_notebook(
    text: str,  # an .ipynb file
) -> nbformat.NotebookNode:  # the notebook as the site shows it
    """Read a notebook, and turn its nbdev directives into tags that MyST-NB knows."""
    notebook = nbformat.reads(text, as_version=4)
    module, cells = None, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found, cell.source = directives(cell.source)
            for name in found:
                if name.startswith("default_exp"):
                    module = name.split()[-1]
            if not cell.source or any(name.split()[0] in DROPPED for name in found) \
                    or "include: false" in found:
                continue
            tag(cell, found, module)
        cells.append(cell)
    notebook.cells = cells
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def tag(cell, found, module):
    """Write the tags and prompts of one cell, and drop the outputs no site can show."""
    tags = cell.metadata.setdefault("tags", [])
    for name in found:
        key = name.split()[0] if name.startswith(("export", "solution")) else name
        if key in TAGS:
            tags.append(TAGS[key])
        if key in PROMPTS:
            prompts = cell.metadata.setdefault("mystnb", {})
            prompts["code_prompt_show"] = f"Show {PROMPTS[key]}"
            prompts["code_prompt_hide"] = f"Hide {PROMPTS[key]}"
    if "exported" in tags and module:
        cell.metadata["gptbook_module"] = module
    cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]


# 2. The marker of exported cells -----------------------------------------------------
def mark_exported(app, doctree, docname):
    """Put a small link to the module's reference into each exported cell."""
    if app.builder.format != "html":
        return
    for cell in list(doctree.findall(nodes.container)):
        module = (cell.get("cell_metadata") or {}).get("gptbook_module")
        if not module:
            continue
        target = app.builder.get_relative_uri(docname, f"book/api/{module}")
        link = (f'<a class="exported-mark" href="{html.escape(target)}" title="This cell '
                f'is part of the package: gptbook.{module}">gptbook.{module}</a>')
        for part in cell.findall(nodes.container):
            if part.get("nb_element") == "cell_code_source":
                part.insert(0, nodes.raw("", link, format="html"))
                break


# 3. The API reference ----------------------------------------------------------------
def pages() -> list[dict]:
    """The notebooks that export a module, in reading order: name, title, module, names."""
    found = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells]
        module = re.search(r"^#\s*\|\s*default_exp\s+(\w+)", "\n".join(sources), re.M)
        title = next((re.search(r"^# (.+)$", s, re.M) for s in sources
                      if s.startswith("# ")), None)
        if module and (ROOT / "gptbook" / f"{module[1]}.py").exists():
            found.append({"page": path.stem, "module": module[1],
                          "title": title[1] if title else path.stem,
                          "names": exported_names(ROOT / "gptbook" / f"{module[1]}.py")})
    return found


def exported_names(path: Path) -> list[str]:
    """`__all__` of a module, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


MODULE_PAGE = """\
# {module}

> `from gptbook.{module} import …`, made by the page [{title}](../../nbs/{page}.ipynb)

```{{eval-rst}}
.. automodule:: gptbook.{module}
   :members:
   :undoc-members:
   :no-value:

{constants}
```
"""


def constants(module: str, names: list[str]) -> str:
    """The constants with a trailing comment: autodoc leaves out those without `#:`."""
    source = (ROOT / "gptbook" / f"{module}.py").read_text(encoding="utf-8")
    lines, out = source.split("\n"), []
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else \
            node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id in names:
            comment = lines[node.lineno - 1].partition("  #")[2].strip()
            if not comment:  # then the page says what it is, not the reference
                continue
            out.append(f".. py:data:: {target.id}\n   :module: gptbook.{module}\n\n"
                       f"   {rst(comment)}\n")
    return "\n".join(out)


def is_command(node: ast.AST) -> bool:
    """Whether click made a command of this function."""
    return any(re.search(r"\b(command|group)\(", ast.unparse(d)) for d in node.decorator_list)


def documented(module: str, names: list[str]) -> list[str]:
    """The names that have an entry: all but constants without comment, and the commands of
    the command line, which are no functions any more and explain themselves by `--help`."""
    tree = ast.parse((ROOT / "gptbook" / f"{module}.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_command(node)}
    explained = re.findall(r"py:data:: (\w+)", constants(module, names))
    return [name for name in names if name in defined or name in explained]


def write_api_pages():
    """Write `book/api/MODULE.md` for each module, and remove those of modules that left."""
    folder = ROOT / "book" / "api"
    folder.mkdir(exist_ok=True)
    wanted = {f"{page['module']}.md": MODULE_PAGE.format(
        **page, constants=constants(page["module"], page["names"])) for page in pages()}
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


class ModuleTable(SphinxDirective):
    """`{module-table}`: the modules in reading order, with their page and their names."""

    def run(self):
        lines = ["| Module | Page | Names |", "|:---|:---|:---|"]
        for page in pages():
            names = " ".join(f"{{py:obj}}`{n} <gptbook.{page['module']}.{n}>`"
                             for n in documented(page["module"], page["names"]))
            lines.append(f"| [{page['module']}](api/{page['module']}.md) | "
                         f"[{page['title']}](../nbs/{page['page']}.ipynb) | {names} |")
        box = nodes.container(classes=["module-table"])
        self.state.nested_parse(lines, self.content_offset, box)
        return [box]


def parameters(
    obj,  # a function, method or class
) -> list[tuple]:  # (name, annotation, default, comment); the last one may be "return"
    """The parameters as the source spells them, with their trailing comments."""
    try:
        source = textwrap.dedent(inspect.getsource(obj))
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return []
    if isinstance(tree, ast.ClassDef):
        init = next((n for n in tree.body if isinstance(n, ast.FunctionDef)
                     and n.name == "__init__"), None)
        if init is None:
            return fields(tree, source)
        tree, obj = init, obj.__init__
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return []
    comments = docments(obj, args_kwargs=True) or {}
    spell = lambda node: ast.unparse(node) if node is not None else ""
    args = tree.args
    ordered = args.posonlyargs + args.args
    defaults = [None] * (len(ordered) - len(args.defaults)) + args.defaults
    rows = [(a.arg, spell(a.annotation), spell(d)) for a, d in zip(ordered, defaults)]
    rows += [(f"*{args.vararg.arg}", spell(args.vararg.annotation), "")] if args.vararg else []
    rows += [(a.arg, spell(a.annotation), spell(d))
             for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    rows += [(f"**{args.kwarg.arg}", spell(args.kwarg.annotation), "")] if args.kwarg else []
    rows = [r for r in rows if r[0] not in ("self", "cls")]
    rows.append(("return", spell(tree.returns), ""))
    return [(*row, comments.get(row[0].lstrip("*")) or "") for row in rows]


def fields(tree: ast.ClassDef, source: str) -> list[tuple]:
    """The annotated fields of a dataclass or named tuple, with their trailing comments."""
    lines = source.split("\n")
    rows = []
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            tail = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
            default = ast.unparse(node.value) if node.value is not None else ""
            rows.append((node.target.id, ast.unparse(node.annotation), default,
                         tail.partition("#")[2].strip()))
    return rows


def rst(text: str) -> str:
    """Plain docstring prose as reStructuredText: `code` and $math$ survive, no surprises."""
    parts = re.split(r"(`[^`]+`|\$[^$\s][^$]*\$)", text.replace("``", "`"))
    for i, part in enumerate(parts):
        if i % 2 and part[0] == "`":
            parts[i] = f"\\ ``{part[1:-1]}``\\ "
        elif i % 2:
            parts[i] = f"\\ :math:`{part[1:-1]}`\\ "
        else:
            parts[i] = re.sub(r"([\\*_|`])", r"\\\1", part)
    return "".join(parts)


def prose(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: paragraphs, bullets, indented blocks as they are."""
    out = []
    for block in re.split(r"\n\s*\n", textwrap.dedent("\n".join(lines)).strip()):
        rows = block.split("\n")
        if all(row.startswith("    ") for row in rows):
            out += ["::", "", *rows, ""]
        elif rows[0].lstrip().startswith("- "):
            for row in rows:
                bullet = row.lstrip().startswith("- ")
                out.append(("- " if bullet else "  ") + rst(row.lstrip().removeprefix("- ")))
            out.append("")
        else:
            out += [*(rst(row.strip()) for row in rows), ""]
    return out


def describe(app, what, name, obj, options, lines):
    """autodoc hook: prose first, then each parameter with type, default and comment."""
    if what == "module":
        lines.clear()
        return
    if what in ("data", "attribute"):
        lines[:] = prose(lines) if lines and is_documented(obj, lines) else []
        return
    text = prose(lines) if lines else []
    target = obj.fget if isinstance(obj, property) else obj
    for param, annotation, default, comment in parameters(target):
        if param == "return":
            if annotation not in ("", "None") or comment:
                kind = f"``{annotation}``" if annotation not in ("", "None") else ""
                text.append(f":returns: {join(kind, rst(comment))}")
        elif annotation or comment:
            kind = f"{annotation} = {default}".strip() if default else annotation
            star = param.replace("*", r"\*")
            text.append(f":param {star}: {join(f'``{kind}``' if kind else '', rst(comment))}")
    lines[:] = text + [""]


def join(*parts):
    """The parts that are there, with a middle dot between."""
    return " · ".join(part for part in parts if part)


def is_documented(obj, lines):
    """False where autodoc shows the docstring of the object's type, which says nothing."""
    return "\n".join(lines).strip() != (inspect.getdoc(type(obj)) or "").strip()


def skip_fields(app, what, name, obj, skip, options):
    """Fields are listed as parameters already; torch's bookkeeping is no interface."""
    if what == "class" and not (callable(obj) or isinstance(obj, (property, classmethod,
                                                                  staticmethod))):
        return True
    return None


# 4. No network -----------------------------------------------------------------------
def copy_mathjax(app, exception):
    """Copy what one bundle of MathJax needs into the site (from sphinx-mathjax-offline)."""
    if exception is None and app.builder.format == "html":
        source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
        target = Path(app.outdir) / "_static" / "mathjax"
        for part in ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts", "ui",
                     "a11y"):
            if (source / part).is_dir():
                shutil.copytree(source / part, target / part, dirs_exist_ok=True)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / part, target / part)


def drop_thebe(app):
    """jupyter-book puts thebe on every page; this book has no live kernel."""
    app.registry.css_files[:] = [f for f in app.registry.css_files if "thebe" not in f[0]]
    for listeners in app.events.listeners.values():
        listeners[:] = [listener for listener in listeners
                        if not listener.handler.__module__.startswith("sphinx_thebe")]


# 5. Buttons --------------------------------------------------------------------------
def repository_buttons(app, config):
    """Show repository and launch buttons where a repository URL is known, else none."""
    options = config.html_theme_options
    url = os.environ.get("GPTBOOK_REPOSITORY_URL") or options.get("repository_url") or ""
    options["repository_url"] = url
    for button in ("repository", "issues", "edit_page"):
        options[f"use_{button}_button"] = bool(url)
    if url:
        options.setdefault("launch_buttons", {})["colab_url"] = \
            "https://colab.research.google.com"


def no_edit_of_generated(app, pagename, templatename, context, doctree):
    """The reference is written at build time: there is no file to edit."""
    if pagename.startswith("book/api/"):
        context["theme_use_edit_page_button"] = False


def setup(app):
    write_api_pages()  # before the table of contents is read
    app.add_directive("module-table", ModuleTable)
    drop_thebe(app)
    app.connect("config-inited", repository_buttons)
    app.connect("html-page-context", no_edit_of_generated, priority=400)
    app.connect("doctree-resolved", mark_exported)
    app.connect("autodoc-process-docstring", describe)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
