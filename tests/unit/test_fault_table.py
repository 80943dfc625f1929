"""The fault table of docs/ARCHITECTURE.md: each row names tests that show it, and they exist."""

import ast
import re
from pathlib import Path

from tests.chaos.damage import FILE_KINDS
from tests.chaos.ends import END_KINDS
from tests.chaos.faults import PROCESS_KINDS
from tests.chaos.hostile import HOSTILE_KINDS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
SECTION = "## What happens on each fault"
COLUMN = "tests"
NAMED = re.compile(r"`([^`]+)`")
CHAOS = "chaos: "  # then a kind of fault of tests/chaos
KINDS = {kind.name for kind in (*PROCESS_KINDS, *FILE_KINDS, *HOSTILE_KINDS, *END_KINDS)}


def rows(page: str) -> list[list[str]]:
    """The cells of the table's rows, its head first; a ``|`` inside a code span is not expected."""
    lines = page.partition(f"{SECTION}\n")[2].partition("\n## ")[0].splitlines()
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


def faults_of(page: str) -> dict[str, list[str]]:
    """The tests that each row names, by its first cell."""
    head, *body = rows(page)
    assert head[-1] == COLUMN
    assert all(len(row) == len(head) for row in body)
    return {row[0]: NAMED.findall(row[-1]) for row in body}


def test_every_row_names_tests_that_exist() -> None:
    faults = faults_of(PAGE.read_text(encoding="utf-8"))
    assert len(faults) >= 12
    for fault, names in faults.items():
        assert names, f"no test shows: {fault}"
        assert [name for name in names if not is_test(name)] == [], fault


def test_names_of_tests_that_do_not_exist_are_found() -> None:
    assert is_test("unit/test_fault_table.py::test_every_row_names_tests_that_exist")
    assert not is_test("unit/test_fault_table.py::test_no_such_test")
    assert not is_test("unit/test_no_such_file.py::test_every_row_names_tests_that_exist")
    assert is_test("chaos: shard killed")
    assert not is_test("chaos: shard kissed")
    table = "| fault | tests |\n|---|---|\n| a | `x::y`, `chaos: z` |"
    page = f"{SECTION}\n\n{table}\n\n## Next\n| b | |\n"
    assert faults_of(page) == {"a": ["x::y", "chaos: z"]}
