"""The README's file tree is the architecture: it lists every module, once, with a comment."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTED_FOLDERS = ("cluster", "shards", "router", "training", "bench", "deploy")


def tree_of_readme() -> dict[str, str]:
    """path -> comment, of the fenced block that follows the heading "Where things are"."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## Where things are.*?```\n(.*?)```", text, re.DOTALL)
    assert block is not None, "README has no tree under 'Where things are'"
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition(" ")
        folders = folders[:depth]
        path = "/".join([*folders, name.rstrip("/")])
        assert path not in entries, f"{path} is listed twice"
        entries[path] = comment.strip()
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return entries


def tracked_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *LISTED_FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listing.stdout.split() if not name.endswith("__init__.py")]


def test_every_file_is_in_the_tree_and_every_entry_exists() -> None:
    entries = tree_of_readme()
    missing = [name for name in tracked_files() if name not in entries]
    assert not missing, "add them to the README's tree"
    gone = [path for path in entries if not (ROOT / path).exists()]
    assert not gone, "remove them from the README's tree"


def test_every_entry_says_what_it_is() -> None:
    assert [path for path, comment in tree_of_readme().items() if len(comment) < 5] == []


def test_commands_of_the_readme_exist() -> None:
    from cluster.cli import COMMANDS

    used = re.findall(r"^shardline(?: -\S+ \S+)* ([a-z]+)", (ROOT / "README.md").read_text(), re.M)
    assert used
    assert set(used) <= set(COMMANDS)
