"""One YAML, validated; every mistake names its key."""

from pathlib import Path

import pytest

from shardline.cluster.config import load_config
from shardline.shards.core.errors import ConfigError, NotFound


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "shardline.yaml"
    path.write_text(text)
    return path


def test_defaults_need_no_file() -> None:
    config = load_config()
    assert config.cluster.shards == 4
    assert config.cluster.address == "local"


def test_file_over_defaults_and_override_over_file(tmp_path: Path) -> None:
    path = written(tmp_path, "cluster: {shards: 3, http_port: 9000}\nindex: {kind: ivf}\n")
    config = load_config(path, ["cluster.shards=5", "index.nlist=256"])
    assert (config.cluster.shards, config.cluster.http_port) == (5, 9000)
    assert (config.index.kind, config.index.nlist) == ("ivf", 256)


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == load_config()


@pytest.mark.parametrize(
    ("text", "overrides", "named", "hint"),
    [
        ("cluser: {}", [], "cluser", "did you mean 'cluster'?"),
        ("cluster: {shard: 4}", [], "cluster.shard", "did you mean 'shards'?"),
        ("training: {optimiser: {lr: 1}}", [], "training.optimiser.lr", ""),
        ("", ["index.nlists=4"], "index.nlists", "did you mean 'nlist'?"),
        ("cluster: {shards: 0}", [], "cluster.shards", "greater than or equal to 1"),
        ("cluster: {shards: many}", [], "cluster.shards", "'many'"),
        ("", ["cluster.shards=none at all"], "cluster.shards", "'none at all'"),
        ("cluster: 7", ["cluster.shards=2"], "cluster.shards", "not a section"),
    ],
)
def test_mistakes_name_the_key(
    tmp_path: Path, text: str, overrides: list[str], named: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), overrides)
    assert caught.value.field == named
    assert hint in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00"])
def test_not_a_mapping_of_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"shardline\.yaml"):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize("override", ["nlist", "=4", ""])
def test_override_without_key_or_value(override: str) -> None:
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        load_config(None, [override])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("host", ["::", "fd00::", "::1", "2001:db8::7", "0.0.0.0"])
def test_an_override_may_be_an_ipv6_address(host: str) -> None:
    assert load_config(None, [f"cluster.http_host={host}"]).cluster.http_host == host


def test_a_commands_own_defaults_give_way_to_file_and_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "cluster: {shards: 3}")
    preferences = {"cluster.shards": 8, "training.epochs": 4, "index": {"kind": "flat"}}
    config = load_config(path, ["index.kind=hnsw"], preferences)
    assert (config.cluster.shards, config.training.epochs) == (3, 4)
    assert config.index.kind == "hnsw"
    assert load_config(None, [], preferences).index.kind == "flat"
