"""The recipes' module of outcomes, which is no part of the package; the tables of their page."""

import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
SHARED = {"outcomes", "recipe"}  # modules that are no recipes


@functools.cache
def outcomes_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_outcomes", RECIPES / "outcomes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def recipe_names() -> list[str]:
    return sorted({path.stem for path in RECIPES.glob("*.py")} - SHARED)


def tables_of_the_page() -> dict[str, list[Any]]:
    """Recipe -> the outcomes in its section of README.md, which names its command."""
    sections = re.split(r"^## ", (RECIPES / "README.md").read_text(encoding="utf-8"), flags=re.M)
    read = outcomes_module().read_table
    commands = {
        re.search(r"^python docs/recipes/(\w+)\.py$", part, re.M): part for part in sections
    }
    return {match[1]: read(part) for match, part in commands.items() if match is not None}
