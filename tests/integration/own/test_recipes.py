"""The recipes of docs/recipes: each by its command, quick, beside the table of their page.

`make test` runs one of them, `make test-recipes` all.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.recipe_outcomes import RECIPES, outcomes_module, recipe_names, tables_of_the_page

USUAL = ("product_search",)  # those of `make test`
LONGEST_S = 240.0  # 40 are usual on two cores

outcomes = outcomes_module()


def work_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("shardline-recipe.*"))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_shows_what_its_page_says(name: str, tmp_path: Path) -> None:
    if name not in USUAL and os.environ.get("RECIPES") != "all":
        pytest.skip("make test-recipes runs it")
    before = work_folders()
    done = subprocess.run(
        [sys.executable, str(RECIPES / f"{name}.py"), "--quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    printed, page = outcomes.read_table(done.stdout), tables_of_the_page()[name]
    assert [(row.name, row.must_be) for row in printed] == [(row.name, row.must_be) for row in page]
    assert [row for row in printed if row.is_exact] == [row for row in page if row.is_exact]
    assert [row.name for row in printed if not row.holds] == []
    assert list(tmp_path.iterdir()) == []
    assert work_folders() <= before
