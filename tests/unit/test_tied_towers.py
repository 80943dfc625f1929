"""Tied towers: one vector per person, so score(a, b) = score(b, a), from training to the index."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from shardline.cluster.build import build_generation
from shardline.cluster.store import Store
from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.merge import merge_top_k
from shardline.shards.core.errors import DataError
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric, Ranked, normalise, query_vectors
from shardline.shards.index.main_index import MainIndex
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    read_generation,
    read_item_ids,
    shard_folder,
    verify_query_encoder,
)
from shardline.training.config.tower_config import TowersConfig
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import ITEMS, USERS, Dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.evaluate import evaluate_exact, evaluate_through
from shardline.training.evaluation.user_queries import query_features
from shardline.training.export import export
from shardline.training.exported_towers import TiedTower
from shardline.training.features.fitted import fit
from shardline.training.features.infer import infer_config
from shardline.training.features.prepared import TrainingData, prepare
from shardline.training.features.tied import own_items, with_own
from shardline.training.loop.batches import Sampler
from shardline.training.loop.run_rank import train_rank
from shardline.training.model.checkpoint import load_best, load_parts, open_data
from shardline.training.model.encoding import encode_items, encode_queries
from shardline.training.model.towers import build_model
from tests.engine import plan_of
from tests.people import FEATURES, NUM_PEOPLE, PEOPLE, people, tied_config
from tests.tiny import declared_run, untrained_run, with_weights

CPU = torch.device("cpu")
WHEN = "2026-01-01T00:00:00Z"
NOBODY = Csr(np.zeros(NUM_PEOPLE + 1, np.int64), np.empty(0, np.int64))
SUM = [each | {"dim": 16} for each in FEATURES if each["kind"] != "numeric"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return people(tmp_path_factory.mktemp("people") / "data")


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tied") / "run"
    train_rank(declared_run(run, tied_config(epochs=6), dataset), CPU)
    return run


def encoded(run: Any, model: Any, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of all people as queries and as items, by the towers in torch."""
    items = run.space.item.encode(dataset.items(), ITEMS)
    users = run.space.query.encode(dataset.users(), USERS)
    return encode_queries(model, users, NOBODY, items), encode_items(model, items)


def test_both_towers_are_one_and_train(dataset: Dataset, trained: Path) -> None:
    run, model = load_best(trained)
    assert not [name for name, _ in model.named_parameters() if name.startswith("query")]
    queries, vectors = encoded(run, model, dataset)
    np.testing.assert_array_equal(queries, vectors)
    fresh, _ = encoded(run, build_model(run.config, run.space).eval(), dataset)
    assert np.abs(fresh - vectors).max() > 0.05  # it learnt something
    found = evaluate_exact(trained, dataset, split="test", ks=(5,))
    popular = evaluate_baseline(
        Baseline.POPULARITY, dataset, split="test", ks=(5,), without_own=True
    )
    assert found.means["recall@5"] > 2 * popular.means["recall@5"]


def test_a_person_is_no_negative_of_themselves(dataset: Dataset, trained: Path) -> None:
    data = open_data(trained)
    assert data.own is not None
    np.testing.assert_array_equal(data.own, own_items(dataset))
    users = np.array([3, 58, 0])
    known = data.known(users)
    for place, user in enumerate(users):
        mine = known.items[known.indptr[place] : known.indptr[place + 1]].tolist()
        train = data.train.items[data.train.indptr[user] : data.train.indptr[user + 1]].tolist()
        assert mine == [*train, data.own[user]]
    run, _ = load_best(trained)
    sampler = Sampler(
        data=data, batch_size=24, rank=0, world=1, seed=1, unknown_rate=0.0, history_length=0,
        loss=run.config.loss,
    )  # fmt: skip
    batch = next(sampler.epoch(0))
    pairs = set(zip(batch.known_rows.tolist(), batch.known_items.tolist(), strict=True))
    assert all((row, data.own[user]) in pairs for row, user in enumerate(batch.user_rows))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Tied, without lengths of one, with weighted examples: to the last bit."""
    weighted = with_weights(people(tmp_path / "people"), tmp_path / "data")
    loss = {"weight_exponent": 1.0, "uniform_negatives": 4}
    config = tied_config(metric="dot", loss=loss, epochs=3, validation={"k": 10, "patience": 9})
    whole, cut = (declared_run(tmp_path / name, config, weighted) for name in ("whole", "cut"))
    state = train_rank(whole, CPU)

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "validation" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_rank(cut, CPU, interrupt)
    assert train_rank(cut, CPU) == state
    ours, theirs = (load_parts(run, state.step)["model"] for run in (whole, cut))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_own_items_at_the_end_of_lists() -> None:
    lists = Csr(np.array([0, 2, 2, 3]), np.array([4, 5, 6]))
    found = with_own(lists, np.array([9, 8, -1]))
    assert (found.indptr.tolist(), found.items.tolist()) == ([0, 3, 4, 5], [4, 5, 9, 8, 6])


def test_nobody_is_shown_themselves(dataset: Dataset, trained: Path) -> None:
    """The nearest of all is oneself: a search that answers so finds nobody else at k = 1."""
    ids = dataset.item_ids
    asked: list[int] = []

    def oneself_first(features: list[dict], k: int) -> np.ndarray:
        asked.append(k)
        lists = [[f["user_id"], *ids[ids != f["user_id"]][: k - 1]] for f in features]
        return np.array(lists)

    kinds = {"user_id": "id"}
    with_self = evaluate_through(oneself_first, dataset, kinds=kinds, ks=(NUM_PEOPLE,))
    without = evaluate_through(
        oneself_first, dataset, kinds=kinds, ks=(NUM_PEOPLE,), without_own=True
    )
    assert without.means["mrr"] > with_self.means["mrr"]
    exact = evaluate_exact(trained, dataset, ks=(1,))
    assert exact.means["hit_rate@1"] > 0.2  # with oneself in the list it would be 0


@pytest.mark.parametrize("kind", ["linear", "identity"])
def test_scores_are_symmetric_through_export_build_and_search(
    dataset: Dataset, tmp_path: Path, kind: str
) -> None:
    """Everybody asks by features, in batches of any size, shards of two kinds of index."""
    item: dict[str, Any] = {"features": FEATURES, "hidden": [24, 12]}
    if kind == "identity":
        item = {"features": SUM, "hidden": [], "projection": "identity"}
    config = tied_config(towers={"tied": True, "item": item})
    run = untrained_run(tmp_path / "run", config, dataset)
    store = Store(tmp_path / "store")
    written = export(run, dataset.path, store.root, created_at=WHEN)
    spec = {"kind": "ivf", "nlist": 4, "nprobe": 4} if kind == "linear" else {"kind": "flat"}
    built = build_generation(store, written.folder, plan_of(3, **spec))
    folder = store.generation(built.generation)
    encoder = QueryEncoder.load(verify_query_encoder(folder, read_generation(folder)))
    features = query_features(
        dataset,
        {each["name"]: each["kind"] for each in encoder.features},
        np.arange(NUM_PEOPLE),
        ("train",),
    )
    faiss.omp_set_num_threads(1)
    scores = {}
    for size in (1, 7, NUM_PEOPLE):
        rows = []
        for start in range(0, NUM_PEOPLE, size):
            vectors = encoder.encode(features[start : start + size])
            asked = query_vectors(vectors, dim=16, metric=Metric.COSINE)
            found = search(folder, built, asked)
            by_id = np.argsort(found.ids, axis=1)
            assert (np.take_along_axis(found.ids, by_id, 1) == PEOPLE).all()
            rows.append(np.take_along_axis(found.scores, by_id, 1))
        scores[size] = np.concatenate(rows)
        np.testing.assert_array_equal(scores[size], scores[size].T)
    np.testing.assert_array_equal(scores[1], scores[7])


def search(folder: Path, built: Any, queries: np.ndarray) -> Ranked:
    parts = []
    for shard in range(len(built.shards)):
        place = folder / shard_folder(shard)
        main = MainIndex.load(
            place / INDEX_NAME, metric=built.metric, defaults=built.index.search_params
        )
        ids = read_item_ids(place / ITEM_IDS_NAME, rows=built.shards[shard].rows)
        rows, scores = main.search(queries, NUM_PEOPLE, SearchParams())
        parts.append(Ranked(np.where(rows < 0, -1, ids[rows]), scores))
    return merge_top_k(parts, NUM_PEOPLE)


@pytest.mark.parametrize("projection", ["linear", "identity"])
def test_export_and_both_encoders_agree_bit_for_bit(
    dataset: Dataset, tmp_path: Path, projection: str
) -> None:
    item: dict[str, Any] = {"features": FEATURES, "hidden": [24, 12]}
    if projection == "identity":
        item = {"features": SUM, "hidden": [], "projection": "identity"}
    config = tied_config(towers={"tied": True, "item": item})
    run_folder = untrained_run(tmp_path / "run", config, dataset)
    written = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    (batch,) = written.batches()
    run, model = load_best(run_folder)
    slow = encode_items(model, run.space.item.encode(dataset.items(), ITEMS))
    np.testing.assert_allclose(batch.vectors, slow, atol=2e-6)  # torch, in float32
    block = run.space.item.encode(dataset.items(), ITEMS)
    np.testing.assert_array_equal(
        TiedTower(model)(block.take(np.arange(7, 12))), batch.vectors[7:12]
    )

    assert written.encoder_folder is not None and written.item_encoder_folder is not None
    asked = QueryEncoder.load(written.encoder_folder)
    kinds = {each["name"]: each["kind"] for each in asked.features}
    features = query_features(dataset, kinds, np.arange(NUM_PEOPLE), ("train",))
    np.testing.assert_array_equal(normalise(asked.encode(features)), batch.vectors)
    once = [normalise(asked.encode([each]))[0] for each in features]
    np.testing.assert_array_equal(once, batch.vectors)
    items = ItemEncoder.load(written.item_encoder_folder)
    rows = [{name: each[name] for name in items.names} for each in features]
    written_again = items.encode(PEOPLE, rows, lambda row, name, where: name)
    np.testing.assert_array_equal(normalise(written_again), batch.vectors)


def test_a_mirrored_query_tower_may_be_written_out() -> None:
    item = {"features": FEATURES, "hidden": [8]}
    short = TowersConfig.model_validate({"tied": True, "item": item})
    assert short.query.features is not None
    assert short.query.features[0].column == "user_id"
    assert TowersConfig.model_validate(short.model_dump()) == short
    mirrored = {"features": [{**FEATURES[0], "column": "user_id"}, *FEATURES[1:]], "hidden": [8]}
    assert TowersConfig.model_validate({"tied": True, "item": item, "query": mirrored}) == short


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": {"hidden": [9]}}, r"query differs from item in \['features', 'hidden'\]"),
        ({"query": {"features": FEATURES[:2], "hidden": [24, 12]}}, r"in \['features'\]"),
    ],
)
def test_towers_that_differ_cannot_be_tied(changes: dict[str, Any], message: str) -> None:
    towers = {"tied": True, "item": {"features": FEATURES, "hidden": [24, 12]}}
    with pytest.raises(ValidationError, match=message):
        tied_config(towers=towers | changes)


def test_settings_that_break_the_symmetry() -> None:
    with pytest.raises(ValidationError, match=r"with towers.tied it is 0, not 0.1"):
        tied_config(popularity_exponent=0.1)
    with pytest.raises(ValidationError, match=r"towers\.tied needs loss\.mask_known_positives"):
        tied_config(loss={"mask_known_positives": False})


def test_inferred_features_are_tied_too(dataset: Dataset) -> None:
    config = infer_config(tied_config(towers={"tied": True}), dataset)
    assert config.towers.tied
    assert config.towers.item.features is not None and config.towers.query.features is not None
    columns = [each.column for each in config.towers.item.features]
    assert columns == ["country", "groups", "about", "age"]
    assert [each.column for each in config.towers.query.features] == columns


def altered(dataset: Dataset, folder: Path, users: pa.Table) -> Dataset:
    return write_dataset(folder, users, dataset.items(), dataset.interactions(), name="other")


def test_tables_that_cannot_be_tied(dataset: Dataset, tmp_path: Path) -> None:
    config, users = tied_config(), dataset.users()
    other = altered(dataset, tmp_path / "missing", users.drop_columns(["age"]))
    with pytest.raises(DataError, match=r"users.parquet: age: tied towers need the same columns"):
        fit(config, other)
    place = users.column_names.index("age")
    ages = pa.array(["old"] * NUM_PEOPLE)
    other = altered(dataset, tmp_path / "type", users.set_column(place, "age", ages))
    with pytest.raises(DataError, match=r"age: .*; expected double, as in items.parquet; got str"):
        fit(config, other)
    names = pa.array([f"p{i}" for i in range(NUM_PEOPLE)])
    other = write_dataset(
        tmp_path / "numbers",
        users.append_column("original_id", names),
        dataset.items().append_column("original_id", names[::-1]),
        dataset.interactions(),
        name="numbers",
    )
    with pytest.raises(DataError, match="one number for one thing"):
        fit(config, other)


def test_pairs_of_one_and_the_same_are_refused(tmp_path: Path) -> None:
    one = int(PEOPLE[4])
    odd = people(tmp_path / "data", more=((one, one, "train"),))
    config = tied_config()
    with pytest.raises(DataError, match=f"got 1 rows, the first of id {one}"):
        prepare(odd, fit(config, odd), tmp_path / "cache", tied=True)


def test_a_run_without_ties_has_no_own_items(dataset: Dataset, tmp_path: Path) -> None:
    config = tied_config(
        towers={"item": {"features": FEATURES}, "query": {"features": FEATURES[1:]}}
    )
    prepare(dataset, fit(config, dataset), tmp_path / "cache")
    data = TrainingData.open(tmp_path / "cache")
    assert data.own is None
    assert data.known(np.array([2])).lengths.tolist() == [4]
