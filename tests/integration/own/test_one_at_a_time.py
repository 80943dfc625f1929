"""``publish --one-shard-at-a-time`` on a cluster that serves and is written to."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from shardline.cluster.build import build_generation
from shardline.cluster.config import load_config
from shardline.cluster.control.publish_state import PublishOptions
from shardline.cluster.control.start import CONTROLLER_NAME
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Endpoint
from shardline.cluster.serving.launched import asked, controller
from shardline.cluster.store import Store
from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import ShardlineError
from tests.engine import plan_of, write_set

ROWS, DIM, SHARDS = 4000, 16, 3
NEW_ITEMS = 1 << 40
COMMAND = "from shardline.cluster.cli import main; main()"
ENDED_S = 240.0


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shardline(store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "--store", str(store.root), *arguments],
        capture_output=True, text=True, check=False, timeout=ENDED_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@dataclass
class Traffic:
    """Searches and writes, as fast as they are answered, until the block ends."""

    endpoint: Endpoint
    errors: list[str] = field(default_factory=list)
    generations: set[int] = field(default_factory=set)
    partial: int = 0
    searches: int = 0
    written: dict[int, int] = field(default_factory=dict)  # item -> the seed of its vector
    deleted: set[int] = field(default_factory=set)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        done = threading.Event()
        threads = [
            threading.Thread(target=self._forever, args=(done, each))
            for each in (self._search, self._write)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def _forever(self, done: threading.Event, work: Any) -> None:
        with self.endpoint.address_for(Scope.WRITE).client() as client:
            number = 0
            while not done.is_set():
                number += 1
                try:
                    work(client, number)
                except ShardlineError as error:
                    self.errors.append(f"{work.__name__}: {error}")
                time.sleep(0.01)

    def _search(self, client: Client, number: int) -> None:
        answer = client.search(vectors=unit(1, number), k=20)
        self.searches += 1
        self.generations.add(answer.generation)
        self.partial += bool(answer.coverage.degraded)

    def _write(self, client: Client, number: int) -> None:
        item = number % 50 if number % 3 else NEW_ITEMS + number % 40
        if number % 7:
            client.upsert(item_ids=[item], vectors=unit(1, number))
            self.written[item] = number
            self.deleted.discard(item)
        else:
            client.delete([item])
            self.written.pop(item, None)
            self.deleted.add(item)


def indexes_of() -> list[int | None]:
    """The generation whose index each shard searches."""
    return [each["index_of"] for each in asked(controller().shard_reports.remote(), timeout_s=30)]


def assert_has_all(client: Client, traffic: Traffic) -> None:
    for item, seed in traffic.written.items():
        np.testing.assert_allclose(client.item(item).vector, unit(1, seed)[0], atol=1e-3)
    for item in traffic.deleted:
        with pytest.raises(ShardlineError, match="no such item"):
            client.item(item)


def test_each_shard_takes_the_index_over(private_ray: None, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    embeddings = write_set(store.embeddings / "m1", unit(ROWS, 0)).folder
    for kind in ("ivf", "ivf", "flat"):
        shards = SHARDS + 1 if kind == "flat" else SHARDS
        build_generation(store, embeddings, plan_of(shards, kind=kind))
    store.set_current(1)
    settings = [f"store={store.root}", "cluster.http_port=0", "router.cache_bytes=0"]
    with serving(load_config(None, settings)) as endpoint:
        traffic = Traffic(endpoint)
        with traffic():
            time.sleep(1.0)
            made = shardline(
                store, "--set", "index.kind=ivfpq-fs",
                "build", "--in-process", "--same-shards", "--from-live",
            )  # fmt: skip
            assert made.returncode == 0, made.stderr
            refused = shardline(
                store, "--set", "publish.min_overlap=1", "publish", "4",
                "--one-shard-at-a-time", "--json",
            )  # fmt: skip
            assert refused.returncode == 5, refused.stderr + refused.stdout
            assert indexes_of() == [None] * SHARDS, "a gate that fails changes nothing"

            done = shardline(store, "publish", "4", "--one-shard-at-a-time", "--json")
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout)
            assert report["stage"] == "live"
            assert report["one_at_a_time"]
            measured = {each["figure"] for each in report["figures"]}
            assert {"recall", "rows_ratio", "overlap"} <= measured
            assert "latency_ratio" not in measured
            assert indexes_of() == [4] * SHARDS
            time.sleep(0.5)

            # its rows have none of the writes, so all are applied to them
            began = asked(controller().publish.remote(options_of(2)), timeout_s=30)
            ray.kill(ray.get_actor(CONTROLLER_NAME), no_restart=False)
            assert ended(began["number"])["stage"] == "live", "its successor goes on"
            assert indexes_of() == [2] * SHARDS
            time.sleep(0.5)
        assert traffic.errors == []
        assert traffic.searches > 50
        assert traffic.partial == 0
        assert traffic.generations == {1}
        with endpoint.address_for(Scope.WRITE).client() as client:
            assert_has_all(client, traffic)

        other = shardline(store, "publish", "3", "--one-shard-at-a-time")
        assert other.returncode != 0
        assert "--same-shards" in other.stderr


def options_of(generation: int) -> PublishOptions:
    return PublishOptions(generation=generation, one_at_a_time=True, skip_gate="asked before")


def ended(number: int) -> dict[str, Any]:
    until = time.monotonic() + ENDED_S
    while True:
        try:
            found = asked(controller().publish_progress.remote(), timeout_s=30)
        except ShardlineError:
            found = None
        if found is not None and found["number"] == number and found["is_over"]:
            return dict(found)
        assert time.monotonic() < until, found
        time.sleep(0.2)
