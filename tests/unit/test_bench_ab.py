"""`shardline bench ab` as a command, against a real HTTP server over fake shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.router.router_config import RouterConfig
from tests.batch_store import write_queries
from tests.live_router import DIM, LiveRouter, running_router

CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, max_timeout_ms=20_000)


@pytest.fixture(scope="module")
def router():
    with running_router(CONFIG) as router:
        yield router


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write_queries(tmp_path / "q.parquet", rng.normal(size=(30, DIM)).astype(np.float32))


def run(router: LiveRouter, queries: Path, *arguments: str) -> Any:
    given = ["bench", "ab", "--url", router.url, "--queries", str(queries), *arguments]
    return CliRunner().invoke(cli, ["--store", str(queries.parent), *given])


def test_tables_and_json(router: LiveRouter, queries: Path, tmp_path: Path) -> None:
    out = tmp_path / "ab.json"
    result = run(router, queries, "-k", "10", "--b", '{"k": 5}', "--exact", "7", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "30 queries" in result.output and "b less a" in result.output
    found = json.loads(out.read_text())
    assert (found["queries"], found["judged"], found["failures"]) == (30, 7, {})
    assert found["a"]["recall"]["value"] == found["b"]["recall"]["value"] == 1
    assert found["overlap"]["value"] == 0.5, "five of ten"
    assert found["a"]["p50_ms"]["value"] > 0
    assert found["a"]["short"] == found["b"]["short"] == 0


def test_cached_answers_are_a_warning(router: LiveRouter, queries: Path) -> None:
    result = run(router, queries, "--b", "{}", "--exact", "0", "--count", "12")
    assert result.exit_code == 0, result.output
    assert "12 queries" in result.output
    assert "came from the router's cache" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--b", "{"), "--b: not JSON"),
        (("--b", '{"nprobe": 1}'), "--b: nprobe: not a setting of a search"),
        (("--b", '{"params": {"nprobe": 0}}'), "params.nprobe"),
        (("--a", "[]", "--b", "{}"), "--a: not settings"),
        (("--b", "{}", "--features"), "encoder"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    router: LiveRouter, queries: Path, arguments: tuple[str, ...], text: str
) -> None:
    result = run(router, queries, *arguments)
    assert result.exit_code != 0
    assert text in f"{result.output}{result.exception}"


def test_queries_are_needed(router: LiveRouter, queries: Path) -> None:
    given = ["bench", "ab", "--url", router.url, "--b", "{}"]
    assert CliRunner().invoke(cli, given).exit_code != 0
