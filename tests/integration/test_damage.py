"""Files are damaged under a running cluster and its processes start again: what it answers then."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from shardline.bench.load.processes import router_process
from shardline.cluster.control.actor_name import CONTROLLER_NAME
from shardline.cluster.serving.deployment import shard_reports
from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import EncoderUnavailable, NotFound, ShardlineError
from shardline.shards.storage.generation import INDEX_NAME, QUERY_ENCODER_FOLDER, shard_folder
from tests.integration.conftest import Cluster

RECOVERY_S = 60.0


@contextlib.contextmanager
def damaged(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """Another file in its place, because the running process may have mapped this one."""
    aside = path.with_name(f".{path.name}.whole")
    path.rename(aside)
    path.write_bytes(change(aside.read_bytes()))
    try:
        yield
    finally:
        aside.replace(path)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def wait_for(wanted: Callable[[], bool]) -> float:
    """Seconds until it holds; an error in between is not yet."""
    began = time.perf_counter()
    while time.perf_counter() - began < RECOVERY_S:
        with contextlib.suppress(ShardlineError, psutil.NoSuchProcess):
            if wanted():
                return time.perf_counter() - began
        time.sleep(0.05)
    raise AssertionError(f"not seen within {RECOVERY_S} s")


def is_whole(client: Client) -> bool:
    return all(shard["connected"] for shard in client.status()["shards"])


def features_of(client: Client) -> list[dict[str, Any]]:
    """One query of nulls and empty lists, which every feature takes."""
    empty = {"history": [], "multi_valued": [], "numeric": 0.0}
    features = client.status()["encoder"]["features"]
    return [{each["name"]: empty.get(each["kind"]) for each in features}]


def test_a_router_with_a_damaged_encoder_answers_all_but_features(
    cluster: Cluster, client: Client
) -> None:
    asked = features_of(client)
    assert client.search(features=asked, k=3).coverage.share == 1
    before = router_process(os.getpid())
    encoder = cluster.generation / QUERY_ENCODER_FOLDER / "encoder.json"
    with damaged(encoder, flipped):
        before.send_signal(signal.SIGKILL)

        def is_another() -> bool:
            with contextlib.suppress(NotFound):
                return router_process(os.getpid()).pid != before.pid and is_whole(client)
            return False

        restarted = wait_for(is_another)
        assert client.search(item_ids=[1], k=3).coverage.share == 1
        with pytest.raises(EncoderUnavailable, match=r"could not be loaded.*got corrupt_file"):
            client.search(features=asked, k=3)
        (warning,) = client.status()["warnings"]
        assert (warning["about"], warning["code"]) == ("query_encoder", "corrupt_file")
        assert f"{encoder}: wrong checksum" in warning["text"]
    mended = wait_for(lambda: client.search(features=asked, k=3).coverage.share == 1)
    assert client.status()["warnings"] == []
    print(f"answers again after {restarted:.1f} s, features {mended:.1f} s after the repair")


def test_status_says_why_a_shard_cannot_load_until_it_can(cluster: Cluster, client: Client) -> None:
    index = cluster.generation / shard_folder(1) / INDEX_NAME
    victim = shard_reports()[1]

    def reason() -> tuple[str, str]:
        replica = client.status()["shards"][1]["replicas"][0]
        return replica["code"], replica["reason"]

    with damaged(index, flipped):
        os.kill(victim["pid"], signal.SIGKILL)
        told = wait_for(lambda: reason()[0] == "corrupt_file")
        assert f"{index}: wrong checksum" in reason()[1]
        seen = set()
        until = time.perf_counter() + 3  # two more attempts to load it
        while time.perf_counter() < until:
            seen.add(reason())
        assert {code for code, _ in seen} == {"corrupt_file"}
        answer = client.search(item_ids=[1], k=7)  # none that is in the cache
        assert answer.coverage.shards_answered == 2
    whole = wait_for(lambda: is_whole(client))
    print(f"the reason is told after {told:.1f} s; whole {whole:.1f} s after the repair")


def test_a_controller_waits_for_current_and_needs_no_counter(
    cluster: Cluster, client: Client
) -> None:
    version, epochs = client.status()["version"], [each["epoch"] for each in shard_reports()]
    (cluster.store.root / "counter.json").write_bytes(b'{"counter": 1z')
    with damaged(cluster.store.root / "CURRENT", lambda _: b"\x00"):
        ray.kill(ray.get_actor(CONTROLLER_NAME), no_restart=False)
        until = time.perf_counter() + 3  # longer than Ray takes to start it again
        while time.perf_counter() < until:
            assert client.search(item_ids=[2], k=5).coverage.share == 1
    took = wait_for(lambda: client.status()["version"] > version and is_whole(client))
    # routers ask for what troubles the controller apart from its table
    wait_for(lambda: client.status()["warnings"] != [])
    (warning,) = client.status()["warnings"]
    assert (warning["about"], warning["code"]) == ("state", "corrupt_file")
    assert all(
        report["epoch"] > before for report, before in zip(shard_reports(), epochs, strict=True)
    )
    assert cluster.store.counter() >= client.status()["version"]
    assert cluster.store.damaged_state() == []
    print(f"a table above the lost one after {took:.1f} s")
