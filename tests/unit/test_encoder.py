"""The numpy encoder must say what the torch query tower says, and refuse what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.encoder_files import read_encoder, write_encoder
from shardline.shards.core.errors import CorruptFile, InvalidInput, NewerFormat, NotFound
from shardline.shards.core.files import sha256_of
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import ITEMS, USERS, Dataset
from shardline.training.evaluation.user_queries import (
    query_features,
    query_features_of_user,
)
from shardline.training.export import export
from shardline.training.model.checkpoint import load_best
from shardline.training.model.encoding import encode_queries
from tests.rich import rich_config, rich_dataset, sum_config
from tests.tiny import ITEM_IDS, tiny_config, tiny_dataset, untrained_run

GOOD = {"user_id": 1, "country": "US", "member": True, "age": 30, "history": [100, 103]}
RICH = {"user_id": 1, "interests": [5, 1], "age": 30, "bio": "Brazil night", "history": [100, 103]}


def exported(run: Path, dataset: Dataset, store: Path) -> Path:
    folder = export(run, dataset.path, store, created_at="2026-01-01T00:00:00Z").encoder_folder
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    folder = tmp_path_factory.mktemp("trained")
    dataset = tiny_dataset(folder / "data")
    return untrained_run(folder / "run", tiny_config(), dataset), dataset


@pytest.fixture(scope="module")
def encoder_folder(trained: tuple[Path, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(*trained, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> QueryEncoder:
    return QueryEncoder.load(encoder_folder)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return rich_dataset(tmp_path_factory.mktemp("rich"))


@pytest.fixture(scope="module")
def rich_encoder(rich: Dataset, tmp_path_factory: pytest.TempPathFactory) -> QueryEncoder:
    folder = tmp_path_factory.mktemp("run")
    run = untrained_run(folder / "run", rich_config(), rich)
    return QueryEncoder.load(exported(run, rich, folder))


def test_equals_the_torch_tower(trained: tuple[Path, Dataset], encoder: QueryEncoder) -> None:
    check_twins(*trained, encoder)


@pytest.mark.parametrize(
    "config",
    [
        rich_config("attention"),
        rich_config("mean"),
        sum_config("mean"),
        sum_config("sqrtn"),
        rich_config("sqrtn"),
        sum_config("attention"),
        sum_config("attention", own=False),
    ],
    ids=[
        "attention",
        "mean",
        "summed",
        "summed sqrtn",
        "sqrtn",
        "summed attention",
        "summed history alone",
    ],
)
def test_every_kind_equals_its_torch_twin(
    rich: Dataset, tmp_path: Path, config: TrainingConfig
) -> None:
    run = untrained_run(tmp_path / "run", config, rich)
    check_twins(run, rich, QueryEncoder.load(exported(run, rich, tmp_path)))


def check_twins(run_folder: Path, dataset: Dataset, encoder: QueryEncoder) -> None:
    run, model = load_best(run_folder)
    users = np.arange(dataset.rows["users"])
    expected = encode_queries(
        model,
        run.space.query.encode(dataset.users(), USERS),
        dataset.positives("train", "val"),
        run.space.item.encode(dataset.items(), ITEMS),
    )
    kinds = run.space.query_kinds
    queries = query_features(dataset, kinds, users, ("train", "val"))
    found = encoder.encode(json.loads(json.dumps(queries)))
    assert found.dtype == np.float32
    assert found.shape == (len(users), encoder.dim) == (40, 16)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    one = query_features_of_user(dataset, kinds, "5")
    np.testing.assert_allclose(encoder.encode([one])[0], expected[2], atol=1e-5)
    assert {f["name"]: f["kind"] for f in encoder.features} == kinds


def test_attention_weighs(rich_encoder: QueryEncoder) -> None:
    """Order matters to it, as it does not to a mean; else the twins would agree on too little."""
    past = ITEM_IDS[:4].tolist()
    found = rich_encoder.encode([RICH | {"history": past}, RICH | {"history": past[::-1]}])
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_nothing_known_in_lists_and_texts(rich_encoder: QueryEncoder) -> None:
    def same(*changes: dict[str, Any]) -> None:
        found = rich_encoder.encode([RICH | change for change in changes])
        np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-6)
        known = rich_encoder.encode([RICH])[0]
        assert np.abs(known - found[0]).max() > 1e-4

    same({"interests": []}, {"interests": None}, {"interests": [99, -1]}, {"interests": ()})
    same({"bio": ""}, {"bio": None}, {"bio": "?!"}, {"bio": "  \n"})


def test_what_counts_of_lists_and_texts(rich_encoder: QueryEncoder) -> None:
    """The first two known interests, the first 20 n-grams."""
    pairs = [
        ({"interests": [5, 1]}, {"interests": [99, 5, 1, 3, 3]}),
        ({"interests": [5, 1]}, {"interests": (1, 5)}),
        ({"bio": "ALIEN night"}, {"bio": "alien\tNight!"}),
        ({"bio": "returning " * 2}, {"bio": "returning " * 1000}),
    ]
    for one, other in pairs:
        found = rich_encoder.encode([RICH | one, RICH | other])
        np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"interests": 3}, "interests", "expected list of ints, or null; got int"),
        ({"interests": "3"}, "interests", "got str"),
        ({"interests": {"3": 1}}, "interests", "got dict"),
        ({"interests": [1, "3"]}, "interests[1]", "got str"),
        ({"interests": [True]}, "interests[0]", "got bool"),
        ({"interests": [1.5]}, "interests[0]", "got float"),
        ({"interests": [[1]]}, "interests[0]", "got list"),
        ({"bio": 3}, "bio", "expected string or null; got int"),
        ({"bio": ["Alien"]}, "bio", "got list"),
        ({"bio": b"Alien"}, "bio", "got bytes"),
        ({"title": "Alien"}, "title", "unknown feature; expected one of age, bio, history"),
    ],
)
def test_lists_and_texts_that_do_not_fit(
    rich_encoder: QueryEncoder, change: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        rich_encoder.encode([RICH, RICH | change])
    assert caught.value.field == f"features[1].{field}"
    assert words in str(caught.value)


@pytest.mark.parametrize("version", [1, 2])
def test_older_formats_are_read(encoder_folder: Path, tmp_path: Path, version: int) -> None:
    """They had the history's arrays among the weights; the first had no projection either."""
    config, weights = read_encoder(encoder_folder)
    del config["sha256"]
    if version == 1:
        del config["projection"]
    save_file(weights, tmp_path / "weights.safetensors")
    config["weights_sha256"] = sha256_of(tmp_path / "weights.safetensors")
    (tmp_path / "encoder.json").write_text(json.dumps(config | {"format_version": version}))
    expected = QueryEncoder.load(encoder_folder).encode([GOOD])
    assert (QueryEncoder.load(tmp_path).encode([GOOD]) == expected).all()


def test_unknown_values_are_the_unknown_category(encoder: QueryEncoder) -> None:
    names = ("user_id", "country")
    rows = [{"user_id": 999, "country": "XX"}, {"user_id": 10**30, "country": None}]
    found = encoder.encode([GOOD | row for row in rows])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    for name in names:
        known = encoder.encode([GOOD, GOOD | {name: rows[0][name]}])
        assert np.abs(known[0] - known[1]).max() > 1e-3


def test_a_whole_float_is_its_integer(encoder: QueryEncoder, rich_encoder: QueryEncoder) -> None:
    """As frames write the integers of a column with gaps."""
    found = encoder.encode([GOOD | {"user_id": 1.0}, GOOD | {"user_id": 999.0}, GOOD])
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[1] - found[2]).max() > 1e-3
    lists = rich_encoder.encode([RICH | {"interests": [5.0, 1]}, RICH])
    np.testing.assert_array_equal(lists[0], lists[1])


def test_nulls_in_lists_and_for_lists_are_left_out(rich_encoder: QueryEncoder) -> None:
    """As an import leaves them out."""
    found = rich_encoder.encode(
        [RICH | {"interests": [None, 5, 1]}, RICH, RICH | {"history": None}, RICH | {"history": []}]
    )
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[3])


def test_history_skips_unknown_items_and_keeps_the_newest(encoder: QueryEncoder) -> None:
    first, *rest = ITEM_IDS[:5].tolist()
    found = encoder.encode(
        [
            GOOD | {"history": rest},
            GOOD | {"history": [first, *rest]},  # max_length is 4
            GOOD | {"history": [*rest[:2], 1, *rest[2:], 10**9]},
            GOOD | {"history": []},
            GOOD | {"history": [1, 2]},
        ]
    )
    np.testing.assert_allclose(found[1:3], found[[0, 0]], atol=1e-6)
    np.testing.assert_allclose(found[3], found[4], atol=1e-6)
    assert np.abs(found[0] - found[3]).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"country": 3}, "country", "expected string or null; got int"),
        ({"user_id": True}, "user_id", "expected int or null; got bool"),
        ({"user_id": 1.5}, "user_id", "got float"),
        ({"user_id": "1"}, "user_id", "got str"),
        ({"member": 1}, "member", "expected bool or null; got int"),
        ({"age": "30"}, "age", "expected finite number, or null; got str"),
        ({"age": True}, "age", "got bool"),
        ({"age": float("nan")}, "age", "got nan"),
        ({"age": float("inf")}, "age", "got inf"),
        ({"age": 10**400}, "age", "integer too large"),
        ({"age": [30]}, "age", "got list"),
        ({"history": 100}, "history", "expected list of item ids, oldest first; got int"),
        ({"history": [100, "a"]}, "history[1]", "got str"),
        ({"history": [100, True]}, "history[1]", "got bool"),
        ({"history": [2**70]}, "history", "integer too large"),
        ({"shoe_size": 44}, "shoe_size", "unknown feature; expected one of age, country"),
    ],
)
def test_values_that_do_not_fit(
    encoder: QueryEncoder, change: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        encoder.encode([GOOD, GOOD | change])
    assert caught.value.field == f"features[1].{field}"
    assert words in str(caught.value)


def test_values_beyond_float32_count_as_the_largest(encoder: QueryEncoder) -> None:
    huge, larger = encoder.encode([GOOD | {"age": 1e300}, GOOD | {"age": 1e308}])
    assert np.isfinite(huge).all()
    np.testing.assert_array_equal(huge, larger)


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_missing_features(encoder: QueryEncoder, missing: str) -> None:
    query = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(InvalidInput, match=rf"features\[0\]\.{missing}: missing feature"):
        encoder.encode([query])


def test_empty_batches_and_other_shapes(encoder: QueryEncoder) -> None:
    with pytest.raises(InvalidInput, match="features: empty batch"):
        encoder.encode([])
    with pytest.raises(InvalidInput, match=r"features\[0\]: not an object.*got list"):
        encoder.encode([[1]])  # type: ignore[list-item]  # a body may hold anything


def test_cycles_need_a_reader_that_knows_them(tmp_path: Path) -> None:
    """One before them would read three numbers where there is one."""
    for cycles, version in (([], 3), (["day"], 4)):
        folder = tmp_path / str(version)
        folder.mkdir()
        features = [{"kind": "numeric", "cycles": cycles}]
        write_encoder(folder, {"features": features}, {"w": np.zeros(1, np.float32)})
        assert json.loads((folder / "encoder.json").read_text())["format_version"] == version
        assert read_encoder(folder)[0]["features"][0]["cycles"] == cycles


def test_broken_folders(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"encoder\.json"):
        QueryEncoder.load(tmp_path / "nowhere")
    folder = tmp_path / "broken"
    shutil.copytree(encoder_folder, folder)
    config = json.loads((folder / "encoder.json").read_text())
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    with pytest.raises(CorruptFile, match=r"weights\.safetensors: missing or altered"):
        QueryEncoder.load(folder)
    (folder / "encoder.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(NewerFormat, match="format_version <= 5; got 99"):
        QueryEncoder.load(folder)
    for content in ("{", "[]", "{}"):
        (folder / "encoder.json").write_text(content)
        with pytest.raises(CorruptFile, match=r"encoder\.json: not a query encoder"):
            QueryEncoder.load(folder)
