"""A start that fails ends what it has started, and nothing that was there before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardline.cluster.config import load_config
from shardline.cluster.preflight.check import failed, warned
from shardline.cluster.serving import deployment as module
from shardline.cluster.serving.await_routers import Ready
from shardline.cluster.serving.deployment import start_serving
from shardline.cluster.serving.front_end import router_application, routers_wanted
from shardline.router.http.auth import INSECURE
from shardline.shards.core.errors import Unavailable

LAUNCHED = ("cluster.address=auto", "cluster.http_host=0.0.0.0", "cluster.insecure=true")


class World:
    """Every part that a start reaches; each notes that it was reached, and may raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.raises: dict[str, BaseException] = {}
        self.has_serve = self.has_cluster = False
        self.checks: list[Any] = []
        launched = SimpleNamespace(host_urls=["http://10.0.0.1:8000", "http://10.0.0.2:8000"])
        parts = {
            "servable_generation": lambda *_: 1,
            "before_start": lambda *_: [],
            "serve_runs": lambda: self.has_serve,
            "is_served": lambda: self.has_cluster,
            "check_serve": self.part("check_serve"),
            "survey": lambda *_, **__: self.checks,
            "start_controller": self.part("controller"),
            "wait_loaded": self.part("shards", 1),
            "living_hosts": lambda: (1, 2),
            "start_front_end": self.part("front end"),
            "_wait_connected": self.part("routers", Ready(statuses={"u": {"warnings": []}})),
            "ask_controller": lambda: launched,
            "stop_serving": lambda keep_serve: self.done.append(f"stop, {keep_serve=}"),
            "stop_launched": lambda: self.done.append("stop, Serve too"),
        }
        for name, part in parts.items():
            monkeypatch.setattr(module, name, part)

    def part(self, name: str, result: Any = None) -> Any:
        def reached(*_: object, **__: object) -> Any:
            self.done.append(name)
            if name in self.raises:
                raise self.raises[name]
            return result

        return reached


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def start(tmp_path: Path, said: list[str] | None = None) -> module.Started:
    config = load_config(None, [f"store={tmp_path}", *LAUNCHED])
    return start_serving(config, on_stage=([] if said is None else said).append)


def test_the_urls_of_all_hosts_are_returned(world: World, tmp_path: Path) -> None:
    world.checks = [warned("clock", "host 10.0.0.2: 1.0 h ahead")]
    said: list[str] = []
    started = start(tmp_path, said)
    assert started.urls == ("http://10.0.0.1:8000", "http://10.0.0.2:8000")
    assert world.done == ["controller", "shards", "front end", "routers"]
    assert "warning: host 10.0.0.2: 1.0 h ahead" in said


def test_a_cluster_that_runs_is_left_alone(world: World, tmp_path: Path) -> None:
    world.has_cluster = world.has_serve = True
    with pytest.raises(Unavailable, match=r"served on this Ray already.*`shardline down` stops"):
        start(tmp_path)
    assert world.done == []


def test_one_that_began_a_moment_ago_is_left_alone(world: World, tmp_path: Path) -> None:
    world.raises["controller"] = Unavailable("a controller is running already")
    with pytest.raises(Unavailable, match="running already"):
        start(tmp_path)
    assert world.done == ["controller"]


def test_hosts_that_cannot_serve_are_named_before_anything_starts(
    world: World, tmp_path: Path
) -> None:
    world.checks = [failed("placement", Unavailable("the hosts have no room for the shards"))]
    with pytest.raises(Unavailable, match="no room"):
        start(tmp_path)
    assert world.done == []


@pytest.mark.parametrize("has_serve", [False, True])
@pytest.mark.parametrize("part", ["shards", "front end", "routers"])
@pytest.mark.parametrize("error", [Unavailable("no"), KeyboardInterrupt()])
def test_what_was_started_is_stopped_and_serve_only_if_it_was_ours(
    world: World, tmp_path: Path, part: str, has_serve: bool, error: BaseException
) -> None:
    world.has_serve = has_serve
    world.raises[part] = error
    with pytest.raises(type(error)):
        start(tmp_path)
    assert world.done[-1] == ("stop, keep_serve=True" if has_serve else "stop, Serve too")
    assert world.done.count("controller") == 1


@pytest.mark.parametrize(
    ("asked", "hosts", "wanted"),
    [("null", 3, (3, 1)), ("2", 3, (2, 1)), ("4", 3, (4, 2)), ("1", 1, (1, 1))],
)
def test_one_router_per_host_unless_another_number_is_asked_for(
    asked: str, hosts: int, wanted: tuple[int, int]
) -> None:
    config = load_config(None, [f"cluster.router_replicas={asked}", *LAUNCHED])
    assert routers_wanted(config.cluster, hosts) == wanted
    application = router_application(config, INSECURE, hosts=hosts)
    deployment = application._bound_deployment
    assert deployment.num_replicas == wanted[0]
    assert deployment._replica_config.max_replicas_per_node == wanted[1]
