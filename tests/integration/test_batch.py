"""Batch jobs on a real cluster: offline, on Ray and live give the same answers."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.part_files import claimed_folder
from shardline.cluster.cli import cli
from shardline.cluster.commands.batch import offline_plan
from shardline.cluster.commands.batch_ray import answer_here
from shardline.cluster.commands.batch_sources import Asked
from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import DataError, InvalidInput, NotFound, Unavailable
from tests.batch_store import contents, read_parts, write_queries
from tests.integration.conftest import NUM_ITEMS, Cluster
from tests.unit.test_batch import Silent

# Ray Data's own: it sets its deprecated options when it makes its context
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data")

K = 20


def batch(cluster: Cluster, *arguments: object) -> dict[str, object]:
    """The report of the command."""
    words = ["--store", str(cluster.store.root), "batch", "--json", *map(str, arguments)]
    done = CliRunner().invoke(cli, words, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    report: dict[str, object] = json.loads(done.stdout)
    return report


def through_cluster(cluster: Cluster) -> tuple[object, ...]:
    return "--url", cluster.endpoint.url, "--key-file", str(cluster.endpoint.key_file)


@pytest.mark.parametrize(
    "kind", [("--users",), ("--items", "--return", "category", "--original-ids")], ids=" ".join
)
def test_offline_and_live_give_the_same(
    cluster: Cluster, tmp_path: Path, kind: Sequence[str]
) -> None:
    asked: list[object] = [*kind, "-k", K, "--block-rows", 250]
    if kind[0] == "--users":
        asked.insert(1, cluster.dataset.path)
    offline = batch(cluster, *asked, "--out", tmp_path / "offline")
    assert offline["way"] == "local"
    live = batch(cluster, *asked, "--out", tmp_path / "live", *through_cluster(cluster))
    assert live["way"] == "live"
    one, other = read_parts(tmp_path / "offline"), read_parts(tmp_path / "live")
    assert one.schema == other.schema
    assert one["query_id"] == other["query_id"]
    same = [a == b for a, b in zip(one["ids"].to_pylist(), other["ids"].to_pylist(), strict=True)]
    # queries are encoded, and scores added up, in other batches: the last bits may differ
    assert np.mean(same) > 0.98
    if kind[0] == "--items":
        assert one.num_rows == NUM_ITEMS
        assert all(
            item not in found
            for item, found in zip(one["query_id"].to_pylist(), one["ids"].to_pylist(), strict=True)
        )


def test_users_are_asked_as_the_query_command_asks(
    cluster: Cluster, client: Client, tmp_path: Path
) -> None:
    users = cluster.dataset.user_ids[[5, 3, 5]]
    pq.write_table(pa.table({"user_id": [str(user) for user in users]}), tmp_path / "q.parquet")
    out = tmp_path / "out"
    batch(
        cluster,
        *("--users", cluster.dataset.path, "--queries", tmp_path / "q.parquet", "--out", out),
    )
    found = read_parts(out)["ids"].to_pylist()
    assert found[0] == found[2] != found[1]
    words = ["--store", str(cluster.store.root), "query", "--user", str(users[0]), "-k", "10"]
    words += ["--data", str(cluster.dataset.path), "--json", *through_cluster(cluster)]
    done = CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)
    answered = [row["item_id"] for row in json.loads(done.stdout)["results"]]
    assert found[0][:10] == answered
    pq.write_table(pa.table({"user_id": ["nobody"]}), tmp_path / "r.parquet")
    with pytest.raises(NotFound, match=r"r\.parquet: user_id\[0\].*nobody"):
        batch(
            cluster,
            *("--users", cluster.dataset.path, "--queries", tmp_path / "r.parquet"),
            *("--out", tmp_path / "other"),
        )


@pytest.mark.parametrize("items", [False, True], ids=["vectors", "items"])
def test_a_job_on_ray_has_the_bytes_of_a_local_one(
    cluster: Cluster, tmp_path: Path, items: bool
) -> None:
    dim = 8 if items else status_dim(cluster)
    vectors = np.random.default_rng(0).standard_normal((900, dim)).astype(np.float32)
    path = write_queries(tmp_path / "q.parquet", vectors)
    kind = ["--items"] if items else ["--queries", str(path)]
    batch(cluster, *kind, "--out", tmp_path / "local", "-k", K, "--block-rows", 200, "--cpus", 1)
    asked = Asked(
        queries=() if items else (str(path),),
        features=False, users=None, items=items, id_column=None, vector_column=None,
    )  # fmt: skip
    wanted = Wanted(k=K, drops_own=items)
    with claimed_folder(tmp_path / "ray") as claimed:
        plan = offline_plan(asked, wanted, cluster.generation, claimed, print_nothing, 200)
        report = answer_here(plan, claimed, Silent(), 2)
    assert (report.way, report.resumed_parts) == ("ray", 0)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_what_a_stage_refuses_is_said_as_everywhere(cluster: Cluster, tmp_path: Path) -> None:
    vectors = np.ones((90, status_dim(cluster)), np.float32)
    vectors[77, 1] = np.nan
    path = write_queries(tmp_path / "q.parquet", vectors)
    asked = Asked(
        queries=(str(path),),
        features=False, users=None, items=False, id_column=None, vector_column=None,
    )  # fmt: skip
    with claimed_folder(tmp_path / "out") as claimed:
        plan = offline_plan(asked, Wanted(k=K), cluster.generation, claimed, print_nothing, 20)
        with pytest.raises(DataError, match=r"q\.parquet: embedding\[77\]"):
            answer_here(plan, claimed, Silent(), 2)
        with pytest.raises(Unavailable, match="CPUs"):
            answer_here(plan, claimed, Silent(), 64)


def test_a_live_cluster_refuses_before_anything_is_written(
    cluster: Cluster, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="no such attribute"):
        batch(
            cluster,
            *("--users", cluster.dataset.path, "--out", tmp_path / "out", "--return", "colour"),
            *through_cluster(cluster),
        )
    assert not (tmp_path / "out").exists()


def status_dim(cluster: Cluster) -> int:
    with cluster.endpoint.address.client() as client:
        return int(client.status()["dim"])


def print_nothing(line: str) -> None:
    pass
