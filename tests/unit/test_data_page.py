"""The example of docs/DATA.md, run as it is written up to the import, and what it says of it."""

import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.training.data.tables import open_dataset
from shardline.training.features.infer import infer_config
from tests.tiny import tiny_config

PAGE = (Path(__file__).parents[2] / "docs" / "DATA.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The imported data set, made by the page's own code and its first command."""
    monkeypatch.chdir(tmp_path)
    for code in blocks("python")[:2]:
        exec(compile(code, "docs/DATA.md", "exec"), {})
    command = re.findall(r"^shardline (data import.*?[^\\])$", PAGE, re.DOTALL | re.MULTILINE)[0]
    found = CliRunner().invoke(cli, shlex.split(command.replace("\\\n", " ")))
    assert found.exit_code == 0, found.output
    stated = re.search(r"The import prints `(.*?)`", PAGE)
    assert stated is not None and stated[1] in found.output
    assert "duplicates: 44" in found.output
    return tmp_path / "data" / "shop"


def test_the_example_imports_and_ids_lead_back(shop: Path) -> None:
    dataset = open_dataset(shop)
    names: dict = {}
    exec(compile(blocks("python")[2].replace("print", "str"), "docs/DATA.md", "exec"), names)
    assert names["number"] == {f"SKU{number:04d}": number for number in range(200)}
    sold = pq.read_table("tables/interactions.parquet").slice(0, 1).to_pylist()[0]
    first = dataset.interactions().slice(0, 1).to_pylist()[0]
    assert names["number"][sold["sku"]] == first["item_id"]
    assert dataset.users()["original_id"][first["user_id"]].as_py() == sold["customer"]


def test_columns_become_the_features_that_the_page_names(shop: Path) -> None:
    config = infer_config(tiny_config(towers={}), open_dataset(shop))
    item, query = config.towers.item.features, config.towers.query.features
    assert item is not None and query is not None
    assert {feature.column: feature.kind for feature in item} == {
        "item_id": "id",
        "kind": "categorical",
        "price": "numeric",
        "title": "text",
        "tags": "multi_valued",
    }
    assert {feature.column: feature.kind for feature in query} == {
        "age": "numeric",
        "country": "categorical",
        "history": "history",
    }
