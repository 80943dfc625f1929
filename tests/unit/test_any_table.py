"""Random tables through `shardline data import`: taken, or refused with a line; never a defect."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from shardline.cluster.cli import main
from tests.data_shapes.random_columns import KINDS, WRAPPED, values_of

ROWS = 5
GOOD_IDS = st.sampled_from([[1, 2, 3, 4, 5], ["a", "b", "c", "d", "ü"], [2.0, 4.0, 6.0, 8.0, 9.0]])


def columns_of(kinds: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[pa.Array]:
    return kinds.flatmap(
        lambda kind: st.lists(values_of(kind), min_size=ROWS, max_size=ROWS).map(
            lambda values: pa.array(values, kind)
        )
    )


ANY = columns_of(WRAPPED)
KEYS = columns_of(st.sampled_from(KINDS))


def mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda chance: usual if chance else odd)


@st.composite
def sources(draw: Any) -> dict[str, pa.Table]:
    """Tables by name; ids of any type, now and then those of another table."""
    users, items = (draw(mostly(GOOD_IDS.map(pa.array), KEYS)) for _ in range(2))
    names = st.lists(st.text(max_size=3), max_size=3, unique=True)
    tables = {
        "interactions": pa.table(
            {
                "user_id": draw(mostly(st.just(users), KEYS)),
                "item_id": draw(mostly(st.just(items), KEYS)),
                "timestamp": draw(mostly(st.just(pa.array(range(ROWS))), ANY)),
            }
        )
    }
    for name, key, ids in (("users", "user_id", users), ("items", "item_id", items)):
        if draw(st.booleans()):
            columns = {each: draw(ANY) for each in draw(names)}
            tables[name] = pa.table(columns | {key: ids})
    return tables


@given(sources())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_no_table_is_a_defect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tables: dict[str, pa.Table]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir()
    for name, table in tables.items():
        with pa.ipc.new_stream(source / name, table.schema) as writer:
            writer.write_table(table)
    arguments = ["--source", str(source), "--out", str(out), "--test-per-user", "0"]
    with pytest.raises(SystemExit) as ended:
        main(["data", "import", *arguments, "--val-users", "0"])
    event("taken" if out.exists() else "refused")
    said = capsys.readouterr().err
    assert ended.value.code in (0, None, 3), said
    assert out.exists() == (ended.value.code in (0, None))
    assert "internal" not in said
