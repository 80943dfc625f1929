"""A start that fails ends what it has started, and nothing that was there before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardline.cluster.config import load_config
from shardline.cluster.control.opening import cluster_id_of
from shardline.cluster.preflight.check import failed, warned
from shardline.cluster.serving import deployment as module
from shardline.cluster.serving.await_routers import Ready
from shardline.cluster.serving.deployment import (
    controller_settings,
    silent_replicas,
    start_serving,
    wait_loaded,
)
from shardline.cluster.serving.front_end import router_application, routers_wanted
from shardline.cluster.store import Store
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
        self.report = {"routers": [{"host": "10.0.0.1"}, {"host": "10.0.0.2"}], "replicas": []}
        self.shown = {
            "http://127.0.0.1:8000": "http://10.0.0.2:8000",
            "http://10.0.0.1:8000": "http://10.0.0.1:8000",
        }
        self.waits: list[dict[str, Any]] = []
        parts = {
            "servable_generation": lambda *_: 1,
            "before_start": lambda *_: [],
            "serve_runs": lambda: self.has_serve,
            "is_served": lambda: self.has_cluster,
            "check_serve": self.part("check_serve"),
            "survey": lambda *_, **__: self.checks,
            "start_controller": self.start_controller,
            "wait_loaded": self.part("shards", 1),
            "living_hosts": lambda: (1, 2),
            "start_front_end": self.part("front end"),
            "wait_for_routers": self.wait_for_routers,
            "wait_for_hosts": lambda count, wanted: count(),
            "ask_controller": self.ask_controller,
            "stop_serving": lambda keep_serve: self.done.append(f"stop, {keep_serve=}"),
            "stop_launched": lambda: self.done.append("stop, Serve too"),
        }
        for name, part in parts.items():
            monkeypatch.setattr(module, name, part)

    def start_controller(self, settings: Any) -> None:
        self.secret = settings.secret
        self.part("controller")()

    def wait_for_routers(self, find: Any, ask: Any, **wait: Any) -> Ready:
        """All that are found answer; afterwards the controller is away."""
        urls = find()
        self.waits.append(wait)
        self.part("routers")()
        self.raises.setdefault("controller asked", Unavailable("the controller does not answer"))
        return Ready(statuses={url: {"warnings": []} for url in urls})

    def ask_controller(self) -> Any:
        if "controller asked" in self.raises:
            raise self.raises["controller asked"]
        return SimpleNamespace(shown=self.shown, report=self.report)

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


def start(tmp_path: Path, said: list[str] | None = None, *settings: str) -> module.Started:
    config = load_config(None, [f"store={tmp_path}", *LAUNCHED, *settings])
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


def test_the_cluster_waited_for_is_the_one_just_started(world: World, tmp_path: Path) -> None:
    """Its id comes from the secret: a controller that has just died need not be asked for it."""
    start(tmp_path)
    (wait,) = world.waits
    assert wait["cluster_id"] == cluster_id_of(world.secret)
    assert wait["wanted"] == 2


def test_on_loopback_this_host_is_asked_and_the_others_are_counted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.shown = {"http://127.0.0.1:8000": "http://127.0.0.1:8000"}
    counted: list[int] = []

    def wait_for_hosts(count: Any, wanted: int) -> int:
        world.raises.pop("controller asked")
        world.report["routers"] = [{"host": "10.0.0.1"}]
        counted.append(wanted)
        return int(count())

    monkeypatch.setattr(module, "wait_for_hosts", wait_for_hosts)
    said: list[str] = []
    started = start(tmp_path, said, "cluster.http_host=127.0.0.1")
    assert started.urls == ("http://127.0.0.1:8000",)
    assert (world.waits[0]["wanted"], counted) == (1, [2])
    assert said[-1] == "warning: routers of 1 hosts have not been heard of"


def replica(shard: int, host: str, *, answers: bool, why: str | None = None) -> dict[str, Any]:
    reason = None if why is None else {"code": "unavailable", "text": why}
    return {"shard": shard, "host": host, "answers": answers, "reason": reason}


def test_replicas_that_do_not_answer_in_time_are_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.report["replicas"] = [
        replica(0, "10.0.0.1", answers=True),
        replica(1, "10.0.0.2", answers=False),
        replica(2, "10.0.0.3", answers=False, why="no memory"),
    ]

    def wait_ready(controller: object, timeout_s: float) -> int:
        raise Unavailable("shards did not become ready", expected="within 0 s", hint="wait")

    monkeypatch.setattr(module, "wait_ready", wait_ready)
    said = "got shard 1 on 10.0.0.2: nothing yet; shard 2 on 10.0.0.3: no memory; wait"
    with pytest.raises(Unavailable, match=said):
        wait_loaded(None, Store(tmp_path), 1, 0.0, print)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match="within 0 s; wait"):  # another reason: it is not late
        wait_loaded(None, Store(tmp_path), 1, 60.0, print)  # type: ignore[arg-type]


def test_a_message_names_only_some_of_many_replicas() -> None:
    report = {"replicas": [replica(shard, "h", answers=False) for shard in range(12)]}
    said = silent_replicas(report).split("; ")
    assert said[0] == "shard 0 on h: nothing yet"
    assert (len(said), said[-1]) == (9, "4 more")


def test_a_shard_may_be_tried_on_other_hosts_within_the_time_of_a_start(tmp_path: Path) -> None:
    config = load_config(None, ["cluster.start_timeout_s=90"])
    assert controller_settings(config, Store(tmp_path), 1, 80).load_limit_s == 30


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


@pytest.mark.parametrize("writes", [True, False])
def test_routers_store_events_in_the_store_unless_that_is_read_alone(
    tmp_path: Path, writes: bool
) -> None:
    config = load_config(None, [f"store={tmp_path}", f"cluster.writes={str(writes).lower()}"])
    given = router_application(config, INSECURE, hosts=1)._bound_deployment.init_kwargs
    assert given["events_folder"] == (str(tmp_path.resolve() / "events") if writes else None)
