"""Which network interface the ranks of a host use; joining ranks of two hosts is tests/hosts."""

import os
import socket

import psutil
import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from shardline.shards.core.errors import ConfigError, Unavailable
from shardline.training.loop import process_group, ray_ranks
from shardline.training.loop.launch import _check_cpus
from shardline.training.loop.process_group import (
    GLOO,
    NCCL,
    HostTorchConfig,
    choose_interface,
    interface_of,
    interface_variables,
)
from shardline.training.loop.ray_ranks import _cause, build_ranks, check_shared
from tests.tiny import declared_run, tiny_config, tiny_dataset

ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth1": ["10.0.0.7", "fe80::7", "fd00::7"],
}


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.0.0.7", "eth1"), ("fd00::7", "eth1"), ("127.0.0.1", "lo"), ("172.17.0.1", "docker0")],
)
def test_the_interface_is_the_one_that_carries_the_address(address: str, expected: str) -> None:
    assert interface_of(address, ADDRESSES) == expected


def test_an_address_of_no_interface_is_refused_with_what_there_is() -> None:
    wanted = r"expected 203\.0\.113\.9; got lo 127\.0\.0\.1, ::1; docker0 172\.17\.0\.1; eth1 10\."
    with pytest.raises(Unavailable, match=wanted):
        interface_of("203.0.113.9", ADDRESSES)
    with pytest.raises(Unavailable, match="got no interface with an address"):
        interface_of("203.0.113.9", {})


def test_nccl_takes_the_name_as_a_whole_and_what_the_operator_has_set_stays() -> None:
    assert interface_variables("eth1", {}) == {GLOO: "eth1", NCCL: "=eth1"}
    assert interface_variables("eth1", {GLOO: "ib0"}) == {NCCL: "=eth1"}


@pytest.mark.parametrize("address", ["127.0.0.1", "fe80::7"])
def test_a_rank_finds_the_interface_of_its_host(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (GLOO, NCCL):
        monkeypatch.setenv(name, "before")  # which monkeypatch puts back
        monkeypatch.delenv(name)
    found = psutil.net_if_addrs()
    zoned = found["lo"][0]._replace(family=socket.AF_INET6, address="fe80::7%eth1")
    found["eth1"] = [zoned]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    choose_interface()
    name = "lo" if address == "127.0.0.1" else "eth1"
    assert (os.environ[GLOO], os.environ[NCCL]) == (name, f"={name}")


def test_an_interface_that_the_operator_has_named_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(GLOO, "ib0")
    monkeypatch.setenv(NCCL, "ib0")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")
    choose_interface()
    assert (os.environ[GLOO], os.environ[NCCL]) == ("ib0", "ib0")


def test_every_rank_has_chosen_before_the_group_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train starts the group in ``on_start`` of the backend."""
    calls: list[object] = []

    class Ranks:
        def execute(self, work: object) -> None:
            calls.append(work)

    def start(self: object, worker_group: Ranks, backend_config: object) -> None:
        calls.append("group")

    monkeypatch.setattr(process_group._TorchBackend, "on_start", start)
    config = HostTorchConfig()
    config.backend_cls().on_start(Ranks(), config)
    assert calls == [choose_interface, "group"]


@pytest.mark.parametrize(("placement", "strategy"), [("spread", "SPREAD"), ("pack", "PACK")])
def test_ranks_are_placed_as_configured(
    placement: str, strategy: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict = {}

    def trainer(entry: object, **settings: object) -> None:
        made.update(settings)

    monkeypatch.setattr(ray_ranks, "TorchTrainer", trainer)
    config = tiny_config(num_workers=2, placement=placement, max_failures=3)
    build_ranks(print, config, False, tmp_path)
    assert made["scaling_config"].placement_strategy == strategy
    assert made["scaling_config"].num_workers == 2
    assert isinstance(made["torch_config"], HostTorchConfig)
    failures = made["run_config"].failure_config
    assert (failures.max_failures, failures.controller_failure_limit) == (3, 3)


def test_placement_may_change_when_a_run_is_resumed() -> None:
    assert tiny_config(placement="pack").identity() == tiny_config().identity()


def test_a_host_without_the_run_folder_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    with pytest.raises(Unavailable, match=r"host 10\.0\.0\.7 does not share .*no such run there"):
        check_shared(tmp_path)
    run = declared_run(tmp_path / "run", tiny_config(), tiny_dataset(tmp_path / "data"))
    check_shared(run)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(Unavailable, match=r"host 10\.0\.0\.7 .*got a folder that cannot be writ"):
        check_shared(run)


def test_too_few_cpus_are_refused_with_the_figures() -> None:
    _check_cpus(4, 4)
    with pytest.raises(Unavailable, match=r"num_workers: .*; expected 5, one per worker; got 4;"):
        _check_cpus(5, 4)


def test_an_error_before_the_ranks_have_started_comes_back_as_itself() -> None:
    ours = ConfigError("no such interface", field="host")
    task = ray.exceptions.RayTaskError("choose_interface", "Traceback ...", ours)
    assert _cause(ControllerError(task)) is ours
    assert _cause(ControllerError(task.as_instanceof_cause())) is ours
    other = _cause(ControllerError(RuntimeError("first line\nno room")))
    assert str(other).startswith("training failed; got no room; --resume goes on")


def test_ranks_that_find_no_room_are_told_what_they_need() -> None:
    error = _cause(ControllerError(WorkerGroupStartupTimeoutError(6)))
    assert "no room for the ranks; expected 6 CPUs, or GPUs, that nothing else" in str(error)


def test_a_rank_that_died_says_more_than_those_that_lost_it() -> None:
    died = ActorDiedError()
    lost = RuntimeError("connection reset by peer")
    error = _cause(WorkerGroupError("ranks failed", {0: lost, 1: died}))
    assert "connection reset" not in str(error)
