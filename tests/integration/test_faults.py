"""Processes are killed while queries run: answers go on, say what they miss, and become whole."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from shardline.bench.load.processes import router_process
from shardline.cluster.control.actor_name import CONTROLLER_NAME
from shardline.cluster.control.publish_state import PublishOptions
from shardline.cluster.control.watch import WATCH_INTERVAL_S
from shardline.cluster.serving.deployment import serving, shard_reports
from shardline.cluster.serving.endpoint import Address
from shardline.cluster.serving.launched import asked, controller
from shardline.cluster.store import Store
from shardline.router.client.answers import SearchAnswer
from shardline.router.client.seq import Seq
from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Scope
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.storage.generation import read_generation, write_generation
from tests.integration.conftest import Cluster

RECOVERY_S = 60.0
PUBLISHED_ITEMS = 2_000_000  # ids that no other test writes
STALL_ASKERS = 3
STALL_BATCH = 512  # queries a request, 256 KiB: what would pile up if it were kept for the shard
STALL_ANSWERS = 512  # without the shard, 128 MiB of queries
FLAT_MIB = 40  # what the allocator keeps for itself was 19 at most
ROUTER = RouterConfig()  # as the cluster's: its defaults
LATE_AFTER_S = ROUTER.late_after_ms / 1e3
DEADLINE_S = ROUTER.default_timeout_ms / 1e3


@dataclass
class Questions:
    """Asks without pause in a thread; keeps every answer and every error with its time."""

    address: Address
    batch: int = 1
    seed: int = 3
    answers: list[tuple[float, SearchAnswer]] = field(default_factory=list)
    errors: list[tuple[float, ShardlineError]] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Questions":
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        rng = np.random.default_rng(self.seed)
        shape = (self.batch, 128)
        with self.address.client() as client:
            while not self._done.is_set():
                query = rng.standard_normal(shape, dtype=np.float32)  # never one from the cache
                try:
                    answer = client.search(vectors=query, k=20, timeout_ms=DEADLINE_S * 1e3)
                except ShardlineError as error:
                    self.errors.append((time.perf_counter(), error))
                else:
                    self.answers.append((time.perf_counter(), answer))

    def wait_for(self, wanted: Callable[[SearchAnswer], bool], since: float) -> float:
        """The time of the first answer after ``since`` that is as wanted."""
        deadline = time.perf_counter() + RECOVERY_S
        seen = 0
        while time.perf_counter() < deadline:
            while seen < len(self.answers):
                at, answer = self.answers[seen]
                seen += 1
                if at > since and wanted(answer):
                    return at
            self._done.wait(0.01)
        raise AssertionError(f"not seen within {RECOVERY_S} s")

    def answered_since(self, moment: float) -> int:
        """How many answers came after ``moment``."""
        return sum(at > moment for at, _ in self.answers)


def is_partial(answer: SearchAnswer) -> bool:
    return answer.coverage.share < 1


def is_full(answer: SearchAnswer) -> bool:
    return answer.coverage.share == 1


def test_a_killed_shard_costs_its_rows_and_comes_back(cluster: Cluster) -> None:
    victim = shard_reports()[1]
    with Questions(cluster.endpoint.address) as questions:
        started = questions.wait_for(is_full, since=0)
        os.kill(victim["pid"], signal.SIGKILL)
        killed = time.perf_counter()
        partial = questions.wait_for(is_partial, since=killed)
        whole = questions.wait_for(is_full, since=partial)
        # and stays whole over the controller's next checks
        settled = questions.wait_for(is_full, since=whole + 3 * WATCH_INTERVAL_S)
    assert questions.errors == [], "no query may fail while a shard is away"
    again = {
        reason
        for at, answer in questions.answers
        if whole < at < settled
        for reason in answer.coverage.degraded
    }
    assert not again, again
    missing = [answer for at, answer in questions.answers if is_partial(answer)]
    for answer in missing:
        assert answer.coverage.rows_answered == answer.coverage.rows_asked - victim["rows"]
        assert answer.coverage.shards_answered == 2
        assert any("shard 1" in str(missing) for missing in answer.coverage.degraded)
    print(
        f"killed after {killed - started:.2f} s, partial after {(partial - killed) * 1e3:.0f} ms, "
        f"whole again after {whole - killed:.2f} s, {len(missing)} partial answers"
    )
    revived = shard_reports()[1]
    assert revived["pid"] != victim["pid"]
    assert revived["epoch"] > victim["epoch"]


def test_a_stalled_shard_costs_its_rows_alone_and_memory_stays_flat(cluster: Cluster) -> None:
    victim = shard_reports()[1]
    stalled = psutil.Process(victim["pid"])
    watched = [router_process(os.getpid()), *(psutil.Process(r["pid"]) for r in shard_reports())]
    with ExitStack() as stack:
        askers = [
            stack.enter_context(Questions(cluster.endpoint.address, batch=STALL_BATCH, seed=seed))
            for seed in range(STALL_ASKERS)
        ]
        for asker in askers:
            asker.wait_for(is_full, since=time.perf_counter() + 1)  # buffers have their size by now
        memory: list[tuple[float, list[int]]] = []
        stalled.send_signal(signal.SIGSTOP)
        # one deadline is waited out, at most three until it counts as silent; then nobody waits
        silent_from = time.perf_counter() + (LATE_AFTER_S + 2 * DEADLINE_S)
        try:
            while sum(asker.answered_since(silent_from) for asker in askers) < STALL_ANSWERS:
                at = askers[0].wait_for(is_partial, since=time.perf_counter())
                memory.append((at, [process.memory_info().rss >> 20 for process in watched]))
        finally:
            stalled.send_signal(signal.SIGCONT)
        ended = time.perf_counter()
        for asker in askers:
            settled = asker.wait_for(is_full, since=ended)
            asker.wait_for(is_full, since=settled + WATCH_INTERVAL_S)
    assert [asker.errors for asker in askers] == [[]] * len(askers), "no query may fail"
    answers = sorted(
        ((at, answer) for asker in askers for at, answer in asker.answers), key=lambda each: each[0]
    )
    for _, answer in answers:
        if is_partial(answer):
            assert answer.coverage.rows_answered == answer.coverage.rows_asked - victim["rows"]
            assert [str(missing)[:8] for missing in answer.coverage.degraded] == ["shard 1:"]
    without = [answer for at, answer in answers if silent_from < at < ended]
    assert len(without) >= STALL_ANSWERS
    assert all(is_partial(answer) for answer in without)
    assert np.median([answer.took_ms for answer in without]) < DEADLINE_S * 1e3 / 2
    held = np.array([used for at, used in memory if at > silent_from])
    grown = held.max(axis=0) - held[0]
    print(
        f"{len(without)} answers without the shard to {len(without) * STALL_BATCH >> 11} MiB of "
        f"queries; MiB of router and shards {memory[0][1]}, then {held[0]}, grown by {grown}"
    )
    assert grown.max() <= FLAT_MIB


def test_a_router_that_serve_has_stopped_but_not_ended_is_replaced(cluster: Cluster) -> None:
    """As Serve leaves one behind while Ray's head is away."""
    names = [
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["namespace"] == "serve" and "#router#" in each["name"]
    ]
    before = router_process(os.getpid())
    assert len(names) == 1
    ray.get(ray.get_actor(names[0], namespace="serve").perform_graceful_shutdown.remote())
    psutil.wait_procs([before], timeout=RECOVERY_S)
    assert not before.is_running()
    with Questions(cluster.endpoint.address) as questions:
        questions.wait_for(is_full, since=time.perf_counter())
    assert router_process(os.getpid()).pid != before.pid


def test_queries_go_on_while_the_controller_is_away(cluster: Cluster) -> None:
    before = {report["shard"]: report for report in shard_reports()}
    with Questions(cluster.endpoint.address) as questions:
        questions.wait_for(is_full, since=0)
        ray.kill(ray.get_actor(CONTROLLER_NAME), no_restart=False)
        killed = time.perf_counter()
        after = wait_for_new_epochs({s: report["epoch"] for s, report in before.items()})
        questions.wait_for(is_full, since=time.perf_counter())
    assert questions.errors == []
    assert len([at for at, _ in questions.answers if at > killed]) > 10
    assert all(is_full(answer) for _, answer in questions.answers)
    for shard, report in after.items():
        assert report["pid"] == before[shard]["pid"], "shards were found, not started again"


def test_a_restarted_controller_serves_the_generation_that_is_live(cluster: Cluster) -> None:
    """There and back: no query fails or is partial, and numbers rise although generations fall."""
    store, first = cluster.store, cluster.endpoint.generation
    second = store.next_generation()
    copy_generation(store, first, second)
    versions = [status_of(cluster)["version"]]
    try:
        with Questions(cluster.endpoint.address) as questions:
            questions.wait_for(is_full, since=0)
            for number in (second, first):
                store.set_current(number)
                ray.kill(ray.get_actor(CONTROLLER_NAME), no_restart=False)
                questions.wait_for(
                    lambda answer, number=number: answer.generation == number,
                    since=time.perf_counter(),
                )
                versions.append(status_of(cluster)["version"])
    finally:
        store.set_current(first)
    assert questions.errors == []
    assert all(is_full(answer) for _, answer in questions.answers)
    assert versions == sorted(set(versions))
    assert {report["generation"] for report in shard_reports()} == {first}


def test_a_publish_and_a_rollback_cost_no_answer_and_no_write(cluster: Cluster) -> None:
    """Every answer is of one generation, none fails; what was acknowledged is in both."""
    store, first = cluster.store, cluster.endpoint.generation
    second = store.next_generation()
    copy_generation(store, first, second)
    told: list[dict[str, Any]] = []
    with cluster.endpoint.address_for(Scope.WRITE).client() as client:
        try:
            with Questions(cluster.endpoint.address) as questions, Writes(client) as writes:
                questions.wait_for(is_full, since=0)
                for number, begin in ((second, publish), (first, roll_back)):
                    writes.wait_for(20)
                    begin(number)
                    told.append(publish_ended())
                    questions.wait_for(
                        lambda answer, number=number: answer.generation == number,
                        since=time.perf_counter(),
                    )
                    writes.wait_for(20)
            assert_newest(client, writes)
            # without writes, and back: the other one has older ones, which must not come over
            with Writes(client, writes.acknowledged) as since:
                for begin in (lambda: publish(second, with_writes=False), lambda: roll_back(first)):
                    since.wait_for(20)
                    begin()
                    told.append(publish_ended())
                since.wait_for(20)
            assert_newest(client, since)
        finally:
            store.set_current(first)
            client.delete(list(range(PUBLISHED_ITEMS, PUBLISHED_ITEMS + 100)))
    assert [(each["stage"], each["reason"]) for each in told] == [("live", None)] * 4
    assert (questions.errors, writes.errors, writes.unseen) == ([], [], [])
    assert since.errors == []
    assert all(is_full(answer) for _, answer in questions.answers)
    seen = [answer.generation for _, answer in questions.answers]
    assert set(seen) == {first, second}
    assert (seen[0], seen[-1]) == (first, first)


@dataclass
class Writes:
    """Writes a hundred items over and over in a thread. acknowledged: the newest write of each.
    unseen: writes that a search which asked for them did not find, across a switch or not."""

    client: Client
    acknowledged: dict[int, int] = field(default_factory=dict)
    errors: list[ShardlineError] = field(default_factory=list)
    unseen: list[int] = field(default_factory=list)
    count: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Writes":
        self._thread = threading.Thread(target=self._write)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def wait_for(self, more: int) -> None:
        wanted, deadline = self.count + more, time.perf_counter() + RECOVERY_S
        while self.count < wanted:
            assert time.perf_counter() < deadline, "no write was taken"
            time.sleep(0.02)

    def _write(self) -> None:
        seq = Seq()  # of the write before, which may be of the generation before
        for number in range(1_000_000):
            if self._done.is_set():
                return
            item = PUBLISHED_ITEMS + number % 100
            try:
                written = self.client.upsert(item_ids=[item], vectors=vector_of(number)[None])
                if item - 1 in self.acknowledged:
                    before = vector_of(number - 1)[None]
                    found = self.client.search(vectors=before, k=1, min_seq=seq, min_coverage=1.0)
                    if found.ids.tolist() != [[item - 1]]:
                        self.unseen.append(number - 1)
                seq = written.seq
            except ShardlineError as error:
                self.errors.append(error)
                self.acknowledged.pop(item, None)  # it may have been written or not
            else:
                self.acknowledged[item] = number
                self.count += 1
            time.sleep(0.005)


def assert_newest(client: Client, writes: Writes) -> None:
    """Every item is as it was acknowledged last."""
    for item, number in writes.acknowledged.items():
        np.testing.assert_allclose(client.item(item).vector, vector_of(number), rtol=1e-5)


def vector_of(number: int) -> np.ndarray:
    vector = np.random.default_rng(number).standard_normal(128).astype(np.float32)
    return vector / np.linalg.norm(vector)


def publish(number: int, *, with_writes: bool = True) -> None:
    reason = "a busy machine"
    options = PublishOptions(generation=number, with_writes=with_writes, skip_gate=reason)
    asked(controller().publish.remote(options), timeout_s=10)


def roll_back(number: int) -> None:
    begun = asked(controller().roll_back.remote(), timeout_s=10)
    assert begun["generation"] == number


def publish_ended() -> dict[str, Any]:
    deadline = time.perf_counter() + RECOVERY_S
    while time.perf_counter() < deadline:
        found: dict[str, Any] = asked(controller().publish_progress.remote(), timeout_s=10)
        if found["is_over"]:
            return found
        time.sleep(0.2)
    raise AssertionError(f"the publish never ended: {found}")


def copy_generation(store: Store, number: int, copied: int) -> None:
    """The same rows as another generation."""
    folder = store.generation(copied)
    shutil.copytree(store.generation(number), folder)
    write_generation(folder, replace(read_generation(store.generation(number)), generation=copied))


def status_of(cluster: Cluster) -> dict[str, Any]:
    with cluster.endpoint.address.client() as client:
        return client.status()


def wait_for_new_epochs(old: dict[int, int]) -> dict[int, dict[str, int]]:
    """Shard reports once the restarted controller has given every shard a higher epoch."""
    deadline = time.perf_counter() + RECOVERY_S
    while time.perf_counter() < deadline:
        try:
            reports = {report["shard"]: report for report in shard_reports()}
        except (ShardlineError, ray.exceptions.RayError):
            continue
        if all(report.get("epoch", 0) > old[shard] for shard, report in reports.items()):
            return reports
    raise AssertionError("the controller did not find its shards again")


def test_a_second_cluster_in_the_same_ray_is_refused_and_harms_nothing(cluster: Cluster) -> None:
    with (
        pytest.raises(Unavailable, match="served already, generation 1 at"),
        serving(cluster.config),
    ):
        raise AssertionError("two clusters in one Ray")
    with cluster.endpoint.address.client() as client:
        assert client.search(item_ids=[1], k=3).coverage.share == 1
