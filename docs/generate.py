"""Writes the pages of docs/ that are made from the code: TREE.md, CONFIG.md. `make docs` runs it.

A test compares what is written with what it would write (tests/unit/test_docs.py).
"""

import ast
import subprocess
from pathlib import Path

from shardline.cluster.config_keys import Section, config_sections

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "shards", "router", "training", "bench", "deploy")
COMMENT_COLUMN = 32
CONFIG_HEAD = """# Configuration

Written by `make docs` from the configuration models; `shardline config [SECTION]` prints the same
in a terminal.

One YAML file over these defaults: `shardline -c my.yaml COMMAND`. Any value can be set on the
command line: `--set router.max_batch=64`, with the section and the key joined by a dot. Unknown
keys are refused, with the nearest known key as a hint. A command reads the configuration when it
starts: a change takes effect with the next start.

```yaml
store: shardline-store
training: {dim: 128, epochs: 4, num_workers: 2, loss: {temperature: 0.05, logq: standard}}
index: {kind: ivfpq-fs}
cluster: {shards: 4, threads_per_shard: 1, http_port: 8000}
router: {default_timeout_ms: 300, cache_bytes: 0}
```

`features[id]` is an entry of the list `features` with `kind: id`, for example
`{kind: id, column: item_id}`. In a range, "above" and "below" exclude the number itself.
"""


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


def configuration() -> str:
    """A table of keys per section of the configuration."""
    return "\n".join([CONFIG_HEAD, *(_section(section) for section in config_sections())])


def _section(section: Section) -> str:
    title = ", ".join(f"`{path}`" for path in section.paths if path) or "Top level"
    lines = [f"## {title}", "", section.about, ""]
    if section.keys:
        header = ("key", "type", "default", "unit", "range", "meaning")
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for key in section.keys:
        cells = (f"`{key.name}`", key.type, key.default, key.unit, key.range, key.meaning)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    docs = ROOT / "docs"
    return {docs / "TREE.md": tree(), docs / "CONFIG.md": configuration()}


def _sort_key(path: Path) -> tuple[int, tuple[tuple[bool, str], ...]]:
    *folders, name = path.relative_to(ROOT).parts
    return FOLDERS.index(folders[0]), (*((True, folder) for folder in folders[1:]), (False, name))


def _entry(depth: int, name: str, comment: str) -> str:
    return f"{'  ' * depth + name:<{COMMENT_COLUMN}} {comment}".rstrip()


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
