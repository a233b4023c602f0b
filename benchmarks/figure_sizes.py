"""How large figures are: inline SVG against PNG, and the interactive view.

    python benchmarks/figure_sizes.py      # a few seconds; results/figure_sizes.json
"""
import base64
import io

import numpy as np

from gptbook.figures import STYLE, Drawing, attention_view, canvas, inline_svg, lines
from matplotlib import rc_context
from results_file import record


def sizes(drawing: Drawing) -> tuple:
    """Bytes of inline SVG, and of the PNG at 100 dpi as base64."""
    with rc_context(STYLE):
        drawing.figure.savefig(out := io.BytesIO(), format="png", dpi=100)
    return len(inline_svg(drawing.figure, drawing.alt)), len(base64.b64encode(out.getvalue()))


def main() -> None:
    random = np.random.default_rng(0)
    steps = np.arange(200)
    curves = {name: 3 * np.exp(-steps / k) + 0.05 * random.normal(size=200)
              for name, k in (("first", 20), ("second", 40), ("third", 60))}
    chart = sizes(lines(steps, curves, title="Three noisy curves", xlabel="step",
                        ylabel="loss in nats"))
    figure, ax = canvas()
    ax.scatter(*random.normal(size=(2, 5000)), s=4)
    scatter = sizes(Drawing(figure))
    scores = 2 * random.normal(size=(4, 6, 32, 32))
    weights = np.tril(np.exp(scores))
    weights /= weights.sum(-1, keepdims=True)
    view = attention_view(weights, [" word"] * 32, limit=10**6)
    print(record("figure_sizes", {
        "svg_lines": chart[0], "png_lines": chart[1],
        "svg_dots": scatter[0], "png_dots": scatter[1],
        "view": len(view._repr_html_().encode()),
    }).read_text())


if __name__ == "__main__":
    main()
