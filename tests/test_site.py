"""The built site, opened page by page in headless Chromium with the network cut.

`make test` builds the site before the tests; if it is missing, it is built here."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
sys.path.insert(0, str(ROOT / "book"))
from chromium import Browser, find_chromium  # noqa: E402

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here: install chromium, or set CHROMIUM to one")
MATH = """({sources: document.querySelectorAll('.math').length,
  shown: document.querySelectorAll('.math mjx-container').length,
  wrong: document.querySelectorAll('mjx-merror').length,
  raw: [...document.querySelectorAll('.math')].filter(e => /\\\\[(\\[]/.test(e.innerText)).length})"""
WIDTH = "document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="session")
def site():
    """The folder of the built site."""
    if not (SITE / "index.html").exists():
        command = shutil.which("jupyter-book") or str(Path(sys.executable).parent / "jupyter-book")
        subprocess.run([command, "build", str(ROOT), "--all", "-W", "--keep-going", "--quiet"],
                       check=True, timeout=900)
    return SITE


def html_files(site: Path) -> list[Path]:
    return sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)


def page_name(path: Path, site: Path) -> str:
    return path.relative_to(site).with_suffix("").as_posix()


# In the browser ----------------------------------------------------------------------
@needs_chromium
def test_a_page_that_sends_the_reader_on_is_followed(tmp_path):
    """It leaves while its formulas are waited for, as the front door may on a slow machine."""
    (tmp_path / "a.html").write_text("<script>MathJax = {startup: {promise: new Promise(() => 0)}};"
                                     "setTimeout(() => location = 'b.html', 50)</script>")
    (tmp_path / "b.html").write_text("<title>there</title>")
    with Browser() as browser:
        page = browser.page().open((tmp_path / "a.html").as_uri())
        assert page.evaluate("document.title") == "there"


def visit(browser, path: Path) -> dict:
    """What one page asks for and shows, and by how much it is wider than a telephone."""
    page = browser.page(1300)
    try:
        page.open(path.resolve().as_uri())
        math = page.evaluate(MATH)
        page.resize(400, 900)
        return {"math": math, "too wide": page.evaluate(WIDTH), "outside": page.outside,
                "errors": page.errors}
    finally:
        page.close()


@pytest.fixture(scope="module")
def visits(site):
    """{page name: what was seen}, with one browser."""
    with Browser() as browser:
        return {page_name(p, site): visit(browser, p) for p in html_files(site)}


@needs_chromium
def test_site_asks_the_network_for_nothing(visits):
    assert {name: seen["outside"] for name, seen in visits.items() if seen["outside"]} == {}


@needs_chromium
def test_no_script_fails_and_no_file_is_missing(visits):
    assert {name: seen["errors"] for name, seen in visits.items() if seen["errors"]} == {}


@needs_chromium
def test_every_formula_is_typeset(visits):
    for name, seen in visits.items():
        math = seen["math"]
        assert math["shown"] == math["sources"] and not math["wrong"] and not math["raw"], name
    assert sum(seen["math"]["shown"] for seen in visits.values()) > 10


@needs_chromium
def test_no_page_is_wider_than_a_telephone(visits):
    assert {name: seen["too wide"] for name, seen in visits.items() if seen["too wide"] > 1} == {}


@needs_chromium
def test_the_browser_checks_can_fail(site, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<img src='http://example.org/a.png'><img src='missing.png'><script>oops()</script>"
        "<span class='math'>\\(x^2\\)</span><div style='width:2000px'>wide</div>")
    with Browser() as browser:
        seen = visit(browser, tmp_path / "bad.html")
    assert seen["outside"] == ["http://example.org/a.png"]
    assert any("oops" in e for e in seen["errors"])
    assert any("missing.png" in e for e in seen["errors"])
    assert seen["math"] == {"sources": 1, "shown": 0, "wrong": 0, "raw": 1}
    assert seen["too wide"] > 500


@needs_chromium
def test_search_answers_without_a_server(site):
    with Browser() as browser:
        page = browser.page().open((site / "search.html").resolve().as_uri() + "?q=attention",
                                   settle=1.5)
        assert page.evaluate("document.querySelectorAll('#search-results li').length") > 1
        page.open((site / "search.html").resolve().as_uri() + "?q=qqzzxx", settle=1.5)
        assert page.evaluate("document.querySelectorAll('#search-results li').length") == 0


@needs_chromium
def test_the_theme_button_switches_to_dark(site):
    page_file = next(p for p in html_files(site) if p.parent.name == "nbs")
    theme = "document.documentElement.dataset.theme"
    ground = "getComputedStyle(document.body).backgroundColor"
    with Browser() as browser:
        page = browser.page().open(page_file.resolve().as_uri())
        seen = {}
        for _ in range(3):
            page.evaluate("document.querySelector('.theme-switch-button').click()")
            seen[page.evaluate(theme)] = page.evaluate(ground)
    assert set(seen) == {"light", "dark"} and seen["light"] != seen["dark"]


# In the files ------------------------------------------------------------------------
class Links(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.navigation, self._nav = set(), [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        for key in ("href", "src"):
            if found.get(key):
                self.links.append(found[key])
        self._nav += tag == "nav"
        if tag == "a" and self._nav and found.get("href"):
            self.navigation.append(found["href"])

    def handle_endtag(self, tag):
        self._nav -= tag == "nav"


def dead_links(folder: Path) -> list[str]:
    """Links to a file or a place in a file that is not there."""
    pages = {p.resolve(): Links(p) for p in html_files(folder)}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            if not target.exists():
                dead.append(f"{path.name}: {link}")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].ids:
                    dead.append(f"{path.name}: {link}")
    return dead


def test_no_internal_link_is_dead(site):
    assert dead_links(site) == []


def test_dead_links_are_seen(tmp_path):
    (tmp_path / "a.html").write_text("<p id=x><a href='b.html'>1</a><a href='#y'>2</a>"
                                     "<a href='#x'>3</a><a href='http://example.org'>4</a>")
    assert dead_links(tmp_path) == ["a.html: b.html", "a.html: #y"]


def test_every_page_is_reached_from_the_contents(site):
    start = site / "nbs" / "index.html"
    seen, queue = {start.resolve()}, [start.resolve()]
    while queue:
        path = queue.pop()
        for link in Links(path).navigation:
            target = (path.parent / unquote(urlsplit(link).path)).resolve()
            if target.suffix == ".html" and target not in seen:
                seen.add(target)
                queue.append(target)
    pages = {site / "nbs" / f"{p.stem}.html" for p in (ROOT / "nbs").glob("*.ipynb")}
    pages |= {site / "book/api" / p.name for p in (site / "book/api").glob("*.html")}
    assert {p.name for p in pages if p.resolve() not in seen} == set()


def notebooks():
    return sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_directives_are_honoured(site, path):
    text = (site / "nbs" / f"{path.stem}.html").read_text(encoding="utf-8")
    shown = re.sub(r"<[^>]+>", "", text)
    cells = [("".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
             if c["cell_type"] == "code"]
    assert not re.search(r"^#\s*\|\s*(hide|export|default_exp|eval|solution)", shown, re.M)
    assert "default_exp" not in shown
    solutions = sum(bool(re.search(r"^#\s*\|\s*solution", c, re.M)) for c in cells)
    assert text.count("Show solution") == solutions
    exported = sum(bool(re.search(r"^#\s*\|\s*export", c, re.M)) for c in cells)
    assert text.count('class="exported-mark"') == exported


def test_the_notebook_itself_can_be_downloaded(site):
    for path in notebooks():
        text = (site / "nbs" / f"{path.stem}.html").read_text(encoding="utf-8")
        link = re.search(r'href="([^"]*_sources/[^"]*\.ipynb)"', text)
        assert link, path.name
        assert ((site / "nbs" / link[1]).resolve().read_bytes() == path.read_bytes())


def test_repository_buttons_need_a_repository(site):
    text = (site / "nbs" / f"{notebooks()[0].stem}.html").read_text(encoding="utf-8")
    has = "btn-source-repository-button" in text or "dropdown-source-buttons" in text
    assert has == bool(os.environ.get("GPTBOOK_REPOSITORY_URL"))
    assert "THEBE_JS_URL" not in text and "unpkg" not in text


def public_functions():
    """(module, name, comments of its parameters) for each exported function."""
    for path in sorted((ROOT / "gptbook").glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        names = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                      and getattr(n.targets[0], "id", "") == "__all__"), [])
        lines = text.split("\n")
        for node in tree.body:
            command = any(re.search(r"\b(command|group)\(", ast.unparse(d))
                          for d in getattr(node, "decorator_list", ()))
            if isinstance(node, ast.FunctionDef) and node.name in names and not command:
                comments = {a.arg: lines[a.lineno - 1].partition("  #")[2].strip()
                            for a in node.args.args if a.lineno != node.lineno}
                yield path.stem, node.name, comments


def test_the_reference_lists_every_function_with_its_parameters(site):
    found = 0
    for module, name, comments in public_functions():
        page = site / "book/api" / f"{module}.html"
        text = page.read_text(encoding="utf-8")
        assert f'id="gptbook.{module}.{name}"' in text, f"{module}.{name}"
        plain = re.sub(r"\W+", "", re.sub(r"<[^>]+>|&\w+;", "", text))
        for parameter, comment in comments.items():
            words = re.sub(r"\W+", "", re.sub(r"&|<|>", "", comment))
            assert words in plain, f"{module}.{name}: {parameter}: {comment}"
            found += bool(words)
    assert found > 20
