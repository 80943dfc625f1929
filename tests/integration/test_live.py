"""Items are written while the cluster serves, is copied, and has its processes killed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from shardline.cluster.backup.restore import restore_snapshot
from shardline.cluster.backup.take_snapshot import take_snapshot
from shardline.cluster.control.actor_name import CONTROLLER_NAME
from shardline.cluster.corpus_from_live import live_corpus
from shardline.cluster.serving.deployment import shard_reports
from shardline.cluster.store import Store
from shardline.router.client.sync_client import Client
from shardline.router.contract import Forbidden
from shardline.router.encoder.item_encoder import ItemEncoder
from shardline.router.encoder.new_item_cache import NewItemCache, NewItemLookup
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.http.api_keys import Scope
from shardline.router.past_items import made_of
from shardline.router.query import FoundAttributes
from shardline.shards.core.encoder_files import ITEM_ENCODER_FOLDER, QUERY_ENCODER_FOLDER
from shardline.shards.core.errors import NotFound, ShardlineError, Unavailable
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.live_rows import open_live_rows
from shardline.shards.storage.embedding_set import EmbeddingBatch, open_embedding_set
from shardline.training.evaluation.user_queries import query_features
from tests.integration.conftest import NUM_ITEMS, Cluster

NEW_ITEMS = 1_000_000  # ids from here on are nobody else's in the session's cluster
DIFFERENT_ITEMS = 300  # that are written while processes die
BACK_S = 60.0


@pytest.fixture
def writer(cluster: Cluster) -> Iterator[Client]:
    """Deletes what it may have written: other tests use the same cluster."""
    with cluster.endpoint.address_for(Scope.WRITE).client() as client:
        yield client
        until(lambda: is_deleted(client, range(NEW_ITEMS, NEW_ITEMS + 500)))


def is_deleted(client: Client, ids: range) -> bool:
    try:
        client.delete(list(ids))
    except Unavailable:
        return False
    return True


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BACK_S
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


def vectors_of(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, 128)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_an_item_is_found_once_it_is_acknowledged_and_not_once_it_is_deleted(writer) -> None:
    ids, vectors = np.arange(NEW_ITEMS, NEW_ITEMS + 30), vectors_of(30, seed=1)
    written = writer.upsert(item_ids=ids, vectors=vectors)
    assert (written.rows, written.created) == (30, 30)
    answer = writer.search(vectors=vectors, k=5)
    assert answer.ids[:, 0].tolist() == ids.tolist()
    assert answer.coverage.share == 1.0
    similar = writer.search(item_ids=ids[:2], k=5)
    assert (similar.ids >= 0).all()
    np.testing.assert_allclose(writer.item(NEW_ITEMS).vector, vectors[0], rtol=1e-6)
    assert writer.delete(ids[:10]).deleted == 10
    again = writer.search(vectors=vectors, k=5)
    assert not np.isin(again.ids, ids[:10]).any()
    assert again.ids[10:, 0].tolist() == ids[10:].tolist()
    with pytest.raises(NotFound):
        writer.item(NEW_ITEMS)


def test_items_written_by_features_are_encoded_and_count_in_histories(
    cluster: Cluster, writer: Client
) -> None:
    """Copies of catalogue items under new ids: found as the item tower sees them, their attributes
    those of the originals, and part of a user's history at once."""
    encoder = ItemEncoder.load(cluster.generation / ITEM_ENCODER_FOLDER)
    query = QueryEncoder.load(cluster.generation / QUERY_ENCODER_FOLDER)
    items = ItemAttributes(cluster.dataset.items().drop_columns(["item_id"]))
    ids, rows = np.arange(NEW_ITEMS, NEW_ITEMS + 6), np.arange(100, 106)
    features = {name: items.values(name, rows) for name in encoder.names}
    written = writer.upsert(item_ids=ids, features=features, model_version=encoder.model_version)
    assert written.created == 6
    given = [dict(zip(features, row, strict=True)) for row in zip(*features.values(), strict=True)]
    vectors = encoder.encode(ids, given, lambda *_: "")
    found = writer.search(vectors=vectors, k=2).ids  # an original that nobody took is as near
    assert all(item in near for item, near in zip(ids.tolist(), found.tolist(), strict=True))
    one = writer.item(int(ids[0]))
    np.testing.assert_allclose(one.vector, vectors[0], atol=1e-5)
    assert {name: one.attributes[name] for name in features} == given[0]

    kinds = {each["name"]: each["kind"] for each in query.features}
    (user,) = query_features(cluster.dataset, kinds, np.arange(1), ("train",))
    (history,) = (name for name, kind in kinds.items() if kind == "history")
    user[history] = ids.tolist()
    lookup = NewItemLookup(NewItemCache(), 0.0)
    values = {n: dict(zip(ids.tolist(), column, strict=True)) for n, column in features.items()}
    brought = FoundAttributes(item_ids=ids, values=values, size=0, missing=())
    lookup.found |= made_of(encoder, brought)
    expected = writer.search(vectors=query.encode([user], lookup), k=20, min_seq=written.seq)
    answer = writer.search(features=[user], k=20, min_seq=written.seq)
    assert answer.ids.tolist() == expected.ids.tolist()
    np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-4)
    assert np.abs(query.encode([user], lookup) - query.encode([user])).max() > 1e-2


def test_a_key_that_only_searches_writes_nothing(cluster: Cluster, client: Client) -> None:
    with pytest.raises(Forbidden, match="write"):
        client.upsert(item_ids=[NEW_ITEMS], vectors=vectors_of(1, seed=2))
    with pytest.raises(NotFound):
        client.item(NEW_ITEMS)


def primary_of_the_last_shard() -> int:
    """Its pid, once it leads and says so: the controller may just have been restarted."""
    found: list[int] = []

    def is_known() -> bool:
        try:
            *_, last = shard_reports()
        except Unavailable:
            return False
        if last.get("leads") is not None:
            found.append(last["pid"])
        return bool(found)

    until(is_known)
    return found[0]


@dataclass
class Acknowledged:
    """newest: item -> the number of its newest vector that was acknowledged; the same few items are
    written over and over. writes: acknowledged so far."""

    newest: dict[int, int] = field(default_factory=dict)
    writes: int = 0


@contextmanager
def writing(cluster: Cluster, errors: list[ShardlineError]) -> Iterator[Acknowledged]:
    """Items are written for as long as the block runs."""
    acknowledged = Acknowledged()
    done = threading.Event()

    def write() -> None:
        with cluster.endpoint.address_for(Scope.WRITE).client() as client:
            for number in count():
                if done.is_set():
                    return
                item = NEW_ITEMS + number % DIFFERENT_ITEMS
                try:
                    client.upsert(item_ids=[item], vectors=vectors_of(1, seed=number))
                except ShardlineError as error:
                    acknowledged.newest.pop(item, None)  # it may have been written or not
                    errors.append(error)
                else:
                    acknowledged.newest[item] = number
                    acknowledged.writes += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield acknowledged
    finally:
        done.set()
        thread.join()


def test_copies_of_what_is_live_are_made_while_items_are_written(
    cluster: Cluster, writer: Client, tmp_path: Path
) -> None:
    """A snapshot and a new generation each have what was acknowledged before they were begun."""
    errors: list[ShardlineError] = []
    store, number = cluster.store, cluster.endpoint.generation
    copied = Store(tmp_path / "store")
    with writing(cluster, errors) as acknowledged:
        until(lambda: acknowledged.writes > 40)
        before, first = dict(acknowledged.newest), acknowledged.writes
        take_snapshot(store, number, str(tmp_path / "snapshot"))
        restored = restore_snapshot(copied, str(tmp_path / "snapshot"), num_shards=2)
        later, second = dict(acknowledged.newest), acknowledged.writes
        with live_corpus(store, number, lambda stage, done, total: None) as folder:
            live = open_embedding_set(folder)
            found = rows_by_id(live.batches())
    assert not errors
    assert live.cut is not None and sum(live.cut.seqs) >= second > first
    shards = range(len(restored.shards))
    generation = copied.generation(restored.generation)
    blocks = [open_live_rows(generation, restored, shard).blocks() for shard in shards]
    for rows, first in ((rows_by_id(chain(*blocks)), before), (found, later)):
        assert sum(item < NEW_ITEMS for item in rows) == NUM_ITEMS
        for item, oldest in first.items():
            newest = range(oldest, acknowledged.newest[item] + 1, DIFFERENT_ITEMS)
            versions = [vectors_of(1, seed=each)[0] for each in newest]
            assert any(np.allclose(rows[item], each, rtol=1e-5) for each in versions)
    assert not errors


def rows_by_id(batches: Iterable[EmbeddingBatch]) -> dict[int, np.ndarray]:
    return {
        item: vector
        for batch in batches
        for item, vector in zip(batch.item_ids.tolist(), batch.vectors, strict=True)
    }


@pytest.mark.parametrize("victim", ["shard", "controller", "stopped shard"])
def test_nothing_acknowledged_is_lost_when_processes_die(
    cluster: Cluster, writer: Client, victim: str
) -> None:
    errors: list[ShardlineError] = []
    with writing(cluster, errors) as acknowledged:
        until(lambda: acknowledged.writes > 40)
        if victim == "controller":
            ray.kill(ray.get_actor(CONTROLLER_NAME), no_restart=False)
        else:
            pid = primary_of_the_last_shard()  # new ids are above all ranges
            os.kill(pid, signal.SIGKILL if victim == "shard" else signal.SIGSTOP)
            if victim != "shard":
                time.sleep(1.0)
                psutil.Process(pid).send_signal(signal.SIGCONT)
        before = acknowledged.writes
        until(lambda: acknowledged.writes > before + 40)
    assert all(isinstance(error, Unavailable) for error in errors), errors
    if victim == "controller":
        assert not errors, "writes do not need it"
    assert len(acknowledged.newest) > 40
    for item, number in acknowledged.newest.items():
        np.testing.assert_allclose(
            writer.item(item).vector, vectors_of(1, seed=number)[0], rtol=1e-6
        )
