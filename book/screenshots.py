"""Photograph every page of the built site: each width, light and dark, cut into screens.

    python book/screenshots.py                       # all pages -> _build/screenshots/
    python book/screenshots.py 00_core index --widths 400 --themes dark
    python book/screenshots.py 00a_figures --slice 0 # one long picture a page

Files are named PAGE-WIDTH-THEME-NN.png. It also prints what is wrong with a page at that
width: content wider than the window, JavaScript errors, requests to the network.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Browser  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WIDER = """document.documentElement.scrollWidth <= innerWidth + 1 ? [] :
  [...document.querySelectorAll('main *')].filter(e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let p = e; p; p = p.parentElement) {
      const style = getComputedStyle(p);
      if (style.visibility == 'hidden' || style.position == 'fixed') return false;
      if (p != e && p.tagName != 'BODY' && /auto|scroll|hidden/.test(style.overflowX))
        return false;
    }
    return true; }).slice(0, 3).map(e => e.tagName + '.' + e.className)"""


def main():
    """Parse the command line and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", help="page names; all if none is given")
    parser.add_argument("--site", type=Path, default=ROOT / "_build/html")
    parser.add_argument("--out", type=Path, default=ROOT / "_build/screenshots")
    parser.add_argument("--widths", type=int, nargs="+", default=[1300, 400])
    parser.add_argument("--themes", nargs="+", default=["light", "dark"])
    parser.add_argument("--slice", type=int, default=2400,
                        help="height of a picture in pixels; 0 for one picture a page")
    options = parser.parse_args()
    files = sorted(p for p in options.site.rglob("*.html") if "_static" not in p.parts)
    if options.pages:
        files = [p for p in files if p.stem in options.pages]
    if not files:
        sys.exit(f"no such pages under {options.site}: run `make book` first")
    options.out.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        for width in options.widths:
            for theme in options.themes:
                for path in files:
                    photograph(browser, path, width, theme, options)


def photograph(browser, path, width, theme, options):
    """All pictures of one page at one width in one theme."""
    script = f"localStorage.mode = localStorage.theme = '{theme}'"
    page = browser.page(width, 1000, theme, script).open(path.resolve().as_uri())
    name = "-".join(path.resolve().relative_to(options.site.resolve()).with_suffix("").parts)
    height = page.evaluate("document.documentElement.scrollHeight")
    step = options.slice or height
    for number, top in enumerate(range(0, height, step)):
        page.screenshot(options.out / f"{name}-{width}-{theme}-{number:02d}.png", top, step)
    wide = page.evaluate(WIDER)
    notes = [f"wider than the window: {', '.join(wide)}"] if wide else []
    notes += [f"error: {e}" for e in page.errors]
    notes += [f"request: {url}" for url in page.outside]
    print(f"{name} {width} {theme}: {height} px" + "".join(f"\n    {n}" for n in notes))
    page.close()


if __name__ == "__main__":
    main()
