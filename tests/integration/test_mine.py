"""Hard negatives from a real cluster: the ones exact search finds, of the very model it serves."""

import json
from pathlib import Path

import numpy as np
import pytest

from shardline.cluster.cli import main
from shardline.cluster.commands.mine import mine_run
from shardline.cluster.config import load_config
from shardline.cluster.serving.endpoint import Address
from shardline.shards.core.errors import Unavailable, VersionMismatch
from shardline.shards.core.files import read_manifest
from shardline.training.config.training_config import MiningConfig
from shardline.training.loop.launch import train
from shardline.training.mining.hard_negatives import KIND, VERSION, load_hard
from tests.integration.conftest import Cluster

CONFIG = MiningConfig(per_user=5, range_min=3, range_max=60, margin=0.1)


def test_a_flat_cluster_mines_what_exact_search_mines(cluster: Cluster) -> None:
    arguments = (cluster.run, cluster.dataset, CONFIG, 1)
    through, report = mine_run(*arguments, cluster=cluster.endpoint.address)
    exact, alone = mine_run(*arguments, cluster=None)
    np.testing.assert_array_equal(through.users, exact.users)
    assert report.examples == alone.examples == 400
    same = (through.items == exact.items).all(axis=1)
    # both add up in their own order, so a score may round to the other side of the margin
    assert same.mean() > 0.99
    np.testing.assert_allclose(through.scores[same], exact.scores[same], atol=1e-5)
    assert abs(report.starved - alone.starved) <= 4
    assert (through.items >= 0).any(), "something was found"
    assert report.generation == cluster.endpoint.generation
    assert alone.generation is None
    assert report.model_version == alone.model_version
    assert report.examples_per_s > 0


def test_the_command_writes_a_table_that_training_can_load(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hard"
    command = ["mine", "--data", str(cluster.dataset.path), "--run", str(cluster.run)]
    command += ["--out", str(out), "--url", cluster.endpoint.url, "--json"]
    command += ["--key-file", str(cluster.endpoint.key_file)]
    command += ["--per-user", "4", "--range-min", "2", "--range-max", "40", "--margin", "0.2"]
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0
    report = json.loads(capsys.readouterr().out)
    manifest = read_manifest(out, kind=KIND, version=VERSION)
    assert manifest["config"]["range_max"] == 40
    assert manifest["rows"] == report["examples"] == 400
    assert manifest["generation"] == report["generation"] == cluster.endpoint.generation
    assert manifest["starved_share"] == pytest.approx(report["starved_share"])
    assert manifest["fit_splits"] == report["fit_splits"] == "train"
    mined = load_hard(out, cluster.dataset, fit_splits="train", per_row=4)
    assert len(mined.items) == report["negatives"] > 0
    assert mined.lengths.max() <= 4
    known = cluster.dataset.positives("train")
    width = cluster.dataset.rows["items"]
    keys = [lists.owners * width + lists.items for lists in (mined, known)]
    assert not np.isin(*keys).any(), "no known item became a negative"
    with pytest.raises(SystemExit) as refused:
        main(command)
    assert refused.value.code == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_cluster_of_another_model_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    changes = ["training.epochs=1", "training.seed=9", "training.batch_size=1024"]
    other = tmp_path / "run"
    train(load_config(None, changes).training, cluster.dataset.path, other)
    with pytest.raises(VersionMismatch, match="another model"):
        mine_run(other, cluster.dataset, CONFIG, 1, cluster=cluster.endpoint.address)


def test_a_cluster_that_is_not_there_is_told(cluster: Cluster) -> None:
    with pytest.raises(Unavailable, match="cannot reach"):
        mine_run(cluster.run, cluster.dataset, CONFIG, 1, cluster=Address("http://127.0.0.1:9"))
