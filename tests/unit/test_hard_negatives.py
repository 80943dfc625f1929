"""The table of hard negatives: written whole, read back by row, what does not fit is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shardline.shards.core.errors import ConfigError, CorruptFile, DataError, NewerFormat, NotFound
from shardline.shards.core.files import describe_file, read_manifest, write_manifest
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.csr import Csr
from shardline.training.data.tables import Dataset
from shardline.training.mining.candidates import Mined
from shardline.training.mining.hard_negatives import (
    KIND,
    SCHEMA,
    TABLE,
    VERSION,
    Origin,
    load_hard,
    write_negatives,
)
from tests.tiny import ITEM_IDS, NUM_USERS, USER_IDS, tiny_dataset

ORIGIN = Origin(
    model_version="abc123",
    fit_splits="train",
    generation=7,
    config=MiningConfig(per_user=3),
    seed=5,
    created_at="2026-01-01T00:00:00+00:00",
)
MINED = Mined(
    users=np.array([9, 2, 30]),
    items=np.array([[4, 1, -1], [59, 0, 7], [-1, -1, -1]]),
    scores=np.array([[0.5, 0.25, -np.inf], [0.9, 0.8, 0.7], [-np.inf] * 3], np.float32),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def folder(tmp_path: Path, dataset: Dataset) -> Path:
    write_negatives(tmp_path / "hard", MINED, dataset, ORIGIN)
    return tmp_path / "hard"


def load(folder: Path, dataset: Dataset, fit_splits: str = "train", per_row: int = 3) -> Csr:
    return load_hard(folder, dataset, fit_splits=fit_splits, per_row=per_row)


def rewrite(folder: Path, columns: dict[str, Any] | pa.Table, **changes: Any) -> None:
    """Another table under a manifest that vouches for it."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns, SCHEMA)
    with pa.ipc.new_file(str(folder / TABLE), table.schema) as writer:
        writer.write_table(table)
    body = read_manifest(folder, kind=KIND, version=VERSION)
    del body["kind"], body["format_version"]
    entry = describe_file(folder, TABLE, table.num_rows)
    files = [{"name": entry.name, "bytes": entry.bytes, "sha256": entry.sha256}]
    version = changes.pop("version", VERSION)
    body |= {"rows": table.num_rows, "files": files} | changes
    write_manifest(folder, kind=KIND, version=version, body=body)


def test_rows_come_back_by_user_row(folder: Path, dataset: Dataset) -> None:
    lists = load(folder, dataset)
    assert len(lists.indptr) == NUM_USERS + 1
    found = {
        user: lists.items[lists.indptr[user] : lists.indptr[user + 1]].tolist()
        for user in range(NUM_USERS)
    }
    assert {user: items for user, items in found.items() if items} == {2: [59, 0, 7], 9: [4, 1]}


def test_the_table_is_plain_arrow_of_ids_and_scores(folder: Path) -> None:
    table = pa.ipc.open_file(str(folder / TABLE)).read_all()
    assert table.schema == SCHEMA
    assert table["user_id"].to_pylist() == [int(USER_IDS[user]) for user in (2, 9, 30)]
    ids = [[int(ITEM_IDS[item]) for item in items] for items in ([59, 0, 7], [4, 1], [])]
    assert table["item_ids"].to_pylist() == ids
    np.testing.assert_allclose(table["scores"].to_pylist()[0], [0.9, 0.8, 0.7], rtol=1e-6)
    assert [len(scores) for scores in table["scores"].to_pylist()] == [3, 2, 0]


def test_the_manifest_says_where_it_came_from(folder: Path, dataset: Dataset) -> None:
    manifest = read_manifest(folder, kind=KIND, version=VERSION)
    assert manifest["model_version"] == "abc123"
    assert manifest["fit_splits"] == "train"
    assert manifest["generation"] == 7
    assert MiningConfig.model_validate(manifest["config"]) == ORIGIN.config
    assert manifest["seed"] == 5
    assert manifest["created_at"] == ORIGIN.created_at
    assert manifest["dataset"] == dataset.identity
    assert manifest["rows"] == 3
    assert manifest["starved"] == 2
    assert manifest["starved_share"] == pytest.approx(2 / 3)


def test_an_older_table_is_replaced_only_if_asked(folder: Path, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="--overwrite"):
        write_negatives(folder, MINED, dataset, ORIGIN)
    fewer = Mined(users=MINED.users[:1], items=MINED.items[:1], scores=MINED.scores[:1])
    write_negatives(folder, fewer, dataset, ORIGIN, overwrite=True)
    assert load(folder, dataset).items.tolist() == [4, 1]


def test_what_is_no_table_is_never_replaced(tmp_path: Path, dataset: Dataset) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ConfigError, match="will not be replaced"):
            write_negatives(target, MINED, dataset, ORIGIN, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_nothing_is_left_where_writing_fails(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shardline.training.mining.hard_negatives.write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        write_negatives(tmp_path / "hard", MINED, dataset, ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_another_dataset_is_refused(folder: Path, tmp_path: Path, dataset: Dataset) -> None:
    other = tiny_dataset(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="another dataset") as refused:
        load(folder, other)
    assert refused.value.expected != refused.value.got, "they share their name"


def test_a_table_of_a_run_fitted_on_other_splits_is_refused(
    folder: Path, tmp_path: Path, dataset: Dataset
) -> None:
    both = replace(ORIGIN, fit_splits="train+val")
    write_negatives(tmp_path / "both", MINED, dataset, both)
    assert len(load(tmp_path / "both", dataset, "train+val").items) == 5
    words = r"fit_splits: .*fitted on other splits; expected train\+val; got train; "
    with pytest.raises(ConfigError, match=words):
        load(folder, dataset, "train+val")
    with pytest.raises(ConfigError, match=r"fit_splits: .*expected train; got train\+val; "):
        load(tmp_path / "both", dataset, "train")


def test_a_table_of_fewer_items_a_user_than_a_row_wants_is_refused(
    folder: Path, dataset: Dataset
) -> None:
    words = r"loss.hard_negatives: .*expected <= 3, the per_user of .*hard; got 4"
    with pytest.raises(ConfigError, match=words):
        load(folder, dataset, per_row=4)


def test_another_format_is_refused(folder: Path, dataset: Dataset) -> None:
    table = pa.ipc.open_file(str(folder / TABLE)).read_all()
    rewrite(folder, table, version=1)
    with pytest.raises(CorruptFile, match=r"older version.*mine again"):
        load(folder, dataset)
    rewrite(folder, table, version=VERSION + 1)
    with pytest.raises(NewerFormat):
        load(folder, dataset)


def test_a_missing_or_altered_file_is_refused(folder: Path, dataset: Dataset) -> None:
    whole = (folder / TABLE).read_bytes()
    (folder / TABLE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptFile, match="checksum"):
        load(folder, dataset)
    (folder / TABLE).unlink()
    with pytest.raises(CorruptFile, match="missing"):
        load(folder, dataset)
    shutil.rmtree(folder)
    with pytest.raises(NotFound, match="hard negatives"):
        load(folder, dataset)


def test_what_is_not_arrow_is_refused(folder: Path, dataset: Dataset) -> None:
    (folder / TABLE).write_bytes(b"user_id,item_ids\n1,2\n")
    body = json.loads((folder / "_manifest.json").read_text())
    entry = describe_file(folder, TABLE)
    body["files"] = [{"name": TABLE, "bytes": entry.bytes, "sha256": entry.sha256}]
    for name in ("kind", "format_version", "checksum"):
        del body[name]
    write_manifest(folder, kind=KIND, version=VERSION, body=body)
    with pytest.raises(CorruptFile, match="not an Arrow file"):
        load(folder, dataset)


ONE_USER, ONE_ITEM = int(USER_IDS[0]), int(ITEM_IDS[0])


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"user_id": [2], "item_ids": [[ONE_ITEM]], "scores": [[0.1]]}, "user_id[0]"),
        ({"user_id": [ONE_USER], "item_ids": [[ONE_ITEM, 5]], "scores": [[0, 0]]}, "item_ids[1]"),
        ({"user_id": [3, 1], "item_ids": [[], []], "scores": [[], []]}, "user_id[1]"),
        ({"user_id": [3, 3], "item_ids": [[], []], "scores": [[], []]}, "user_id[1]"),
    ],
)
def test_unknown_or_unordered_ids_are_named(
    folder: Path, dataset: Dataset, columns: dict[str, Any], named: str
) -> None:
    rewrite(folder, columns)
    with pytest.raises(DataError) as refused:
        load(folder, dataset)
    assert refused.value.field == named


def test_other_columns_missing_values_and_lost_rows_are_refused(
    folder: Path, dataset: Dataset
) -> None:
    rewrite(folder, pa.table({"user_id": [ONE_USER], "item_ids": [[0.5]], "scores": [[0.1]]}))
    with pytest.raises(DataError, match="other columns"):
        load(folder, dataset)
    nullable = pa.schema([pa.field(field.name, field.type) for field in SCHEMA])
    holes = {"user_id": [ONE_USER], "item_ids": [[ONE_ITEM, None]], "scores": [[0.1, 0.2]]}
    rewrite(folder, pa.table(holes, nullable))
    with pytest.raises(DataError, match="missing") as refused:
        load(folder, dataset)
    assert refused.value.field == "item_ids"
    rewrite(folder, {"user_id": [ONE_USER], "item_ids": [[]], "scores": [[]]}, rows=4)
    with pytest.raises(DataError, match="number of rows"):
        load(folder, dataset)
