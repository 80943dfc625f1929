"""Finding a launched cluster, and which of its routers is asked."""

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from shardline.cluster.cli import Settings
from shardline.cluster.commands import address as module
from shardline.cluster.commands.address import address_of
from shardline.cluster.config import load_config
from shardline.cluster.preflight.check import warned
from shardline.cluster.serving import examine, launched
from shardline.cluster.serving.examine import check_report
from shardline.cluster.serving.launched import (
    Launched,
    asked,
    by_host,
    controller,
    first_answering,
    launched_key,
    ordered_urls,
)
from shardline.cluster.serving.serving_keys import CLIENT_VARIABLE, make_key_file
from shardline.router.http.api_keys import read_keys
from shardline.shards.core.errors import DataError, Unavailable


def report_of(*heard: tuple[str, float], port: int = 8000, **changes: Any) -> dict[str, Any]:
    hosts = ("10.0.0.1", "10.0.0.2", "10.0.0.10")
    content: dict[str, Any] = {
        "cluster_id": "c" * 16,
        "generation": 1,
        "version": 5,
        "http_port": port,
        "replicas_wanted": 1,
        "writes": True,
        "hosts": [
            {
                "host": host,
                "node_id": f"node-{host}",
                "alive": True,
                "replicas": [],
                "router": host in dict(heard),
            }
            for host in hosts
        ],
        "shards": [],
        "replicas": [],
        "routers": [
            {
                "host": host,
                "node_id": f"node-{host}",
                "pid": 1,
                "url": f"http://{host}:{port}",
                "heard_s": heard_s,
            }
            for host, heard_s in heard
        ],
        "notes": [],
        "restart": None,
    }
    return content | changes


def test_this_hosts_router_is_asked_first_then_those_heard_of_last() -> None:
    report = report_of(("10.0.0.1", 4.0), ("10.0.0.10", 1.0), ("10.0.0.2", 2.0))
    here = ordered_urls(report, "node-10.0.0.2")
    assert here == ["http://127.0.0.1:8000", "http://10.0.0.10:8000", "http://10.0.0.1:8000"]
    elsewhere = ordered_urls(report, "node-of-nobody")
    assert elsewhere == [
        "http://10.0.0.10:8000",
        "http://10.0.0.2:8000",
        "http://10.0.0.1:8000",
    ]


def test_urls_are_shown_in_the_order_of_the_hosts() -> None:
    report = report_of(("10.0.0.10", 1.0), ("10.0.0.2", 2.0))
    shown = Launched(report=report, node_id="node-10.0.0.10").shown
    assert list(shown) == ["http://127.0.0.1:8000", "http://10.0.0.2:8000"]
    assert by_host(shown.values()) == ("http://10.0.0.2:8000", "http://10.0.0.10:8000")


def test_a_url_that_all_hosts_share_is_shown_once() -> None:
    report = report_of(("10.0.0.1", 1.0), ("10.0.0.2", 2.0))
    for router in report["routers"]:
        router["url"] = "http://127.0.0.1:8000"
    shown = Launched(report=report, node_id="node-10.0.0.2").shown
    assert shown == {"http://127.0.0.1:8000": "http://127.0.0.1:8000"}


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_first_router_that_can_be_connected_to_is_taken(listening: int) -> None:
    good = f"http://127.0.0.1:{listening}"
    assert first_answering(["http://127.0.0.1:1", good, "http://127.0.0.1:2"]) == good


def test_routers_that_cannot_be_connected_to_are_named() -> None:
    with pytest.raises(Unavailable, match=r"none of the cluster's routers.*127.0.0.1:1"):
        first_answering(["http://127.0.0.1:1"])
    with pytest.raises(Unavailable, match=r"no router of the cluster has been heard of"):
        first_answering([])


def test_a_ray_without_a_controller_is_said_to_serve_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get_actor(name: str, namespace: str) -> None:
        raise ValueError("Failed to look up actor")

    monkeypatch.setattr(launched.ray, "get_actor", get_actor)
    with pytest.raises(Unavailable, match=r"no cluster of Shardline's .*`shardline serve`"):
        controller()
    assert not launched.is_served()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GetTimeoutError("Get timed out"), "does not answer; expected within 3 s; .*--url"),
        (RayActorError(error_msg="it died"), "does not answer; got it died"),
        (RayTaskError("report", "Traceback\nKeyError: 5", KeyError(5)), "failed at it; got .*: 5"),
    ],
)
def test_a_controller_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def get(reference: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr(launched.ray, "get", get)
    with pytest.raises(Unavailable, match=said):
        asked("reference", timeout_s=3)


def test_what_the_controller_raises_itself_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get(reference: object, timeout: float) -> None:
        cause = DataError("no space left", hint="make room")
        raise RayTaskError("restart_rolling", "Traceback", cause)

    monkeypatch.setattr(launched.ray, "get", get)
    with pytest.raises(DataError, match="no space left; make room"):
        asked("reference", timeout_s=3)


def test_the_key_of_a_launched_cluster_is_in_the_shared_store(tmp_path: Path) -> None:
    config = load_config(None, [f"store={tmp_path}"])
    assert launched_key(config) is None, "keys of the environment, or none asked for"
    make_key_file(tmp_path / "keys")
    assert launched_key(config) == read_keys(tmp_path / "keys")[0].secret
    insecure = load_config(None, [f"store={tmp_path}", "cluster.insecure=true"])
    assert launched_key(insecure) is None


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv(CLIENT_VARIABLE, raising=False)
    make_key_file(tmp_path / "keys")
    return Settings(overrides=(f"store={tmp_path}", "cluster.address=auto"))


def test_commands_find_a_launched_cluster_through_ray(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, listening: int, tmp_path: Path
) -> None:
    found = Launched(report=report_of(("10.0.0.2", 0.1), port=listening), node_id="node-10.0.0.2")
    asked_for: list[str] = []

    def find(address: str, *, verbose: bool) -> Launched:
        asked_for.append(address)
        return found

    monkeypatch.setattr(launched, "find_launched", find)
    address = address_of(settings, None, None)
    assert address.url == f"http://127.0.0.1:{listening}"
    assert address.key == read_keys(tmp_path / "keys")[0].secret
    assert asked_for == ["auto"]
    address_of(settings, None, None, found)
    assert asked_for == ["auto"], "what was found already is not asked for again"


def test_a_url_needs_no_ray_and_gets_no_key_of_the_store(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "launched_of", lambda *_: pytest.fail("Ray asked"))
    address = address_of(settings, "http://10.0.0.3:1", None)
    assert (address.url, address.key) == ("http://10.0.0.3:1", None)


def replica(shard: int, number: int, *, answers: bool, why: str | None = None) -> dict[str, Any]:
    reason = None if why is None else {"code": "unavailable", "text": why}
    return {"shard": shard, "replica": number, "answers": answers, "reason": reason, "lag": None}


def led_by(*primaries: int | None) -> list[dict[str, Any]]:
    """The shards, each with its primary."""
    return [{"shard": shard, "primary": primary} for shard, primary in enumerate(primaries)]


def test_doctor_judges_what_the_controller_reports() -> None:
    everywhere = report_of(
        ("10.0.0.1", 0.1), ("10.0.0.2", 0.1), ("10.0.0.10", 0.1),
        replicas=[replica(0, 0, answers=True), replica(1, 0, answers=True)],
        shards=led_by(0, 0),
    )  # fmt: skip
    assert [str(each) for each in check_report(everywhere)] == [
        "ok    replicas: 2 shards, 2 of 2 answer",
        "ok    writes: 2 of 2 shards take them",
        "ok    routers: 3, one on every host",
        "ok    served index: recall of served queries is not known yet",
    ]


def test_doctor_names_what_is_missing() -> None:
    report = report_of(
        ("10.0.0.1", 0.1),
        replicas_wanted=2,
        replicas=[
            replica(0, 0, answers=True),
            replica(1, 0, answers=False, why="no such file"),
            replica(1, 1, answers=False),
        ],
        shards=led_by(0, None),
        notes=[{"code": "unavailable", "text": "a host is gone"}],
    )
    texts = [str(each) for each in check_report(report)]
    assert texts[0].startswith(
        "FAIL  replicas: shards [1] do not answer; got shard 1: no such file"
    )
    assert texts[1:] == [
        "warn  writes: 1 of 2 shards take them; not shards [1]",
        "warn  routers: 1; none on 10.0.0.2, 10.0.0.10",
        "warn  controller: unavailable: a host is gone",
        "ok    served index: recall of served queries is not known yet",
    ]
    report["replicas"][1]["answers"] = True
    assert str(check_report(report)[0]).startswith("warn  replicas: 2 shards, 2 of 4 answer")
    report["routers"] = []
    assert str(check_report(report)[2]).startswith("FAIL  routers: no router has been heard of")


def test_doctor_tells_that_a_replica_lags_and_that_no_writes_are_taken() -> None:
    report = report_of(replicas=[replica(0, 0, answers=True)], shards=led_by(0))
    report["replicas"][0]["lag"] = 1200
    assert str(check_report(report)[1]) == (
        "ok    writes: 1 of 1 shards take them; a replica is 1,200 writes behind its primary"
    )
    report["writes"] = False
    assert str(check_report(report)[1]) == "ok    writes: none are taken: cluster.writes is false"


def test_what_was_found_is_told_though_the_controller_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask_controller() -> None:
        raise Unavailable("the controller does not answer")

    monkeypatch.setattr(examine, "attached_ray", lambda *_, **__: nullcontext("10.0.0.1:6379"))
    monkeypatch.setattr(examine, "living_hosts", lambda: ())
    monkeypatch.setattr(examine, "is_served", lambda: True)
    monkeypatch.setattr(examine, "serve_runs", lambda: True)
    monkeypatch.setattr(examine, "survey", lambda *_, **__: [warned("clock", "1.0 h ahead")])
    monkeypatch.setattr(examine, "ask_controller", ask_controller)
    assert [each.name for each in examine.examine(load_config(None), 1)] == [
        *("Ray", "clock", "cluster")
    ]


def test_joining_and_asking_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(("10.0.0.1", 1.0))
    handle = SimpleNamespace(report=SimpleNamespace(remote=lambda: "reference"))
    context = SimpleNamespace(get_node_id=lambda: "node-10.0.0.1")
    monkeypatch.setattr(launched, "attached_ray", lambda *_, **__: nullcontext())
    monkeypatch.setattr(launched.ray, "get_actor", lambda *_, **__: handle)
    monkeypatch.setattr(launched.ray, "get", lambda *_, **__: report)
    monkeypatch.setattr(launched.ray, "get_runtime_context", lambda: context)
    assert launched.find_launched("auto").urls == ["http://127.0.0.1:8000"]
