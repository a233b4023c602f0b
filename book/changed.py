"""The pages that changed since the last commit on main, and their tests.

    python book/changed.py          # page names
    python book/changed.py tests    # test files: tests/test_MODULE.py, and changed tests
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def changed_files(root: Path = ROOT) -> list[str]:
    """Paths that differ from the last commit on main, and those git does not know yet."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True).stdout
    base = git("merge-base", "HEAD", "main").strip() or "HEAD"
    tracked = git("diff", "--name-only", base)
    return sorted(set((tracked + git("ls-files", "-o", "--exclude-standard")).split("\n")))


def changed_pages(root: Path = ROOT) -> list[str]:
    """Names of the changed notebooks that are still there."""
    names = (re.fullmatch(r"nbs/([^/]+)\.ipynb", path) for path in changed_files(root))
    return [m[1] for m in names if m and (root / m[0]).exists()]


def tests_of(pages: list[str], root: Path = ROOT) -> list[str]:
    """The test file of each page, where there is one, and the test files that changed."""
    wanted = {f"tests/test_{page.split('_', 1)[-1]}.py" for page in pages}
    wanted |= {p for p in changed_files(root) if re.fullmatch(r"tests/test_\w+\.py", p)}
    wanted -= {"tests/test_structure.py", "tests/test_site.py", "tests/test_package.py"}
    return sorted(p for p in wanted if (root / p).exists())


if __name__ == "__main__":
    pages = changed_pages()
    print(*(tests_of(pages) if sys.argv[1:] == ["tests"] else pages))
