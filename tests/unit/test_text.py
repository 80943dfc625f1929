"""Texts of a data set through a real transformer, and what becomes of its columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.shards.core.errors import ConfigError, DataError, NotFound
from shardline.shards.text.text_encoder import TextEncoder
from shardline.training.data.session_import import SessionConfig, import_sessions
from shardline.training.data.tables import Dataset, open_dataset, vector_matrix
from shardline.training.features.embed_text import embed_texts
from tests.rich import rich_dataset
from tests.text_models import REAL, needs_real, tiny_model


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return rich_dataset(tmp_path)


@needs_real
def test_items_get_a_vector_column(dataset: Dataset, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    written = embed_texts(
        dataset,
        tmp_path / "out",
        column="title",
        name="title_vector",
        model=REAL,
        progress=lambda *stage: stages.append(stage),
    )
    items = open_dataset(written.path).items()
    encoder = TextEncoder.load(REAL)
    expected = encoder.encode(dataset.items()["title"].to_pylist(), cut=True)
    np.testing.assert_allclose(vector_matrix(items["title_vector"]), expected, atol=1e-5)
    assert items.drop_columns(["title_vector"]).equals(dataset.items())
    assert written.interactions().equals(dataset.interactions())
    assert written.users().equals(dataset.users())
    assert written.text_encoders == {"items.title_vector": encoder.model.id}
    assert stages[-1] == ("texts", len(expected), len(expected))


def test_what_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    model = str(tiny_model(tmp_path / "model"))
    for changes, kind, words in (
        ({"column": "price"}, DataError, "items.parquet: price: wrong type; expected string"),
        ({"column": "shoe"}, DataError, "items.parquet: shoe: no such column"),
        ({"name": "tags"}, DataError, "items.parquet: tags: column occurs twice"),
        ({"of": "users"}, DataError, "users.parquet: title: no such column"),
        ({"model": "bert-base-uncased"}, NotFound, "not a text encoder"),
        ({"device": "cuda:99"}, ConfigError, "--device: no such device"),
        ({"device": "abacus"}, ConfigError, "--device: no such device"),
    ):
        options: dict[str, Any] = {"column": "title", "name": "v", "model": model}
        with pytest.raises(kind) as caught:
            embed_texts(dataset, tmp_path / "no", **(options | changes))
        assert words in str(caught.value)
    assert not (tmp_path / "no").exists()


def test_users_of_the_same_model_only(dataset: Dataset, tmp_path: Path) -> None:
    model = str(tiny_model(tmp_path / "model"))
    first = embed_texts(dataset, tmp_path / "a", column="title", name="v", model=model)
    both = embed_texts(first, tmp_path / "b", column="bio", name="v", model=model, of="users")
    assert set(both.text_encoders) == {"items.v", "users.v"}
    assert vector_matrix(both.users()["v"]).shape == (dataset.rows["users"], 8)
    other = str(tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match=r"items\.v: another text encoder"):
        embed_texts(first, tmp_path / "c", column="bio", name="w", model=other, of="users")


def test_users_who_are_items_get_the_column_too(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    clicks = {"session_id": [1, 1, 1], "item_id": [7, 8, 9], "timestamp": [1, 2, 3]}
    pq.write_table(pa.table(clicks), tmp_path / "source" / "interactions.parquet")
    titles = {"item_id": [9, 8, 7], "title": ["red shoes", None, "tent"]}
    pq.write_table(pa.table(titles), tmp_path / "source" / "items.parquet")
    config = SessionConfig(val_share=0, test_share=0)
    import_sessions(tmp_path / "source", tmp_path / "pairs", config)
    pairs = open_dataset(tmp_path / "pairs")
    model = str(tiny_model(tmp_path / "model"))
    written = embed_texts(pairs, tmp_path / "out", column="title", name="v", model=model)
    assert written.item_to_item
    assert written.users()["v"].equals(written.items()["v"])
    assert set(written.text_encoders) == {"items.v", "users.v"}
    # ascending by id; a null is an empty text
    expected = TextEncoder.load(model).encode(["tent", "", "red shoes"], cut=True)
    np.testing.assert_allclose(vector_matrix(written.users()["v"]), expected, atol=1e-5)
