"""Run pages again and compare their stored text outputs with fresh ones.

    python book/fresh.py                   # every page, two at a time
    python book/fresh.py 00_core 00b_data  # these pages
    python book/fresh.py --changed         # the pages that changed since the last commit

Words must be equal, numbers agree to a relative 1e-3. What cannot repeat is left out: times
and rates, progress bars, memory addresses, temporary names, figures, and cells that
carry `#| timing` (they print measurements of this machine).
"""

import argparse
import html
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).parent))
from changed import ROOT, changed_pages  # noqa: E402

SKIPPED = r"^#\s*\|\s*(eval:\s*false|slow|cuda|network)\s*$"
UNSTABLE = r"^#\s*\|\s*timing\s*$"
NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
UNITS = (r"(?:ns|µs|us|ms|s|sec|seconds?|minutes?|min|h|[kMGT]?i?B/s|[GT]FLOP/s|tok(?:ens)?/s|"
         r"it/s|steps?/s|×|x|times|%? faster|%? slower)")
VARYING = (
    (re.compile(r"^.*\d+%\|.*$", re.M), ""),                           # progress bars
    (re.compile(rf"{NUMBER}\s*{UNITS}(?![\w/])"), "TIME"),
    (re.compile(r"\b0x[0-9a-fA-F]+\b"), "ADDRESS"),
    (re.compile(r"\b\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?"), "DATE"),
    (re.compile(r"/\S*/tmp\w*[/\w.-]*|\btmp[\w]{6,}"), "TEMPORARY"),
)
MARKUP = re.compile(r"<(style|script|svg)\b.*?</\1>|<[^>]*>", re.S)


def text_of(cell) -> str:
    """The text a cell shows: streams, values, and tables without their markup."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif "text/html" in data:
            parts.append(html.unescape(MARKUP.sub(" ", data["text/html"])))
        elif "text/plain" in data and not any(k.startswith("image/") for k in data):
            parts.append(data["text/plain"])
        elif output.output_type == "error":
            parts.append(f"{output.ename}: {output.evalue}")
    return "\n".join(parts)


def same(stored: str, fresh: str, tolerance: float = 1e-3) -> bool:
    """Whether two outputs agree: words exactly, numbers within a relative tolerance."""
    for pattern, name in VARYING:
        stored, fresh = pattern.sub(name, stored), pattern.sub(name, fresh)
    old, new = (re.split(f"({NUMBER})", text) for text in (stored, fresh))
    if len(old) != len(new):
        return False
    for i, (a, b) in enumerate(zip(old, new)):
        if i % 2 and a != b:
            a, b = float(a.replace(",", "")), float(b.replace(",", ""))
            if not math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-6):
                return False
        elif not i % 2 and a.split() != b.split():
            return False
    return True


def compare(page: str) -> list[str]:
    """Run one page and say where its outputs differ from the stored ones."""
    path = ROOT / "nbs" / f"{page}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    stored = [text_of(cell) for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(SKIPPED, cell.source, re.M):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "skip-execution"]
    start = time.time()
    try:
        NotebookClient(notebook, timeout=900, kernel_name="python3",
                       skip_cells_with_tag="skip-execution",
                       extra_arguments=["--IPKernelApp.log_level=ERROR"],
                       resources={"metadata": {"path": str(path.parent)}}).execute()
    except CellExecutionError as error:
        return [f"{page}: a cell failed\n{error}"]
    found = []
    for number, (cell, old) in enumerate(zip(notebook.cells, stored)):
        if cell.cell_type == "code" and not re.search(UNSTABLE, cell.source, re.M):
            if not same(old, new := text_of(cell)):
                found.append(f"{page}, cell {number}:\n--- stored\n{old.strip()[:800]}\n"
                             f"+++ fresh\n{new.strip()[:800]}")
    print(f"{page}: {len(found) or 'no'} difference{'s' * (len(found) != 1)}, "
          f"{time.time() - start:.0f} s", flush=True)
    return found


def main():
    """Compare the pages that were asked for; exit 1 if one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", help="page names; all if none is given")
    parser.add_argument("--changed", action="store_true", help="pages that changed")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pages = changed_pages() if options.changed else options.pages or sorted(
        p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
    with ThreadPoolExecutor(2) as workers:
        found = [line for lines in workers.map(compare, pages) for line in lines]
    if found:
        sys.exit("\n".join(found))
    print("outputs are fresh" if pages else "no page changed")


if __name__ == "__main__":
    main()
