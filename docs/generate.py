"""Writes the pages of docs/ that are read off the code: TREE.md. `make docs` runs it.

A test compares what is written with what it would write (tests/unit/test_docs.py).
"""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "shards", "router", "training", "bench", "deploy")
COMMENT_COLUMN = 32


def first_line(path: Path) -> str:
    """The first line of a module's docstring, or of the comments at the top of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
        return docstring.partition("\n")[0].rstrip(".")
    lines = (line.lstrip("#").strip() for line in text.splitlines() if not line.startswith("#!"))
    first = next((line for line in lines if line), "")
    return first.rstrip(".") if text.lstrip().startswith("#") else ""


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {ROOT / name for name in listing.stdout.splitlines()}
    return sorted(path for path in found if path.exists())


def tree() -> str:
    """Every file with its first line, folders before the files in them."""
    lines = []
    shown: set[Path] = set()
    for path in sorted(tracked_files(), key=_sort_key):
        for folder in reversed(path.relative_to(ROOT).parents[:-1]):
            if folder not in shown:
                shown.add(folder)
                package = ROOT / folder / "__init__.py"
                comment = first_line(package) if package.exists() else ""
                lines.append(_entry(len(folder.parts) - 1, f"{folder.name}/", comment))
        if path.name != "__init__.py":
            depth = len(path.relative_to(ROOT).parts) - 1
            lines.append(_entry(depth, path.name, first_line(path)))
    head = ["# Every file", "", "Written by `make docs` from first docstring lines.", "", "```"]
    return "\n".join([*head, *lines, "```", ""])


def pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    return {ROOT / "docs" / "TREE.md": tree()}


def _sort_key(path: Path) -> tuple[int, tuple[tuple[bool, str], ...]]:
    *folders, name = path.relative_to(ROOT).parts
    return FOLDERS.index(folders[0]), (*((True, folder) for folder in folders[1:]), (False, name))


def _entry(depth: int, name: str, comment: str) -> str:
    return f"{'  ' * depth + name:<{COMMENT_COLUMN}} {comment}".rstrip()


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
