"""Outcomes of the recipes: their bounds, their tables, and the page's own figures."""

import pytest

from tests.recipe_outcomes import outcomes_module, recipe_names, tables_of_the_page

outcomes = outcomes_module()


@pytest.mark.parametrize(
    ("must_be", "value", "shown", "holds"),
    [
        ("= 0", 0, "0", True),
        ("= 0", 1, "1", False),
        ("= 20", 20, "20", True),
        ("<= 2", 2, "2", True),
        ("<= 2", 3, "3", False),
        (">= 18", 17, "17", False),
        (">= 18", 20, "20", True),
        (">= 0.7", 0.70004, "0.7", True),
        ("<= 0.6", 0.61, "0.61", False),
        ("<= 0.00001", 6e-8, "6e-08", True),
        ("<= 0.00001", 6e-5, "6e-05", False),
        (">= 120", 181.5678, "181.6", True),
        ("= 100 %", 1.0, "100 %", True),
        ("= 100 %", 0.99999, "99.9 %", False),
        (">= 90 %", 0.9, "90 %", True),
        (">= 90 %", 0.899, "89.9 %", False),
        ("= 0 %", 0.00001, "0.1 %", False),
        ("<= 40 %", 0.4, "40 %", True),
    ],
)
def test_a_bound_is_that_of_the_value_that_is_shown(
    must_be: str, value: float, shown: str, holds: bool
) -> None:
    found = outcomes.measured("what", must_be, value)
    assert (found.measured, found.holds) == (shown, holds)


def test_a_bound_that_is_none_is_refused() -> None:
    for must_be in ("0", "< 2", "= many", "=0"):
        with pytest.raises(AssertionError, match="not a bound"):
            assert outcomes.Outcome("what", must_be, "0").holds


def test_a_table_is_read_as_it_is_written() -> None:
    rows = [outcomes.measured("one, of 20", "= 20", 20), outcomes.measured("two", ">= 90 %", 0.95)]
    text = "\n".join(["before", "", *outcomes.table(rows), "", "after"])
    assert outcomes.read_table(text) == rows


def test_the_page_has_a_table_of_every_recipe_and_its_figures_hold() -> None:
    page = tables_of_the_page()
    assert sorted(page) == recipe_names()
    for rows in page.values():
        assert len(rows) >= 5
        assert [row.name for row in rows if not row.holds] == []
