"""Texts through a transformer, whose library has a stand-in with known states here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shardline.shards.core.errors import ConfigError, DataError, NotFound
from shardline.training.data.session_import import SessionConfig, import_sessions
from shardline.training.data.tables import Dataset, open_dataset, vector_matrix
from shardline.training.features import embed_text as text
from shardline.training.features.embed_text import TextEncoder, embed_items
from tests.rich import rich_dataset


class Tokens(dict[str, torch.Tensor]):
    def to(self, device: str) -> "Tokens":
        return self


class Library:
    """A token a word: its length. A model whose state of a token is (token, token squared)."""

    asked: list[dict[str, Any]]

    def __init__(self) -> None:
        self.asked = []
        self.AutoTokenizer = self.AutoModel = self

    def from_pretrained(self, folder: Path, **options: Any) -> Any:
        self.asked.append(options)
        return Model() if "use_safetensors" in options else tokenize


def tokenize(texts: list[str], *, max_length: int, **options: Any) -> Tokens:
    rows = [[len(word) for word in text.split()][:max_length] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [9999] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Tokens(input_ids=ids.reshape(len(texts), width), attention_mask=mask.reshape(ids.shape))


class Model:
    config = SimpleNamespace(hidden_size=2)

    def to(self, device: str) -> "Model":
        return self

    def eval(self) -> "Model":
        return self

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        ids = input_ids.float()
        return SimpleNamespace(last_hidden_state=torch.stack([ids, ids**2], dim=2))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(text, "TEXTS_PER_BATCH", 4)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return rich_dataset(tmp_path)


def test_mean_over_the_tokens_of_each_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(text, "_transformers", lambda: library)
    texts = ["a bb", "", "cccc", "a " * 500, "bb bb bb", "dddddd"]
    stages: list[tuple[str, int, int]] = []
    encoder = TextEncoder(folder)
    found = encoder.encode(texts, lambda *stage: stages.append(stage))
    assert found.dtype == np.float32
    assert found.tolist() == [[1.5, 2.5], [0, 0], [4, 16], [1, 1], [2, 4], [6, 36]]
    assert stages == [("texts", 4, 6), ("texts", 6, 6)]
    assert encoder.encode([]).shape == (0, 2)
    assert all(options["local_files_only"] is True for options in library.asked)
    assert library.asked[1]["use_safetensors"] is True  # never a pickle


def test_items_get_a_vector_column(
    folder: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_transformers", Library)
    options: dict[str, Any] = {"column": "title", "model": folder}
    written = embed_items(dataset, tmp_path / "out", name="title_vector", **options)
    items = open_dataset(written.path).items()
    lengths = [[len(word) for word in title.split()] for title in items["title"].to_pylist()]
    expected = [np.mean(row) if row else 0 for row in lengths]
    np.testing.assert_allclose(vector_matrix(items["title_vector"])[:, 0], expected, rtol=1e-6)
    assert items.drop_columns(["title_vector"]).equals(dataset.items())
    assert written.interactions().equals(dataset.interactions())
    for column, name, words in (
        ("price", "v", "items.parquet: price: wrong type; expected string; got double"),
        ("shoe", "v", "items.parquet: shoe: no such column"),
        ("title", "tags", "items.parquet: tags: column occurs twice"),
    ):
        with pytest.raises(DataError) as caught:
            embed_items(dataset, tmp_path / "no", name=name, **(options | {"column": column}))
        assert words in str(caught.value)
    assert not (tmp_path / "no").exists()


def test_users_who_are_items_get_the_column_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_transformers", Library)
    (tmp_path / "source").mkdir()
    clicks = {"session_id": [1, 1, 1], "item_id": [7, 8, 9], "timestamp": [1, 2, 3]}
    pq.write_table(pa.table(clicks), tmp_path / "source" / "interactions.parquet")
    titles = {"item_id": [9, 8, 7], "title": ["a bb", "ccc", "d"]}
    pq.write_table(pa.table(titles), tmp_path / "source" / "items.parquet")
    config = SessionConfig(val_share=0, test_share=0)
    import_sessions(tmp_path / "source", tmp_path / "pairs", config)
    pairs = open_dataset(tmp_path / "pairs")
    written = embed_items(pairs, tmp_path / "out", column="title", name="v", model=folder)
    assert written.item_to_item
    assert written.users()["v"].equals(written.items()["v"])
    assert vector_matrix(written.users()["v"])[:, 0].tolist() == [1, 3, 1.5]


def test_no_library_or_no_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match=r"nowhere: no model here; .*none is downloaded"):
        TextEncoder(tmp_path / "nowhere")

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("shardline.training.features.embed_text.importlib.import_module", absent)
    with pytest.raises(ConfigError, match=r"transformers.*not installed.*shardline\[text\]"):
        TextEncoder(folder)


def test_a_folder_that_is_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()

    def broken(*args: Any, **options: Any) -> Any:
        raise OSError("no file named model.safetensors")

    monkeypatch.setattr(library, "from_pretrained", broken)
    monkeypatch.setattr(text, "_transformers", lambda: library)
    with pytest.raises(NotFound, match=r"not a model that can be loaded; got no file named model"):
        TextEncoder(folder)
