"""Pages that are read off the code say what the code says; the README names what exists."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from shardline.cluster.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "text"), [(path.name, text) for path, text in generator().pages().items()]
)
def test_generated_pages_are_up_to_date(page: str, text: str) -> None:
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_module_says_what_it_is() -> None:
    module = generator()
    paths = [path for path in module.tracked_files() if path.suffix == ".py"]
    assert len(paths) > 100
    assert [path for path in paths if len(module.first_line(path)) < 10] == []


def test_the_readme_names_every_package() -> None:
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/*/__init__.py")}
    packages = {f.as_posix() for f in folders if f.parts[0] not in ("tests", "shardline")}
    block = re.search(r"## Where things are.*?```\n(.*?)```", README, re.DOTALL)
    assert block is not None, "README has no tree under 'Where things are'"
    named = set()
    for line in block[1].splitlines():
        folder, _, rest = line.partition("/ ")
        named.add(folder.strip())
        named |= {f"{folder.strip()}/{name}" for name in re.findall(r"\b([a-z]+)/", rest)}
    assert packages <= named


def test_commands_of_the_readme_exist() -> None:
    used = re.findall(r"^shardline(?: -\S+ \S+)* ([a-z]+)", README, re.M)
    assert used
    assert set(used) <= set(COMMANDS)
