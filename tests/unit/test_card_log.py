"""A card that fails: what is known of it after a restart, and where the shard is served then."""

import dataclasses
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shardline.shards.core.errors import CardFailed, ConfigError, NotFound, Unavailable
from shardline.shards.core.messages import (
    NO_PARAMS,
    ReplicaKey,
    SearchRequest,
)
from shardline.shards.index import gpu
from shardline.shards.index.spec import Device
from shardline.shards.live.live_config import LiveConfig
from shardline.shards.process import shard_actor
from shardline.shards.process.card_log import (
    FAILURES,
    WINDOW_S,
    CardLog,
    card_log_path,
    device_for,
    noting_refusals,
)
from shardline.shards.server.shard import Shard
from tests.engine import build_generation
from tests.fake_gpu_faiss import Card, ProcessAborted
from tests.gpu_machine import machine
from tests.manual_clock import ManualClock

KEY = ReplicaKey(7, 1, 0)
VECTORS = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test watches with is gone after it."""
    monkeypatch.setattr(gpu, "_watch", gpu._watch)


def test_a_search_that_ended_the_process_is_known_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    program = (
        "import os, pathlib, sys\n"
        "from shardline.shards.process.card_log import CardLog\n"
        "with CardLog(pathlib.Path(sys.argv[1])).using():\n"
        "    os.abort()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=60)
    assert ended.returncode < 0
    assert CardLog(path).failures == 1
    assert CardLog(path).failures == 1  # counted once


def test_searches_that_end_are_no_failures(tmp_path: Path) -> None:
    log = CardLog(tmp_path / "log")
    with log.using():
        with log.using():
            pass
        assert CardLog(tmp_path / "log").failures == 1  # as of a process that ends here
    log.close()


def test_an_error_is_counted_once_and_the_process_may_go_on(tmp_path: Path) -> None:
    log = CardLog(tmp_path / "log")
    with pytest.raises(RuntimeError), log.using():
        raise RuntimeError("out of memory")
    with pytest.raises(ConfigError), noting_refusals(log), log.using():
        raise ConfigError("does not fit", field="index.device")
    with pytest.raises(ConfigError), log.using():  # of a compaction: the old index serves on
        raise ConfigError("does not fit", field="index.device")
    assert log.failures == 2
    log.close()
    assert CardLog(tmp_path / "log").failures == 2


def test_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    log = CardLog(tmp_path / "log")
    with log.using(), log.using():
        pass
    log.close()
    assert CardLog(tmp_path / "log").failures == 0


def test_failures_are_forgotten(tmp_path: Path) -> None:
    clock = ManualClock(1e9)
    log = CardLog(tmp_path / "log", clock.time)
    for _ in range(FAILURES + 2):
        log.note_failure()
        clock.hold_up(1)
    assert log.failures == FAILURES  # more are not kept
    clock.hold_up(WINDOW_S - FAILURES + 1)
    assert log.failures == FAILURES - 1
    clock.hold_up(WINDOW_S)
    assert log.failures == 0


@pytest.mark.parametrize(
    ("wanted", "failures", "allowed", "device"),
    [
        (Device.CUDA, FAILURES, True, Device.CPU),
        (Device.CUDA, FAILURES - 1, True, Device.CUDA),
        (Device.CUDA, FAILURES, False, Device.CUDA),
        (Device.CPU, FAILURES, True, Device.CPU),
    ],
)
def test_the_cpu_serves_after_repeated_failures_where_that_is_allowed(
    wanted: Device, failures: int, allowed: bool, device: Device
) -> None:
    found, note = device_for(wanted, failures, cpu_allowed=allowed)
    assert found is device
    assert (note is not None) == (found is not wanted)
    if note is not None:
        assert "served from the CPU: its card has failed 3 times within 10 minutes" in note


def test_a_card_that_has_gone_counts(tmp_path: Path) -> None:
    log = CardLog(tmp_path / "log")
    with pytest.raises(ConfigError), noting_refusals(log):
        raise ConfigError("there is no card", field="index.device")
    with pytest.raises(NotFound), noting_refusals(log):
        raise NotFound("no such shard")
    assert log.failures == 1


def test_a_file_of_another_size_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\1" * 1000)
    assert CardLog(tmp_path / "log").failures == 0


def test_the_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = card_log_path(tmp_path / "a", KEY)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path != card_log_path(tmp_path / "b", KEY)
    path.parent.rmdir()
    path.parent.symlink_to(tmp_path)
    with pytest.raises(Unavailable, match="another user's"):
        card_log_path(tmp_path / "a", KEY)
    path.parent.unlink()
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="not known"):
        CardLog(tmp_path / "log")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "shardline-cards-12345").mkdir()
    with pytest.raises(Unavailable, match="another user's"):
        card_log_path(tmp_path / "a", KEY)


def test_a_shard_of_a_failed_card_tells_its_process(tmp_path: Path) -> None:
    build_generation(tmp_path / "g", VECTORS, np.arange(50), 1, kind="flat")
    request = SearchRequest(queries=VECTORS[:2], k=3, params=NO_PARAMS, timeout_ms=1000)
    told: list[CardFailed] = []
    with machine(Card()) as card:
        log = CardLog(tmp_path / "log")
        gpu.watch(log)
        shard = Shard.load(tmp_path / "g", 0, device=Device.CUDA)
        shard.on_card_failure = told.append
        assert shard.search(request).ranked.ids[:, 0].tolist() == [0, 1]
        assert not told
        card.raise_in_search = RuntimeError("out of memory")
        with pytest.raises(CardFailed, match="failed in a search"):
            shard.search(request)
        assert [error.code for error in told] == ["card_failed"]
        log.close()
        assert CardLog(tmp_path / "log").failures == 1


def test_a_restarted_shard_goes_to_the_cpu_and_back(tmp_path: Path) -> None:
    """What the actor does at each start, with three processes that end within a search."""
    build_generation(tmp_path / "g", VECTORS, np.arange(50), 1, kind="flat")
    clock = ManualClock(1e9)
    served = []
    with machine(Card()):
        for _ in range(FAILURES):
            log = CardLog(tmp_path / "log", clock.time)
            served.append(device_for(Device.CUDA, log.failures, cpu_allowed=True)[0])
            with pytest.raises(ProcessAborted), log.using():
                raise ProcessAborted
            log.close()
        log = CardLog(tmp_path / "log", clock.time)
        device, note = device_for(Device.CUDA, log.failures, cpu_allowed=True)
        shard = Shard.load(tmp_path / "g", 0, device=device)
    assert served == [Device.CUDA] * FAILURES
    assert shard.describe()["device"] == "cpu"
    assert note is not None
    clock.hold_up(WINDOW_S + 1)
    assert device_for(Device.CUDA, log.failures, cpu_allowed=True)[0] is Device.CUDA


def test_an_actor_whose_card_has_failed_serves_from_the_cpu_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_generation(tmp_path / "g", VECTORS, np.arange(50), 1, kind="flat")
    index = made.index.model_copy(update={"device": Device.CUDA})
    on_card = dataclasses.replace(made, index=index)
    monkeypatch.setattr(shard_actor, "read_generation", lambda folder: on_card)
    monkeypatch.setattr(shard_actor, "RayExporter", lambda *_: SimpleNamespace(stop=lambda: None))
    monkeypatch.setattr(shard_actor, "prepare_memory", lambda **_: None)
    monkeypatch.setattr(shard_actor.ShardActor, "_register", lambda self: 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    key = ReplicaKey(made.generation, 0, 0)

    def served(*cards: Card, allowed: bool = True) -> tuple[str, str | None, str]:
        with machine(*cards):
            actor = shard_actor.ShardActor(
                folder=str(tmp_path / "g"),
                key=key,
                controller="c",
                secret=b"0" * 32,
                host="127.0.0.1",
                threads=1,
                huge_pages=False,
                live=LiveConfig(),
                cpu_when_gpu_fails=allowed,
            )
        health = actor.ping().health
        actor.stop()
        assert health is not None
        return actor.describe()["device"], health.device_note, os.environ["CUDA_VISIBLE_DEVICES"]

    assert served(Card()) == ("cuda", None, "0")
    for _ in range(FAILURES):
        with pytest.raises(ConfigError, match="there is no card"):
            served()
    with pytest.raises(ConfigError, match="there is no card"):
        served(allowed=False)
    device, note, visible = served()
    assert (device, visible) == ("cpu", "")
    assert note is not None
    assert "served from the CPU" in note
