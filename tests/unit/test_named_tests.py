"""The tables of faults (ARCHITECTURE) and of threats (SECURITY): each row names tests that show it,
and they exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.chaos.damage import FILE_KINDS
from tests.chaos.ends import END_KINDS
from tests.chaos.faults import PROCESS_KINDS
from tests.chaos.hostile import HOSTILE_KINDS

ROOT = Path(__file__).parents[2]
FAULTS = ("ARCHITECTURE.md", "## What happens on each fault", 20)
THREATS = ("SECURITY.md", "## What is guarded by what", 20)
COLUMN = "tests"
NAMED = re.compile(r"`([^`]+)`")
CHAOS = "chaos: "  # then a kind of fault of tests/chaos
KINDS = {kind.name for kind in (*PROCESS_KINDS, *FILE_KINDS, *HOSTILE_KINDS, *END_KINDS)}


def rows(page: str, section: str) -> list[list[str]]:
    """The cells of the table's rows, its head first; a ``|`` inside a code span is not expected."""
    lines = page.partition(f"{section}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    return [row for row in cells if not set("".join(row)) <= {"-"}]


def is_test(name: str) -> bool:
    """Whether ``integration/test_faults.py::test_x`` or ``chaos: shard killed`` is there."""
    if name.startswith(CHAOS):
        return name.removeprefix(CHAOS) in KINDS
    file, _, function = name.partition("::")
    path = ROOT / "tests" / file
    if not path.is_file():
        return False
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return function in {
        node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def named_tests(page: str, section: str) -> dict[str, list[str]]:
    """The tests that each row names, by its first cell."""
    head, *body = rows(page, section)
    assert head[-1] == COLUMN
    assert all(len(row) == len(head) for row in body)
    return {row[0]: NAMED.findall(row[-1]) for row in body}


@pytest.mark.parametrize(("page", "section", "least"), [FAULTS, THREATS])
def test_every_row_names_tests_that_exist(page: str, section: str, least: int) -> None:
    named = named_tests((ROOT / "docs" / page).read_text(encoding="utf-8"), section)
    assert len(named) >= least
    for row, names in named.items():
        assert names, f"no test shows: {row}"
        assert [name for name in names if not is_test(name)] == [], row


def test_names_of_tests_that_do_not_exist_are_found() -> None:
    assert is_test("unit/test_named_tests.py::test_every_row_names_tests_that_exist")
    assert not is_test("unit/test_named_tests.py::test_no_such_test")
    assert not is_test("unit/test_no_such_file.py::test_every_row_names_tests_that_exist")
    assert is_test("chaos: shard killed")
    assert not is_test("chaos: shard kissed")
    table = "| fault | tests |\n|---|---|\n| a | `x::y`, `chaos: z` |"
    page = f"## Faults\n\n{table}\n\n## Next\n| b | |\n"
    assert named_tests(page, "## Faults") == {"a": ["x::y", "chaos: z"]}
