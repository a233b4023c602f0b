"""Labels of any bytes, pictures that show the numbers they were given, a view in one file."""
import re
import sys
from pathlib import Path

import pytest
import torch

from gptbook.attention import capture_attention
from gptbook.checkpoints import load_demo
from gptbook.core import GPTConfig, GPTModel
from gptbook.pictures import (
    head_picture, layer_picture, lines_picture, model_picture, save_view, thinned, through_layers,
    token_labels)
from gptbook.tokenizer import train_bpe

sys.path.append(str(Path(__file__).resolve().parents[1] / "book"))
from chromium import Browser, find_chromium  # noqa: E402

T = 9
LABELS = [f"t{i}" for i in range(T)]


def causal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, T, T, generator=source)
    hidden = ~torch.ones(T, T).tril().bool()
    return (3 * scores).masked_fill(hidden, -torch.inf).softmax(-1)


def alphas(ax):
    return torch.tensor(ax.images[0].get_array()[..., 3]).float() / 255


def test_labels_show_every_byte():
    tokenizer = train_bpe("a cat a cat", 260)
    text = " a\n\t\r\x07é😀\u200b"
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    labels = token_labels(tokenizer, ids)
    assert labels[0] == "∅" and len(labels) == len(ids)
    shown = "".join(labels[1:])
    assert shown.startswith("·a↵⇥␍\\x07\\xc3\\xa9\\xf0\\x9f") and shown.isprintable()
    assert " " not in shown and len(token_labels(tokenizer, ids, 2)[6]) == 2
    whole = train_bpe("caterpillar " * 9, 280)
    assert max(map(len, token_labels(whole, whole.encode("caterpillar"), 5))) <= 5


@pytest.mark.parametrize("n", [1, 36, 37, 200])
def test_long_texts_have_fewer_labels(n):
    labels = [str(i) for i in range(n)]
    shown = thinned(labels)
    assert len(shown) == n and 0 < sum(map(bool, shown)) <= 36 and shown[0] == "0"
    assert all(s in ("", labels[i]) for i, s in enumerate(shown))


def test_a_head_picture_shows_its_weights():
    weights = causal()
    shown = head_picture(weights, LABELS, "A head")
    torch.testing.assert_close(alphas(shown.ax), weights, atol=1 / 510 + 1e-6, rtol=0)
    assert [x.get_text() for x in shown.ax.get_xticklabels()] == LABELS
    assert "A head" in shown._repr_html_()
    half = head_picture(weights / 2, LABELS, "half")
    assert alphas(half.ax).max() <= 0.51, "the scale is fixed, not the largest weight"


def test_grids_show_each_head_in_its_place():
    weights = causal(2, 3)
    panels = layer_picture(weights[1], "A layer", layer=1).figure.axes
    for head in range(3):
        torch.testing.assert_close(alphas(panels[head]), weights[1, head], atol=0.003, rtol=0)
        assert panels[head].get_title(loc="left") == f"head 1.{head}"
    shown = model_picture(weights, "A model").ax
    tiles = alphas(shown).view(2, T + 2, 3, T + 2)
    for layer in range(2):
        for head in range(3):
            torch.testing.assert_close(tiles[layer, :T, head, :T], weights[layer, head].sqrt(),
                                       atol=0.003, rtol=0)
    assert not tiles[:, T:].any() and not tiles[:, :, :, T:].any(), "margins are empty"


def test_lines_go_from_who_looks_to_what():
    weights = causal()
    shown = lines_picture(weights, LABELS, "Lines", tokens=[-2, 3], least=0.05)
    drawn = {tuple(map(int, line.get_ydata())): line.get_alpha() for line in shown.ax.lines}
    wanted = {(q, k): weights[q, k].item() for q in (7, 3) for k in range(T)
              if weights[q, k] >= 0.05}
    assert drawn == pytest.approx(wanted)
    assert len(lines_picture(weights, LABELS, "All", least=0.0).ax.lines) == T * T
    bold = [x.get_text() for x in shown.ax.texts if x.get_weight() == "bold"]
    assert sorted(bold) == ["t3", "t7"], "the tokens that look"


def test_lines_of_a_long_text_have_fewer_labels():
    n = 120
    shown = lines_picture(torch.eye(n), [f"t{i}" for i in range(n)], "Long", tokens=[-2])
    names = [x.get_text() for x in shown.ax.texts if x.get_ha() == "right" and x.get_text()]
    assert len(names) <= 37 and "t118" in names, "few, and the token that looks among them"


@pytest.mark.parametrize("shape", [(12, 1), (1, 12), (12, 12), (30, 9), (1, 1)])
def test_a_model_picture_has_a_size_that_can_be_looked_at(shape):
    height = model_picture(causal(*shape), "").figure.get_figheight()
    assert height <= 0.4 + max(7.2, 0.8 * shape[0])


@pytest.mark.parametrize("label", ["$$", "$5_x$"])
def test_dollars_are_no_formula(label):
    """Two dollars of a label would be read as mathematics, or be an error."""
    labels = [label, *LABELS[1:]]
    for shown in (head_picture(causal(), labels, "x"), lines_picture(causal(), labels, "x"),
                  through_layers(causal(2, 2), labels, 3, "x")):
        shown.figure.draw_without_rendering()
        written = shown.ax.get_xticklabels() + shown.ax.texts
        raw = next(x.get_text() for x in written if "$" in x.get_text())
        assert written[0]._preprocess_math(raw) == (label, False)


def test_one_token_through_the_layers():
    weights = causal(4, 2)
    mean = through_layers(weights, LABELS, 5, "mean")
    torch.testing.assert_close(alphas(mean.ax), weights[:, :, 5].mean(1), atol=0.003, rtol=0)
    one = through_layers(weights, LABELS, -1, "one", head=1)
    torch.testing.assert_close(alphas(one.ax), weights[:, 1, -1], atol=0.003, rtol=0)


@pytest.mark.parametrize("wrong", [
    lambda: head_picture(causal(2), LABELS, ""), lambda: head_picture(causal(), LABELS[1:], ""),
    lambda: layer_picture(causal(), ""), lambda: model_picture(causal(2), ""),
    lambda: lines_picture(causal(), LABELS, "", tokens=[T]),
    lambda: through_layers(causal(2, 2), LABELS, T, ""),
    lambda: through_layers(causal(2, 2), LABELS, 0, "", head=2),
    lambda: through_layers(causal(2, 2), LABELS, 0, "", head=-1),
    lambda: save_view("x.html", causal(2), LABELS),
])
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match="do not fit|is not there"):
        wrong()


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_are_saved(tmp_path, suffix, start):
    path = tmp_path / f"head.{suffix}"
    head_picture(causal(), LABELS, "A head").save(path)
    assert path.read_bytes().startswith(start)


def test_twelve_layers_of_twelve_heads_fit_into_a_file(tmp_path):
    """GPT-2's shape, 64 tokens: at most 450 KB; random weights, and sharp ones."""
    torch.manual_seed(0)
    for scale in (1, 6):
        model = GPTModel(GPTConfig(500, 64, 96, 12, 12)).eval()
        for p in model.parameters():
            p.data.mul_(scale)
        with torch.no_grad(), capture_attention(model) as captured:
            model(torch.randint(500, (1, 64)))
        weights = torch.stack([w[0] for w in captured.weights.values()])
        path = save_view(tmp_path / "view.html", weights, [f"·word{i}" for i in range(64)])
        assert path.stat().st_size <= 450_000
    with pytest.raises(ValueError, match="more than 1,000"):
        save_view(tmp_path / "small.html", weights, ["x"] * 64, limit=1000)
    size = path.stat().st_size  # the limit is for the whole file, not for the view in it
    assert save_view(path, weights, [f"·word{i}" for i in range(64)], limit=size + 9) == path
    with pytest.raises(ValueError, match="more than"):
        save_view(tmp_path / "small.html", weights, [f"·word{i}" for i in range(64)],
                  limit=size - 9)
    assert not (tmp_path / "small.html").exists()


def test_the_stories_model_fits_into_a_page():
    model, tokenizer = load_demo()
    ids = tokenizer.encode("Once upon a time there was a girl named Lily. " * 4)[:48]
    with torch.no_grad(), capture_attention(model) as captured:
        model(torch.tensor([ids]))
    from gptbook.figures import attention_view

    weights = torch.stack([w[0] for w in captured.weights.values()])
    assert len(attention_view(weights, token_labels(tokenizer, ids))._repr_html_()) <= 60_000


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_file_opens_without_a_network(tmp_path, scheme):
    labels = ["∅", "·a", "</script><b>", "·it", "·cat", "x", "y", "z", "·end"]
    path = save_view(tmp_path / "view.html", causal(3, 2), labels, title="A & <b>")
    with Browser() as browser:
        page = browser.page(900, 900, scheme).open(path.as_uri(), 0.4)
        assert page.errors == [] and page.outside == []
        assert page.evaluate("document.querySelectorAll('.gba .h button').length") == 6
        page.evaluate("document.querySelectorAll('.gba .h button')[5].click()")
        said = page.evaluate("document.querySelector('.gba .s').textContent")
        assert re.match("layer 2, head 1: “·end” gives", said)
        lum = ("(() => { const c = getComputedStyle(document.documentElement); "
               "return matchMedia('(prefers-color-scheme: dark)').matches; })()")
        assert page.evaluate(lum) == (scheme == "dark")
        paper = page.evaluate("getComputedStyle(document.querySelector('.gba')).color")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "dark"), paper
        page.close()
