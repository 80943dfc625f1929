"""The bench of interactions as features: its arms, what it refuses, and one small run."""

from pathlib import Path

import pytest

from shardline.bench.training.graph_bench import arms, compare
from shardline.shards.core.errors import ConfigError
from shardline.training.config.training_config import TrainingConfig
from tests.audiences import audience_config, plain_sum_config
from tests.tiny import tiny_config, tiny_dataset


def test_arms_differ_from_the_configuration_in_what_their_names_say() -> None:
    config = tiny_config()
    found = arms(config)
    assert found["as it is"] == config
    for name, arm in found.items():
        audience = arm.towers.item.audience
        assert (audience is not None) == ("audience" in name)
        assert (arm.id_start == "svd") == ("SVD" in name)
        if audience is not None:
            assert audience.keep_target == ("own user kept" in name)
        assert arm.towers.query == config.towers.query
        assert arm.loss == config.loss
    assert len({arm.model_dump_json() for arm in found.values()}) == len(found) == 6


def test_arms_that_have_no_meaning_are_refused() -> None:
    for config in (
        TrainingConfig(),
        audience_config(),
        plain_sum_config(),
        tiny_config(id_start="svd"),
    ):
        with pytest.raises(ConfigError):
            arms(config)


def test_a_row_per_arm_that_was_asked_for(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    rows = compare(tiny_config(epochs=1), dataset, tmp_path / "runs", ["SVD start", "audience"])
    assert [row["change"] for row in rows] == ["audience", "SVD start"]
    for row in rows:
        assert 0 < row["ndcg@20"] <= row["recall@20"] <= 1
    assert rows[0]["recall@20"] != rows[1]["recall@20"]
    with pytest.raises(ConfigError, match=r"no such arm.*expected as it is, audience"):
        compare(tiny_config(), dataset, tmp_path, ["popularity"])
