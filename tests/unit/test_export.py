"""Export against the model it came from; evaluation against plain loops and through a search."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
import torch

from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.encoder_files import read_encoder
from shardline.shards.core.errors import DataError, InvalidInput, NotFound
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.vector_files import read_queries
from shardline.shards.text.model_folder import describe_model
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import ITEMS, Dataset
from shardline.training.evaluation import evaluate
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.evaluate import drop_known, evaluate_exact, evaluate_through
from shardline.training.evaluation.user_queries import (
    evaluation_task,
    query_features,
)
from shardline.training.export import export
from shardline.training.features.embed_text import embed_texts
from shardline.training.loop.run_rank import train_rank
from shardline.training.model.checkpoint import load_best
from shardline.training.model.encoding import encode_items
from tests.text_models import tiny_model
from tests.tiny import ITEM_IDS, declared_run, tiny_config, tiny_dataset

WHEN = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    folder = tmp_path_factory.mktemp("trained")
    dataset = tiny_dataset(folder / "data")
    config = tiny_config(epochs=3)
    train_rank(declared_run(folder / "run", config, dataset), torch.device("cpu"))
    return folder / "run", dataset


def test_set_holds_the_models_vectors_and_the_catalogue(
    trained: tuple[Path, Dataset], tmp_path: Path
) -> None:
    run_folder, dataset = trained
    stages: list[tuple[str, int, int]] = []
    written = export(
        run_folder,
        dataset.path,
        tmp_path,
        created_at=WHEN,
        progress=lambda *stage: stages.append(stage),
    )
    assert stages == [("export", 60, 60)]
    found = open_embedding_set(tmp_path / "embeddings" / written.model_version)
    assert (found.rows, found.dim, found.metric, found.normalised) == (60, 16, "cosine", True)
    run, model = load_best(run_folder)
    expected = encode_items(model, run.space.item.encode(dataset.items(), ITEMS))
    (batch,) = found.batches()
    assert batch.item_ids.tolist() == ITEM_IDS.tolist()
    assert (batch.vectors == expected).all()
    assert batch.attributes.schema.names == ["category", "price", "attribute_vector"]
    assert batch.attributes.column("price").equals(dataset.items()["price"].combine_chunks())
    assert found.encoder_folder is not None
    assert QueryEncoder.load(found.encoder_folder).model_version == found.model_version


def test_sample_queries_are_validation_users_with_their_train_history(
    trained: tuple[Path, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder, dataset = trained
    written = export(run_folder, dataset.path, tmp_path / "all", created_at=WHEN)
    assert written.queries_file is not None
    queries = read_queries(written.queries_file, dim=16)
    assert written.encoder_folder is not None
    encoder = QueryEncoder.load(written.encoder_folder)
    run, _ = load_best(run_folder)
    features = query_features(dataset, run.space.query_kinds, np.arange(40), ("train",))
    np.testing.assert_allclose(queries, encoder.encode(features), atol=1e-5)
    monkeypatch.setattr("shardline.training.export.MAX_SAMPLE_QUERIES", 7)
    sets = [export(run_folder, dataset.path, tmp_path / n, created_at=WHEN) for n in ("a", "b")]
    few, again = (read_queries(each.folder / "queries.arrow", dim=16) for each in sets)
    assert few.shape == (7, 16)
    np.testing.assert_array_equal(few, again)
    distances = np.abs(few[:, None] - queries[None]).max(axis=2)
    assert (distances.min(axis=1) < 1e-6).all()
    assert distances[-1].argmin() > 6  # drawn, not the first ones


def test_without_a_validation_split_there_are_no_queries(tmp_path: Path) -> None:
    tiny = tiny_dataset(tmp_path / "tiny")
    rows = tiny.interactions()
    kept = rows.filter(pa.compute.not_equal(rows["split"].cast(pa.string()), "val"))
    dataset = write_dataset(tmp_path / "data", tiny.users(), tiny.items(), kept, name="no val")
    run_folder = declared_run(
        tmp_path / "run", tiny_config(epochs=1, fit_splits="train+val"), dataset
    )
    train_rank(run_folder, torch.device("cpu"))
    assert export(run_folder, dataset.path, tmp_path, created_at=WHEN).queries_file is None


def test_a_query_tower_without_history_has_sample_queries_too(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    towers = tiny_config().model_dump()["towers"]
    towers["query"]["features"] = [
        each for each in towers["query"]["features"] if each["kind"] != "history"
    ]
    run_folder = declared_run(tmp_path / "run", tiny_config(epochs=1, towers=towers), dataset)
    train_rank(run_folder, torch.device("cpu"))
    written = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    assert written.queries_file is not None
    assert read_queries(written.queries_file, dim=16).shape == (40, 16)


def test_same_model_same_version(trained: tuple[Path, Dataset], tmp_path: Path) -> None:
    run_folder, dataset = trained
    first = export(run_folder, dataset.path, tmp_path / "a", created_at=WHEN)
    again = export(run_folder, dataset.path, tmp_path / "a", created_at="later")
    assert again == first  # the set that is there already
    elsewhere = export(run_folder, dataset.path, tmp_path / "b", created_at=WHEN)
    assert elsewhere.model_version == first.model_version
    assert len(first.model_version) == 12
    checksums = [{e.sha256 for e in s.files} for s in (first, elsewhere)]
    assert checksums[0] == checksums[1]


def test_a_set_of_before_item_encoders_is_not_taken_for_this_export(
    trained: tuple[Path, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else exporting again, which is what a router then asks for, would change nothing."""
    run_folder, dataset = trained
    with monkeypatch.context() as patch:
        patch.setattr("shardline.training.export.EXPORT_FORMAT", 1)
        before = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    shutil.rmtree(before.folder / "item_encoder")
    assert before.item_encoder_folder is None
    again = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    assert again.model_version != before.model_version
    assert again.item_encoder_folder is not None
    (one,), (other,) = before.batches(), again.batches()
    assert (one.vectors == other.vectors).all()


def test_missing_run_and_other_catalogue(trained: tuple[Path, Dataset], tmp_path: Path) -> None:
    run_folder, dataset = trained
    with pytest.raises(NotFound, match="no complete training run"):
        export(tmp_path / "nowhere", dataset.path, tmp_path, created_at=WHEN)
    with pytest.raises(NotFound, match="no complete dataset"):
        export(run_folder, tmp_path / "nowhere", tmp_path, created_at=WHEN)


def test_a_changed_catalogue_is_exported_anew(
    trained: tuple[Path, Dataset], tmp_path: Path
) -> None:
    run_folder, dataset = trained
    first = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    items = dataset.items()
    more = items.set_column(0, "item_id", pa.array(ITEM_IDS + 1000)).slice(0, 5)
    grown = write_dataset(
        tmp_path / "grown",
        dataset.users(),
        pa.concat_tables([items, more]),
        dataset.interactions(),
        name="grown",
    )
    second = export(run_folder, grown.path, tmp_path, created_at=WHEN)
    assert second.model_version != first.model_version
    assert (first.rows, second.rows) == (60, 65)
    assert export(run_folder, dataset.path, tmp_path, created_at=WHEN) == first
    with pytest.raises(DataError, match=r"expected 'tiny' \(.*; got 'grown' \(.*; --data names"):
        evaluate_exact(run_folder, grown)


def test_blocks_change_nothing(
    trained: tuple[Path, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder, dataset = trained
    whole = export(run_folder, dataset.path, tmp_path / "whole", created_at=WHEN).encoder_folder
    monkeypatch.setattr("shardline.training.export.BLOCK_ROWS", 25)
    blocks = export(run_folder, dataset.path, tmp_path / "blocks", created_at=WHEN).encoder_folder
    assert whole is not None and blocks is not None
    expected, found = (read_encoder(f)[1] for f in (whole, blocks))
    assert found.keys() == expected.keys()
    assert found["history.rows"].shape[0] == 60
    assert all((found[name] == value).all() for name, value in expected.items())


def slow_recall(queries: np.ndarray, items: np.ndarray, known: Csr, wanted: Csr, k: int) -> float:
    recalls = []
    for user in range(len(queries)):
        mine = set(wanted.items[wanted.indptr[user] : wanted.indptr[user + 1]])
        seen = set(known.items[known.indptr[user] : known.indptr[user + 1]])
        order = np.argsort(-(items @ queries[user]), kind="stable")
        top = [item for item in order if item not in seen][:k]
        recalls.append(len(mine & set(top)) / len(mine))
    return float(np.mean(recalls))


def test_exact_and_through_a_search_agree(trained: tuple[Path, Dataset], tmp_path: Path) -> None:
    run_folder, dataset = trained
    run, _ = load_best(run_folder)
    written = export(run_folder, dataset.path, tmp_path, created_at=WHEN)
    (batch,) = written.batches()
    assert written.encoder_folder is not None
    encoder = QueryEncoder.load(written.encoder_folder)
    asked: list[int] = []
    sent: list[np.ndarray] = []

    def search(features: list[dict], k: int) -> np.ndarray:
        asked.append(k)
        sent.append(encoder.encode(features))
        order = np.argsort(-(sent[-1] @ batch.vectors.T), axis=1, kind="stable")[:, :k]
        return batch.item_ids[order]

    exact = evaluate_exact(run_folder, dataset, ks=(5, 10))
    through = evaluate_through(search, dataset, kinds=run.space.query_kinds, ks=(5, 10))
    assert asked == [10 + 7]  # train and val items of a user are known
    assert exact.users == through.users == 40
    for name in ("recall@5", "recall@10", "hit_rate@10", "ndcg@10", "mrr"):
        assert through.means[name] == pytest.approx(exact.means[name], abs=1e-6), name
    known, wanted = dataset.positives("train", "val"), dataset.positives("test")
    expected = slow_recall(np.concatenate(sent), batch.vectors, known, wanted, 10)
    assert exact.means["recall@10"] == pytest.approx(expected)
    defaults = evaluate_exact(run_folder, dataset)
    assert "recall@10" in defaults.means
    assert "recall@100" not in defaults.means  # beyond the corpus


def test_the_same_users_are_asked_everywhere(trained: tuple[Path, Dataset]) -> None:
    run_folder, dataset = trained
    users = evaluation_task(dataset, "test", max_users=7).users
    assert len(set(users.tolist())) == 7
    assert (np.diff(users) > 0).all()
    assert users[-1] > 7  # drawn, not the first ones
    wanted = dataset.users()["user_id"].to_numpy()[users].tolist()
    asked: list[int] = []

    def search(features: list[dict], k: int) -> np.ndarray:
        asked.extend(feature["user_id"] for feature in features)
        return np.tile(ITEM_IDS[:k], (len(features), 1))

    kinds = {"user_id": "id"}
    through = evaluate_through(search, dataset, kinds=kinds, ks=(5,), max_users=7)
    assert asked == wanted
    exact = evaluate_exact(run_folder, dataset, ks=(5,), max_users=7)
    popular = evaluate_baseline(Baseline.POPULARITY, dataset, ks=(5,), max_users=7)
    assert through.users == exact.users == popular.users == 7
    assert exact.means != evaluate_exact(run_folder, dataset, ks=(5,)).means
    with pytest.raises(InvalidInput, match="max_users: out of range; expected >= 1; got 0"):
        evaluate_exact(run_folder, dataset, max_users=0)


@pytest.mark.parametrize(("ks", "got"), [((5, 61), "61"), ((5, 0), "0"), ((), "none")])
def test_cut_offs_the_corpus_does_not_have(
    trained: tuple[Path, Dataset], ks: tuple[int, ...], got: str
) -> None:
    run_folder, dataset = trained
    for measure in (
        lambda: evaluate_exact(run_folder, dataset, ks=ks),
        lambda: evaluate_through(lambda f, k: np.empty(0), dataset, kinds={}, ks=ks),
        lambda: evaluate_baseline(Baseline.POPULARITY, dataset, ks=ks),
    ):
        with pytest.raises(InvalidInput, match=f"^k: .*; expected 1 to 60; got {got}$"):
            measure()


def test_known_items_must_fit_the_answer_too(
    trained: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every user knows 7 items: of a limit of 20, 13 are left."""
    _, dataset = trained
    monkeypatch.setattr(evaluate, "MAX_K", 20)
    asked: list[int] = []

    def search(features: list[dict], k: int) -> np.ndarray:
        asked.append(k)
        return np.tile(ITEM_IDS[:k], (len(features), 1))

    evaluate_through(search, dataset, kinds={"age": "numeric"}, ks=(13,))
    assert asked == [20]
    with pytest.raises(InvalidInput, match=r"k: a user knows 7 items.*; expected <= 13.*; got 14"):
        evaluate_through(search, dataset, kinds={"age": "numeric"}, ks=(14,))
    monkeypatch.setattr(evaluate, "MAX_K", 60)  # the whole corpus: nothing can be missing
    evaluate_through(search, dataset, kinds={"age": "numeric"}, ks=(60,))
    assert asked == [20, 60]


def test_drop_known_keeps_order_and_pads() -> None:
    found = np.array([[5, 3, 9, 1], [2, 4, -1, -1]])
    known = Csr(np.array([0, 2, 3]), np.array([3, 7, 2]))
    assert drop_known(found, known, 3).tolist() == [[5, 9, 1], [4, -1, -1]]


def test_users_and_items_that_training_has_not_seen(tmp_path: Path) -> None:
    """One user has nothing but a test item, one nothing at all; that item nobody has in train."""
    tiny = tiny_dataset(tmp_path / "tiny")
    users, items = tiny.users().to_pydict(), tiny.items()
    for name, values in {"user_id": [901, 903], "age": [30, 31], "country": ["UK", "XX"]}.items():
        users[name] += values
    users["member"] += [True, False]
    new = items.slice(0, 1).set_column(0, "item_id", [[7]])  # sorted to the front of the table
    rows = tiny.interactions().to_pydict()
    for name, value in {"user_id": 901, "item_id": 7, "timestamp": 99, "split": "test"}.items():
        rows[name].append(value)
    interactions = pa.table(rows | {"split": pa.array(rows["split"]).dictionary_encode()})
    dataset = write_dataset(
        tmp_path / "data",
        pa.table(users),
        pa.concat_tables([new, items]),
        interactions,
        name="grown",
    )
    config = tiny_config(epochs=1)
    train_rank(declared_run(tmp_path / "run", config, dataset), torch.device("cpu"))
    result = evaluate_exact(tmp_path / "run", dataset, ks=(61,), with_segments=True)
    assert (result.users, result.means["recall@61"]) == (41, 1.0)  # 903 has nothing to find
    assert all(np.isfinite(value) for value in result.means.values())
    new_users, cold = result.segments["new users"], result.segments["cold items"]
    assert new_users is not None
    assert (new_users.users, new_users.relevant, new_users.means["recall@61"]) == (1, 1, 1.0)
    trained_on = set(dataset.interactions("train")["item_id"].to_pylist())
    wanted = [i for i in dataset.interactions("test")["item_id"].to_pylist() if i not in trained_on]
    assert cold is not None
    assert 7 in wanted
    assert cold.relevant == len(wanted)
    unseen = len(set(dataset.items()["item_id"].to_pylist()) - trained_on)
    alone = evaluate_exact(tmp_path / "run", dataset, ks=(unseen,), candidates="cold")
    assert (alone.relevant, alone.means[f"recall@{unseen}"]) == (len(wanted), 1.0)


def test_unknown_split(trained: tuple[Path, Dataset]) -> None:
    run_folder, dataset = trained
    with pytest.raises(InvalidInput, match=r"split: unknown split; expected val \| test"):
        evaluate_exact(run_folder, dataset, split="train")


def test_queries_need_the_columns_of_the_model(trained: tuple[Path, Dataset]) -> None:
    _, dataset = trained
    with pytest.raises(NotFound, match="no column 'shoe_size'"):
        evaluate_through(lambda f, k: np.empty(0), dataset, kinds={"shoe_size": "numeric"})


def test_a_query_tower_of_texts_takes_them_and_knows_their_encoder(tmp_path: Path) -> None:
    tiny, model = tiny_dataset(tmp_path / "data"), tiny_model(tmp_path / "model")
    users = tiny.users().append_column("words", pa.array(["red shoes"] * tiny.rows["users"]))
    dataset = write_dataset(tmp_path / "w", users, tiny.items(), tiny.interactions(), name="w")
    options: dict[str, Any] = {"column": "words", "name": "v", "of": "users"}
    embedded = embed_texts(dataset, tmp_path / "e", model=str(model), **options)
    towers = tiny_config().model_dump()["towers"]
    towers["query"]["features"] = [{"kind": "numeric", "column": "v"}]
    run_folder = declared_run(tmp_path / "run", tiny_config(epochs=1, towers=towers), embedded)
    train_rank(run_folder, torch.device("cpu"))
    written = export(run_folder, embedded.path, tmp_path, created_at=WHEN)
    assert written.encoder_folder is not None
    encoder = QueryEncoder.load(written.encoder_folder)
    assert encoder.text_encoders == {"v": describe_model(model).id}
    assert encoder.features[0]["value"] == "text, or list of 8 finite numbers, or null"
