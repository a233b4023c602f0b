"""Page 00a: figures say what the data say, in both themes, and let nothing out of a text."""
import base64
import html
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptbook import figures
from gptbook.figures import (HEAT, INK, PALETTE, Drawing, attention_view, bars, boxes,
                             _apart, canvas, claims_table, grid, heatmap, inline_svg, lines, spans,
                             word_bars)

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "book"))
from chromium import Browser, find_chromium  # noqa: E402


def page_of(shown) -> str:
    return shown._repr_html_()


def causal(*shape, seed=0):
    weights = np.tril(np.exp(np.random.default_rng(seed).normal(size=shape) * 2))
    return weights / weights.sum(-1, keepdims=True)


# ---- colours ---------------------------------------------------------------------------

def luminance(color):
    c = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    c = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c]
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def theme(name):
    """(background, ink) of a theme, as the site's style sheet has them."""
    css = (ROOT / "book/static/gptbook.css").read_text()
    block = re.search(rf'html\[data-theme="?{name}"?\] *{{(.*?)}}', css, re.S).group(1)
    return tuple(re.search(rf"--pst-color-{key}: *(#[0-9a-f]{{6}})", block).group(1)
                 for key in ("background", "text-base"))


def test_the_page_speaks_of_the_themes_that_the_site_has():
    source = "".join("".join(c["source"]) for c in
                     json.loads((ROOT / "nbs/00a_figures.ipynb").read_text())["cells"])
    assert f'LIGHT, DARK = "{theme("light")[0]}", "{theme("dark")[0]}"' in source


@pytest.mark.parametrize("name", ["light", "dark"])
def test_every_colour_stands_out_from_both_pages(name):
    page = theme(name)[0]
    for color in [*PALETTE.values(), *HEAT.values(), INK]:
        assert contrast(color, page) >= 3, (color, page)
    assert contrast("#f0e442", theme("light")[0]) < 3        # the check can fail


def mixed(a, b, share):
    """Two colours mixed as a browser does it in sRGB, for `color-mix` and for opacity."""
    pairs = [(int(a[i:i + 2], 16), int(b[i:i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * x + (1 - share) * y):02x}" for x, y in pairs)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_coloured_words_can_be_read(name):
    page, ink = theme(name)
    drawing = lines(None, {str(i): [i, i] for i in range(len(PALETTE))}, title="T")
    words = re.findall(r"<text[^>]*fill: color-mix\(in srgb, (#\w{6}) (\d+)%, currentColor\)",
                       drawing.body)
    assert [color for color, _ in words] == list(PALETTE.values())
    for color, percent in words:
        assert contrast(mixed(color, ink, int(percent) / 100), page) >= 4.5, color
    assert min(contrast(color, page) for color, _ in words) < 4.5    # it needs the ink


@pytest.mark.parametrize("name", ["light", "dark"])
def test_numbers_in_cells_can_be_read(name):
    page, ink = theme(name)

    def faintest(annotate):
        shown = heatmap(np.linspace(-1, 1, 41)[None], title="T", annotate=annotate)
        cells = pixels(shown).reshape(-1, 4).tolist()
        colors = ["#" + "".join(f"{v:02x}" for v in cell[:3]) for cell in cells]
        return min(contrast(mixed(color, page, cell[3] / 255), ink)
                   for color, cell in zip(colors, cells))

    assert faintest(True) >= 4.5 > faintest(False)


# ---- inline SVG ------------------------------------------------------------------------

def examples():
    x = np.linspace(0.001, 0.009, 50)
    return {
        "lines": lines(x, {"a <b>": np.sin(1000 * x), "c": np.cos(1000 * x)}, title="T",
                       xlabel="x", ylabel="y", band={"c": (x - 1, x + 1)},
                       reference={"r": 0.5}, vertical={"v": 0.004}),
        "heatmap": heatmap(causal(5, 5), title="T", annotate=True),
        "grid": grid(causal(3, 5, 5), titles="abc", title="T"),
        "bars": bars({"a": 0.0655, "b": -0.1311}, title="T", form=".4f",
                     errors={"a": 0.01}, reference={"r": 0.02}),
    }


@pytest.mark.parametrize("name", ["lines", "heatmap", "grid", "bars"])
def test_svg_keeps_to_itself_and_takes_the_pages_ink(name):
    drawing = examples()[name]
    svg = drawing.body
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "<style" not in svg and "font-family:" not in svg
    assert INK not in svg and "#000000" not in svg and "currentColor" in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    used = re.findall(r'(?:url\(|href=")#([^")]+)', svg)
    assert len(ids) == len(set(ids)) and set(used) <= set(ids) and set(used)
    raw = drawing.figure
    assert re.findall(r'viewBox="[^"]*"', svg)[0].split()[2] == str(raw.get_figwidth() * 72)
    assert svg == examples()[name].body                      # the same bytes in every run


def test_ids_of_two_figures_never_meet():
    found = [set(re.findall(r'\bid="([^"]+)"', d.body)) for d in examples().values()]
    for a, b in itertools.combinations(found, 2):
        assert not a & b


def texts(svg):
    return [html.unescape(t) for t in re.findall(r"<text[^>]*>([^<]*)<", svg)]


def test_numbers_are_shortened_in_tags_and_never_in_words():
    figure, ax = canvas()
    ax.text(0.5, 0.2, "code", family="monospace")
    ax.text(0.5, 0.5, f"0.12345 id=\"a\" : {INK} font-family: x; 3.14159")
    svg = inline_svg(figure)
    assert f"0.12345 id=\"a\" : {INK} font-family: x; 3.14159" in texts(svg)
    assert not re.search(r'd="[^"]*\d\.\d{3}', svg)
    assert re.search(r"font-family: monospace;[^>]*>code<", svg)
    shown = texts(examples()["bars"].body)
    assert "0.0655" in shown and "-0.1311" in shown
    assert "0.002" in texts(examples()["lines"].body)


def test_large_figures_become_pixels():
    figure, ax = canvas()
    ax.scatter(*np.random.default_rng(0).normal(size=(2, 3000)))
    body = Drawing(figure, 'say "this"', "T").body
    assert body.startswith('<img alt="say &quot;this&quot;" src="data:image/png;base64,')
    assert base64.b64decode(body.split(",")[1].rstrip('">'))[:4] == b"\x89PNG"


def test_helpers_leave_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    for name, drawing in examples().items():
        page_of(drawing)
        drawing.save(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in vars(figures)


def test_a_saved_figure_has_its_title_and_the_page_keeps_its_own(tmp_path):
    fresh, saved = (lines(None, {"a": [1, 2], "b": [2, 1]}, title="Found") for _ in "ab")
    for _ in range(2):
        saved.save(tmp_path / "figure.svg")
        assert texts((tmp_path / "figure.svg").read_text()).count("Found") == 1
    assert saved.body == fresh.body and "Found" not in texts(fresh.body)


def test_importing_the_package_imports_no_matplotlib():
    code = "import gptbook, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


NOTEBOOK = """
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
shell = InteractiveShell.instance()
shell.run_cell("from gptbook.figures import use_style; use_style()").raise_error()
for cell in ("import matplotlib.pyplot as plt; plt.plot([1, 2]);", "plt.plot([3]); plt.show()"):
    with capture_output() as got:
        shell.run_cell(cell).raise_error()
    for shown in got.outputs:
        kinds = [k for k in shown.data if k != "text/plain"]
        print(kinds, "<svg" in shown.data.get("text/html", ""))
"""


def test_use_style_in_a_notebook_shows_each_figure_once_as_svg():
    pytest.importorskip("IPython")
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    out = subprocess.run([sys.executable, "-c", NOTEBOOK], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert out.stdout.splitlines() == ["['text/html'] True"] * 2, out.stdout + out.stderr


# ---- lines, matrices, bars -------------------------------------------------------------

def test_lines_has_one_pair_of_axes_and_its_data():
    y = np.random.default_rng(0).normal(size=(2, 30))
    drawing = lines(None, {"a": y[0], "b": torch.tensor(y[1])}, title="T")
    assert len(drawing.figure.axes) == 1
    for line, values in zip(drawing.ax.get_lines(), y):
        assert np.array_equal(line.get_xdata(), np.arange(30))
        assert np.allclose(line.get_ydata(), values)


@pytest.mark.parametrize("length", [1, 12])
def test_names_of_columns_do_not_touch(length):
    drawing = heatmap(np.eye(3, 14), columns=["m" * length] * 14, title="T")
    drawing.figure.draw_without_rendering()
    labels = drawing.ax.get_xticklabels()
    seen = [label.get_window_extent() for label in labels]
    apart = all(a.x1 < b.x0 for a, b in zip(seen, seen[1:]))
    turned = {label.get_rotation() for label in labels}
    assert turned == ({0} if length == 1 else {35}) and apart == (length == 1)


@pytest.mark.parametrize("wish, place", [
    ([0, 5, 9], [0, 5, 9]), ([3, 3], [2, 4]), ([-9, 3, 3, 3, 20], [-9, 1, 3, 5, 20]),
    ([0, 1, 4.5, 5], [-0.5, 1.5, 3.75, 5.75]), ([0, 0, 2.5], [-7 / 6, 5 / 6, 17 / 6])])
def test_labels_move_no_further_than_they_must(wish, place):
    """Least squares under the gap; whoever stands alone stays where the line ends."""
    assert np.allclose(_apart(wish, 2), place)


@given(st.lists(st.integers(-50, 50).map(lambda n: n / 5), min_size=2, max_size=6))
@example([5.6, 5.6, 5.4, 6.8, -6.6, 6.6])  # pushed past the top: the layout gives way
@example([-2.6, -3.2, 6.0, 6.0])
@settings(max_examples=6, deadline=None)
def test_labels_at_line_ends_do_not_touch(ends):
    drawing = lines([0, 1], {str(i): [0, y] for i, y in enumerate(ends)}, title="T")
    drawing.figure.draw_without_rendering()
    at = sorted(a.get_window_extent().y0 for a in drawing.ax.texts)
    assert np.diff(at).min() > 12.5 * 100 / 72 * 0.98        # a line of text apart
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    heights = [drawing.ax.texts[i].get_window_extent().y0 for i in order]
    assert all(b > a for a, b in zip(heights, heights[1:])
               ) or len(set(ends)) < len(ends)               # in the order of the lines


@pytest.mark.parametrize("log", ["", "y"])
def test_a_reference_far_from_the_lines_is_shown(log):
    drawing = lines([1, 2], {"a": [8, 9]}, title="T", reference={"best": 0.5}, log=log,
                    vertical={"here": 3})
    (low, high), (left, right) = drawing.ax.get_ylim(), drawing.ax.get_xlim()
    assert low <= 0.5 < 9 <= high and left <= 1 < 3 <= right
    assert lines([1], {"a": [8]}, title="T", ylim=(0, 5)).ax.get_ylim() == (0, 5)


@pytest.mark.parametrize("log", ["x", "y", "xy"])
def test_logarithmic_axes_have_plain_numbers(log):
    x = np.geomspace(1, 1e4, 20)
    drawing = lines(x, {"a": x, "b": x ** 2}, title="T", log=log)
    assert all(re.fullmatch(r"[\d.e+−-]+|a|b", t) for t in texts(drawing.body))


def pixels(drawing, n=0):
    return np.asarray(drawing.figure.axes[n].images[0].get_array())


def test_heatmap_opacity_is_magnitude_and_hue_is_sign():
    matrix = np.array([[0.0, 1.0, -2.0], [np.nan, 4.0, np.inf]])
    got = pixels(heatmap(matrix, title="T"))
    assert got[..., 3].tolist() == [[0, 64, 128], [30, 255, 30]]
    plus, minus = ([int(HEAT[k][i:i + 2], 16) for i in (1, 3, 5)] for k in HEAT)
    assert got[0, 1, :3].tolist() == got[1, 1, :3].tolist() == plus
    assert got[0, 2, :3].tolist() == minus


def test_heatmap_writes_the_values_it_was_given():
    matrix = np.array([[0.125, 2.5], [3.75, -1.0]])
    drawing = heatmap(matrix, title="T", annotate=".3f", hidden=[[0, 1], [0, 0]])
    assert [t.get_text() for t in drawing.ax.texts] == ["0.125", "3.750", "-1.000"]


def test_grid_has_one_scale():
    panels = grid([np.full((2, 2), 1.0), np.full((2, 2), 0.25)], title="T")
    assert pixels(panels, 0).max(initial=0, where=[False, False, False, True]) == 255
    assert pixels(panels, 1)[..., 3].max() == 64


@given(st.lists(st.floats(-1e6, 1e6).filter(lambda v: abs(v) > 1e-6), min_size=1,
                max_size=5))
@settings(max_examples=10, deadline=None)
def test_bars_begin_at_zero(values):
    drawing = bars({f"bar {i}": v for i, v in enumerate(values)}, title="T")
    low, high = drawing.ax.get_xlim()
    assert low <= 0 <= high
    for patch, value in zip(drawing.ax.patches, values):
        assert patch.get_x() == 0 and patch.get_width() == value


WEIRD = [[], 0.5, float("nan"), [float("nan")] * 2, [float("inf"), 1], [[1, 2], [3, 4]],
         [[float("nan")]], torch.zeros(0), torch.ones(2, 2), [-1, 2], np.ones((2, 2, 2))]
HELPERS = {
    "lines": lambda v: lines(None, {"a": v}, title="T"),
    "lines over x": lambda v: lines(v, {"a": [1, 2]}, title="T", log="xy"),
    "heatmap": lambda v: heatmap(v, title="T", annotate=True),
    "grid": lambda v: grid([v, v], title="T"),
    "bars": lambda v: bars({"a": v}, title="T"),
    "word_bars": lambda v: word_bars(["a", "b"], v),
    "attention_view": lambda v: attention_view(v, ["a", "b"]),
}


@pytest.mark.parametrize("name", HELPERS)
@pytest.mark.parametrize("value", WEIRD, ids=lambda v: repr(v)[:24].replace("\n", ""))
@pytest.mark.filterwarnings("ignore:Attempt to set non-positive:UserWarning")
def test_odd_values_give_a_picture_or_a_value_error(name, value):
    try:
        assert "gb" in page_of(HELPERS[name](value))
    except ValueError as error:
        assert len(str(error)) > 10


@pytest.mark.parametrize("call, words", [
    (lambda: lines(None, {}, title="T"), "series is empty"),
    (lambda: lines([1, 2, 3], {"loss": [1, 2]}, title="T"), r"loss.*\(2,\).*\(3,\)"),
    (lambda: heatmap(np.ones(3), title="T"), "1 axes"),
    (lambda: heatmap(np.ones((2, 2)), title="T", hidden=[[True]]), r"\(1, 1\).*\(2, 2\)"),
    (lambda: grid([np.ones((2, 2))], titles=["a", "b"]), "2 titles for 1"),
    (lambda: grid([np.ones((2, 2)), np.ones(3)]), r"1 axes, not 2: \(3,\)"),
    (lambda: bars({}, title="T"), "values is empty"),
    (lambda: spans("abc", [(1, 9, "x")]), "1:9.*3 characters"),
    (lambda: spans("abc", [(2, 1, "x")]), "2:1.*3 characters"),
    (lambda: word_bars(["a"], [1, 2]), "1 words"),
    (lambda: boxes([["a", "b"]], [("a", "c")]), "'c'.*'a', 'b'"),
    (lambda: boxes([["a", "a"]]), "two boxes"),
    (lambda: claims_table([("a", 1)]), "claim, this machine, H200, verdict"),
    (lambda: attention_view(causal(3, 3), ["a"]), r"T = 1 tokens"),
    (lambda: attention_view(2 * np.eye(2), ["a", "b"]), "softmax.*0 to 2"),
    (lambda: attention_view(np.eye(2), ["a", "b"], layer=1), r"\[1, 0, 1\].*\[1, 1, 2\]"),
    (lambda: attention_view(causal(6, 6, 64, 64), ["x"] * 64), "more than 60,000"),
])
def test_errors_name_the_values(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_title_must_be_given():
    for helper in (lines, heatmap):
        with pytest.raises(TypeError, match="title"):
            helper([1], {"a": [1]}) if helper is lines else helper([[1]])


# ---- text ------------------------------------------------------------------------------

@given(st.text(max_size=40), st.data())
@settings(max_examples=60, deadline=None)
def test_spans_keep_every_character(text, data):
    text = text.replace("\r", "")
    places = st.tuples(st.integers(0, len(text)), st.integers(0, len(text)), st.text("ab<"))
    marked = [(min(a, b), max(a, b), c) for a, b, c in
              data.draw(st.lists(places, max_size=4))]
    shown = spans(text, marked).body
    plain = re.sub(r"&hairsp;<small.*?</small>", "", shown, flags=re.S)
    plain = re.sub(r"<[^>]*>", "", plain.replace("<br>", "\n"))
    assert html.unescape(plain) == html.unescape(html.escape(text))
    marks = re.findall(r"<mark[^>]*>(.*?)</mark>", shown, re.S)
    covered = sum(any(a <= i < b for a, b, _ in marked) for i in range(len(text)))
    assert sum(len(html.unescape(m.replace("<br>", "\n"))) for m in marks) == covered
    names = re.findall(r"<small[^>]*>(.*?)</small>", shown)
    assert sorted(html.unescape(", ".join(names)).replace("‸", "").split(", ")) == sorted(
        c for *_, c in marked or [("",)])


@given(st.lists(st.tuples(st.text(), st.floats(0, 1e6)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_word_bars_show_each_word_with_its_number(pairs):
    words, values = zip(*pairs)
    shown = word_bars(words, values).body
    assert re.findall(r"<small>([\d.]+)</small>", shown) == [f"{v:.1f}" for v in values]
    tall = [float(v) for v in re.findall(r"height:([\d.]+)em", shown)]
    top = max(values) or 1
    assert all(abs(t - 2.6 * (v / top)) < 0.006 for t, v in zip(tall, values))


def test_word_bars_differ_in_height_alone():
    shown = word_bars(["a", "incomprehensibly"], [1, 1]).body
    assert re.findall(r"[\w-]*width:[\d.]+em", shown) == ["width:1.9em"] * 2


def test_two_strips_of_word_bars_can_share_a_scale():
    assert "height:1.30em" in word_bars(["a"], [1], vmax=2).body
    assert "height:2.60em" in word_bars(["a"], [3], vmax=2).body


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


@pytest.mark.parametrize("shown", [
    lambda: lines(None, {EVIL: [1, 2], "b": [2, 1]}, title=EVIL, xlabel=EVIL),
    lambda: heatmap([[1, 2]], rows=[EVIL], title=EVIL),
    lambda: grid([[[1]]], titles=[EVIL], title=EVIL),
    lambda: bars({EVIL: 1}, title=EVIL, unit=EVIL),
    lambda: spans(EVIL, [(0, 5, EVIL)], title=EVIL),
    lambda: word_bars([EVIL], [1], title=EVIL, unit=EVIL),
    lambda: boxes([[EVIL, "b"]], [(EVIL, "b", EVIL)], title=EVIL),
    lambda: claims_table([(EVIL, EVIL, EVIL, EVIL)], {"command": EVIL, "date": EVIL}),
    lambda: attention_view(np.eye(1), [EVIL], title=EVIL),
], ids="lines heatmap grid bars spans word_bars boxes claims_table view".split())
def test_nothing_in_a_text_becomes_html(shown):
    page = page_of(shown())
    assert "alert(1)</script>" not in page and "<img" not in page
    assert page.count("<script>") == page.count("</script>") <= 1


def test_boxes_name_and_connect():
    shown = boxes([["a\nsmall", "b", "c"], ["d"]],
                  [("a", "b"), ("c", "a", "back"), ("b", "d")], title="T", accent=["b"])
    assert shown.body.count("<rect") == 4 and shown.body.count("rotate(") == 3
    assert "back" in texts(shown.body) and "small" in texts(shown.body)
    assert 'aria-label="Diagram. T. a to b; c to a; b to d"' in shown.body


def test_claims_table_says_where_numbers_come_from(tmp_path):
    result = {"command": "python benchmarks/x.py", "date": "2026-11-23", "machine":
              {"processor": "A CPU", "threads": 1}, "versions": {"torch": "2.13", "x": "1"}}
    result["figures"] = {"note": "half of it elsewhere"}
    (tmp_path / "x.json").write_text(json.dumps(result))
    row = {"claim": "AMP is 2x faster", "this machine": 1.7391, "verdict": "Partly: 1.7"}
    shown = claims_table([row], tmp_path / "x.json").body
    assert "<td>1.74</td>" in shown and "<i>not measured</i>" in shown
    assert "◐ Partly: 1.7" in shown
    assert ("python benchmarks/x.py · A CPU · 1 thread · torch 2.13 · 2026-11-23 · "
            "half of it elsewhere") in shown


# ---- the view --------------------------------------------------------------------------

def unpack(page):
    found = json.loads(re.search(r"D = (\{.*?\}), \[L", page).group(1))
    levels = np.frombuffer(zlib.decompress(base64.b64decode(found["data"])), np.uint8)
    return levels.reshape(*found["shape"], found["shape"][2]), found


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_packing_is_off_by_half_a_level_at_most(layers, heads, n, seed):
    weights = causal(layers, heads, n, n, seed=seed)
    levels, found = unpack(page_of(attention_view(weights, ["t\n\"<"] * n)))
    assert np.abs(levels / 255 - weights).max() <= 1 / 510 + 1e-12
    assert found["tokens"] == ["t\n\"<"] * n
    half, _ = unpack(page_of(attention_view(torch.tensor(weights, dtype=torch.float16),
                                            ["t"] * n)))
    assert np.abs(half.astype(int) - levels).max() <= 1


def test_view_fits_the_page_and_has_its_own_id():
    view = lambda: page_of(attention_view(causal(4, 6, 32, 32), [" word"] * 32))
    one, two = view(), view()
    ids = [re.search(r'id="(gba-[^"]+)"', v).group(1) for v in (one, two)]
    assert len(one.encode()) < 60_000 and ids[0] != ids[1]
    assert "noscript" in one and "http" not in one


needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser():
    with Browser() as running:
        yield running


def opened(browser, tmp_path, body, width=800, scheme="light", color="#20242c"):
    (tmp_path / "page.html").write_text(
        f'<!doctype html><html data-theme="{scheme}"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<body style="color:{color}">{body}</body></html>', encoding="utf-8")
    return browser.page(width, 900, scheme).open((tmp_path / "page.html").as_uri(), 0.3)


STATUS = "document.querySelector('.gba .s').textContent"


@needs_chromium
def test_the_browser_shows_the_weights_that_python_packed(browser, tmp_path):
    weights, tokens = causal(2, 3, 7, 7), [f"w{i}" for i in range(5)] + [" é", EVIL]
    shown = page_of(attention_view(weights, tokens, layer=1, head=2, token=4))
    levels, _ = unpack(shown)
    page = opened(browser, tmp_path, shown + page_of(attention_view(np.eye(2), ["a", "b"])))
    assert page.errors == [] and page.outside == []
    assert page.evaluate("document.querySelectorAll('.gba .h button').length") == 2 * 3 + 1
    assert page.evaluate(STATUS).startswith("layer 1, head 2: “w4” gives")
    labels = [t.replace(" ", "·") for t in tokens]
    for layer, head, query, key in [(0, 0, 6, 2), (1, 0, 5, 5), (1, 2, 6, 0), (0, 1, 3, 6)]:
        page.evaluate(f"document.querySelectorAll('.gba .h button')[{layer * 3 + head}]"
                      f".click(); document.querySelectorAll('.gba .k button')[{query}]"
                      ".click(); document.querySelectorAll('.gba .k button')"
                      f"[{key}].dispatchEvent(new MouseEvent('mouseenter'))")
        percent = 100 * (levels / 255)[layer, head, query, key]
        assert page.evaluate(STATUS) == (
            f"layer {layer}, head {head}: “{labels[query]}” gives “{labels[key]}” "
            f"{percent:.1f} % of its attention")
    alpha = page.evaluate("""(() => { const c = document.querySelector('.gba .m canvas');
        return [...Array(49).keys()].map(i => c.getContext('2d').getImageData(
            (i % 7) * 8 + 4, Math.floor(i / 7) * 8 + 4, 1, 1).data[3]); })()""")
    assert np.abs(np.array(alpha) - 255 * np.sqrt(levels[0, 1].ravel() / 255)).max() <= 1.5
    page.close()


@needs_chromium
def test_the_view_answers_to_the_keyboard(browser, tmp_path):
    shown = page_of(attention_view(causal(2, 3, 5, 5), list("abcde"), token=2))
    page = opened(browser, tmp_path, shown)
    press = ("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
             "{key: '%s', bubbles: true}))")
    page.evaluate("document.querySelector('.gba .h [aria-pressed=true]').focus()")
    for key, place in [("ArrowRight", "layer 0, head 1"), ("ArrowDown", "layer 1, head 1"),
                       ("ArrowDown", "layer 1, head 1"), ("ArrowLeft", "layer 1, head 0")]:
        page.evaluate(press % key)
        assert page.evaluate(STATUS).startswith(place)
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == place
    page.evaluate("document.querySelector('.gba .k [aria-pressed=true]').focus()")
    page.evaluate(press % "ArrowLeft")
    assert "“b” gives" in page.evaluate(STATUS)
    assert page.evaluate("document.querySelectorAll('.gba [tabindex=\"0\"]').length") == 2
    page.close()


@needs_chromium
def test_tokens_are_found_and_followed(browser, tmp_path):
    tokens = ["Lily", " had", " a", " ball", ".", " lily"]
    page = opened(browser, tmp_path, page_of(attention_view(causal(1, 2, 6, 6), tokens, token=1)))
    typed = ("(() => { const f = document.querySelector('.gba input'); f.value = '%s'; "
             "f.dispatchEvent(new Event('input')); return [...document.querySelectorAll("
             "'.gba .hit')].map(b => b.textContent).join('|'); })()")
    assert page.evaluate(typed % "LIL") == "Lily|·lily"
    enter = ("document.querySelector('.gba input').dispatchEvent(new KeyboardEvent('keydown', "
             "{key: 'Enter', cancelable: true}))")
    for word in ("·lily", "Lily", "·lily"):          # on from the second token, then around
        page.evaluate(enter)
        assert f"“{word}” gives" in page.evaluate(STATUS)
    assert page.evaluate(typed % "dragon") == "" and page.evaluate(typed % " ") == ""
    page.evaluate(enter)
    assert "“·lily” gives" in page.evaluate(STATUS) and page.errors == []
    page.close()


@needs_chromium
@pytest.mark.parametrize("color", ["rgb(32, 36, 44)", "rgb(216, 219, 224)"])
def test_words_take_the_pages_ink_and_nothing_else_changes(browser, tmp_path, color):
    drawing = lines([0, 1], {"a": [1, 2], "b": [2, 1]}, title="T", xlabel="steps")
    other = '<svg id="other"><path d="M0 0h9" stroke="red"/><text>x</text></svg>'
    page = opened(browser, tmp_path, other + page_of(drawing), color=color)
    style = ("getComputedStyle([...document.querySelectorAll('svg text')]"
             ".find(t => t.textContent === '%s')).fill")
    assert page.evaluate(style % "steps") == color
    mixed = page.evaluate(style % "a")
    assert mixed not in (color, "rgb(55, 91, 228)")           # two thirds colour, a third ink
    other = "getComputedStyle(document.querySelector('#other path')).strokeLinejoin"
    assert page.evaluate(other) == "miter" and page.errors == []
    page.close()


@needs_chromium
@pytest.mark.parametrize("width", [1300, 400])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    body = "".join(map(page_of, examples().values()))
    body += page_of(attention_view(causal(4, 6, 32, 32), [" word"] * 32, title="T"))
    body += page_of(claims_table([("a claim", 1.0, None, "true")] * 2))
    body += page_of(word_bars(["word"] * 40, range(40)))
    page = opened(browser, tmp_path, body, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    size = """Math.min(...[...document.querySelectorAll('.gb svg text')].map(t => {
        const svg = t.closest('svg'), scale = svg.clientWidth / svg.viewBox.baseVal.width;
        return scale * parseFloat(getComputedStyle(t).fontSize); }))"""
    assert page.evaluate(size) >= (13 if width > 1000 else 6.5)
    page.close()
