"""Show that cleaning and exporting the notebooks changes nothing.

It works on a copy, so a difference stays until somebody mends it: `nbdev_clean` for a
notebook, `nbdev_export` for a module.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def differences(root: Path) -> list[str]:
    """Files under nbs/ and gptbook/ that `nbdev_clean` and `nbdev_export` would change."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(root / name, copy)
        skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "models")
        for name in ("nbs", "gptbook"):
            shutil.copytree(root / name, copy / name, ignore=skip)
        before = snapshot(copy)
        for command in ("nbdev_clean", "nbdev_export"):
            tool = Path(sys.executable).parent / command
            subprocess.run([tool], cwd=copy, check=True)
        after = snapshot(copy)
        return [f"{name}: {'would be written' if name not in before else 'differs'}"
                for name in sorted(after) if before.get(name) != after[name]]


def snapshot(folder: Path) -> dict:
    """The bytes of each notebook and module."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.suffix in (".ipynb", ".py")}


if __name__ == "__main__":
    found = differences(ROOT)
    if found:
        sys.exit("\n".join([*found, "run nbdev_clean and nbdev_export, and commit"]))
    print("clean and export: no change")
