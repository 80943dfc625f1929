"""A shard against brute force: ids, order, batches, fetch, and loading of damaged folders."""

from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.errors import (
    CorruptFile,
    InvalidInput,
    NewerFormat,
    NotFound,
    ShardlineError,
)
from shardline.shards.core.files import write_manifest
from shardline.shards.core.messages import FetchRequest, SearchParams, SearchReply, SearchRequest
from shardline.shards.core.schema import Metric
from shardline.shards.index.selection import Selection
from shardline.shards.server.shard import Shard
from shardline.shards.storage.generation import (
    describe_shard,
    read_generation,
    write_generation,
    write_item_ids,
)
from tests.engine import build_generation, flat_shard
from tests.reference import assert_answer_order, assert_same_answers, brute_force

ROWS, DIM = 300, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rows = manifold(ROWS, DIM, 4, seed=1)
    rows[50:60] = rows[7]
    return rows


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.sort(np.random.default_rng(2).choice(10**12, ROWS, replace=False)).astype(np.int64)


@pytest.fixture(scope="module")
def shard(vectors, ids) -> Shard:
    return flat_shard(vectors, ids)


def request(queries: np.ndarray, k: int = 10, **fields) -> SearchRequest:
    return SearchRequest(queries=queries, k=k, timeout_ms=1000.0, **fields)


@pytest.mark.parametrize("k", [1, 20, ROWS, ROWS + 7])
def test_search_equals_brute_force(shard, vectors, ids, k) -> None:
    queries = vectors[5:10]
    reply = shard.search(request(queries, k))
    assert_same_answers(reply.ranked, brute_force(queries, vectors, ids, k, Metric.DOT))
    assert_answer_order(reply.ranked)
    assert reply.ranked.ids.shape == (5, k)
    assert reply.rows == ROWS
    assert reply.search_ms > 0


def test_ties_come_in_order_of_item_id(shard, vectors, ids) -> None:
    reply = shard.search(request(vectors[7:8], 11))
    assert reply.ranked.ids[0].tolist() == [ids[7], *ids[50:60]]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request(np.zeros((1, DIM + 1), np.float32)), "queries"),
        (request(np.zeros((0, DIM), np.float32)), "queries"),
        (request(np.zeros((1, DIM), np.float32), 0), "k"),
        (request(np.zeros((1, DIM), np.float32), -3), "k"),
        (request(np.zeros((1, DIM), np.float32), 2050), "k"),
        (
            request(np.zeros((1, DIM), np.float32), params=SearchParams(nprobe=9999)),
            "params.nprobe",
        ),
    ],
)
def test_a_wrong_request_is_refused_and_harms_no_other(shard, vectors, bad, field) -> None:
    with pytest.raises(InvalidInput) as caught:
        shard.search(bad)
    assert caught.value.field == field
    good = request(vectors[:2])
    first, wrong, last = shard.search_batch([good, bad, good])
    assert isinstance(wrong, InvalidInput)
    for reply in (first, last):
        np.testing.assert_array_equal(reply.ranked.ids, shard.search(good).ranked.ids)


def test_a_batch_answers_each_request_as_if_alone(shard, vectors) -> None:
    rng = np.random.default_rng(3)
    requests = [
        request(
            vectors[rng.integers(0, ROWS, rng.integers(1, 5))],
            int(rng.choice([3, 10])),
            params=SearchParams(nprobe=int(rng.choice([1, 2]))),
        )
        for _ in range(20)
    ]
    for asked, reply in zip(requests, shard.search_batch(requests), strict=True):
        assert isinstance(reply, SearchReply)
        alone = shard.search(asked)
        assert_same_answers(reply.ranked, alone.ranked)
    assert shard.search_batch([]) == []


def test_a_bug_costs_the_requests_that_meet_it(shard, vectors, monkeypatch, caplog) -> None:
    main = shard.state.main
    search = main.search

    def broken(queries, k, *others, **named):
        if k == 5:
            raise RuntimeError("a bug")
        return search(queries, k, *others, **named)

    monkeypatch.setattr(main, "search", broken)
    good, bad = request(vectors[:2]), request(vectors[:2], 5)
    replies = shard.search_batch([good, bad, good, bad])
    for reply in (replies[0], replies[2]):
        assert_same_answers(reply.ranked, shard.search(good).ranked)
    for reply in (replies[1], replies[3]):
        assert (type(reply), reply.details) == (ShardlineError, "internal error of the shard")
    assert "RuntimeError: a bug" in caplog.text
    with pytest.raises(RuntimeError):
        shard.search_batch([bad])


def test_compatible_requests_share_one_search(shard, vectors, monkeypatch) -> None:
    sizes = []
    main = shard.state.main
    search = main.search

    def counted(queries, k, *others, **named):
        sizes.append((len(queries), k))
        return search(queries, k, *others, **named)

    monkeypatch.setattr(main, "search", counted)
    shard.search_batch([request(vectors[:2]), request(vectors[:3], 5), request(vectors[:4])])
    assert sorted(sizes) == [(3, 5), (6, 10)]


def test_fetch_returns_what_it_holds_in_the_order_asked(shard, vectors, ids) -> None:
    asked = np.array([ids[9], 10**15, ids[0], ids[0] + 1, ids[-1], ids[9], 0])
    reply = shard.fetch(FetchRequest(item_ids=asked, timeout_ms=100.0))
    assert reply.item_ids.tolist() == [ids[9], ids[0], ids[-1], ids[9]]
    np.testing.assert_array_equal(reply.vectors, vectors[[9, 0, -1, 9]])
    nothing = shard.fetch(FetchRequest(item_ids=np.array([10**15]), timeout_ms=100.0))
    assert nothing.vectors.shape == (0, DIM)


def test_a_state_hides_excluded_rows_from_searches_and_fetches(shard, vectors, ids) -> None:
    gone = np.array([7, 50, 51])
    state = replace(shard.state, selection=Selection.without(gone, rows=ROWS), seq=3)
    live = Shard(shard=0, generation=7, state=state)
    reply = live.search(request(vectors[7:8], 20))
    kept = np.setdiff1d(np.arange(ROWS), gone)
    expected = brute_force(vectors[7:8], vectors[kept], ids[kept], 20, Metric.DOT)
    assert_same_answers(reply.ranked, expected)
    assert (reply.rows, reply.seq, reply.generation) == (ROWS - 3, 3, 7)
    fetched = live.fetch(FetchRequest(item_ids=ids[[6, 7, 51, 52]], timeout_ms=1.0))
    assert fetched.item_ids.tolist() == ids[[6, 52]].tolist()
    assert (fetched.seq, fetched.generation) == (3, 7)
    assert shard.search(request(vectors[7:8], 1)).ranked.ids[0, 0] == ids[7]


def test_fetch_refuses_negative_ids(shard) -> None:
    with pytest.raises(InvalidInput, match="negative id"):
        shard.fetch(FetchRequest(item_ids=np.array([-1]), timeout_ms=100.0))


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq-fs"])
def test_loaded_shards_hold_their_ranges(tmp_path: Path, vectors, ids, kind) -> None:
    build_generation(tmp_path, vectors, ids, 3, kind=kind)
    for number, mine in enumerate(np.array_split(np.arange(ROWS), 3)):
        shard = Shard.load(tmp_path, number)
        assert (shard.shard, shard.generation, shard.rows, shard.dim) == (number, 7, 100, DIM)
        reply = shard.search(request(vectors[mine[:4]], 100, params=SearchParams(nprobe=2048)))
        assert set(reply.ranked.ids[0].tolist()) == set(ids[mine].tolist())
        fetched = shard.fetch(FetchRequest(item_ids=ids, timeout_ms=1.0))
        assert fetched.item_ids.tolist() == ids[mine].tolist()
        np.testing.assert_allclose(fetched.vectors, vectors[mine], atol=5e-4)
        assert shard.describe()["rows"] == 100


def test_absent_shards_are_not_found(tmp_path: Path, vectors, ids) -> None:
    with pytest.raises(NotFound):
        Shard.load(tmp_path, 0)
    build_generation(tmp_path, vectors, ids, 2, kind="flat")
    with pytest.raises(NotFound, match="has no shard 2"):
        Shard.load(tmp_path, 2)


@pytest.mark.parametrize("name", ["index.faiss", "item_ids.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_does_not_load(tmp_path: Path, vectors, ids, name, damage) -> None:
    build_generation(tmp_path, vectors, ids, 2, kind="flat")
    path = tmp_path / "shard-00001" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-3])
    Shard.load(tmp_path, 0)
    with pytest.raises(CorruptFile, match=name):
        Shard.load(tmp_path, 1)


def rewrite_shard(folder: Path, changed_ids: np.ndarray, **changes) -> None:
    """Shard 0 with other item ids, and a manifest with right checksums for them."""
    manifest = read_generation(folder)
    write_item_ids(folder / "shard-00000" / "item_ids.npy", changed_ids)
    entry = describe_shard(folder, 0, changed_ids)
    fields = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    write_generation(folder, type(manifest)(**{**fields, "shards": (entry,), **changes}))


def test_an_index_of_another_row_count_is_refused(tmp_path: Path, vectors, ids) -> None:
    build_generation(tmp_path, vectors, ids, 1, kind="flat")
    rewrite_shard(tmp_path, ids[:-1])
    with pytest.raises(CorruptFile, match=r"index\.faiss: wrong row count; expected 299; got 300"):
        Shard.load(tmp_path, 0)


def test_an_index_of_another_dimension_is_refused(tmp_path: Path, vectors, ids) -> None:
    build_generation(tmp_path, vectors, ids, 1, kind="flat")
    rewrite_shard(tmp_path, ids, dim=9)
    with pytest.raises(CorruptFile, match=r"index\.faiss: wrong dimension; expected 9; got 8"):
        Shard.load(tmp_path, 0)


def test_a_file_that_is_no_index_is_named(tmp_path: Path, vectors, ids) -> None:
    build_generation(tmp_path, vectors, ids, 1, kind="flat")
    (tmp_path / "shard-00000" / "index.faiss").write_bytes(b"not an index")
    rewrite_shard(tmp_path, ids)
    with pytest.raises(CorruptFile, match=r"index\.faiss: not a faiss index"):
        Shard.load(tmp_path, 0)


def test_a_newer_generation_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, kind="generation", version=99, body={})
    with pytest.raises(NewerFormat):
        Shard.load(tmp_path, 0)
