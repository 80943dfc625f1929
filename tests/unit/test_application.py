"""What Ray Serve's tools get from the application builder; the deployment itself is
tests/integration/own/test_application.py."""

import subprocess
from pathlib import Path

import pytest
import ray
from pydantic import ValidationError
from ray import serve

from shardline.cluster.config import load_config
from shardline.cluster.control.hosts import Host
from shardline.cluster.preflight.check import Check
from shardline.cluster.serving import application, await_hosts
from shardline.cluster.serving.application import ServeArguments, bring_up, build
from shardline.cluster.serving.survey import Wanted, check_fits
from shardline.shards.core.errors import ConfigError, NotFound, Unavailable

SETTINGS = ["cluster.address=auto", "cluster.insecure=true", "cluster.router_replicas=2"]


def arguments(*overrides: str) -> ServeArguments:
    return ServeArguments(overrides=[*SETTINGS, *overrides])


@pytest.mark.parametrize(
    ("given", "named"),
    [({"cofnig": "x"}, "cofnig"), ({"generation": 0}, "generation"), ({"hosts": 0}, "hosts")],
)
def test_arguments_that_nobody_knows_are_refused_by_name(given: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ServeArguments.model_validate(given)


def test_a_private_ray_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.address: .*; expected auto; got local"):
        ServeArguments().load()
    with pytest.raises(NotFound, match=r"nowhere\.yaml"):
        ServeArguments(config=tmp_path / "nowhere.yaml").load()
    with pytest.raises(ConfigError, match="clutser"):
        arguments("clutser.shards=2").load()


def test_the_file_may_be_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("cluster: {address: auto, replicas: 3}\n")
    assert ServeArguments(config=Path("~/own.yaml")).load().cluster.replicas == 3


def test_without_a_cluster_the_application_is_built_for_one_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`serve build` only writes the file."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(application, "_bring_up_apart", lambda *_: pytest.fail("no cluster"))
    assert isinstance(build(arguments()), serve.Application)


def test_routers_are_as_many_as_the_hosts_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(application, "_bring_up_apart", lambda *_: 3)
    monkeypatch.setattr(
        application, "router_application", lambda *_, hosts: seen.update(hosts=hosts)
    )
    build(arguments())
    assert seen == {"hosts": 3}


@pytest.mark.parametrize(
    ("printed", "code", "reason"),
    [
        ('note\n{"error": "no room: 8 of 6"}\n', 0, r"got no room: 8 of 6"),
        ("", 1, "got exit code 1, see the log"),
        ("Killed", 0, "got exit code 0, see the log"),
        ('{"hosts": 3}', -9, "got exit code -9"),
    ],
)
def test_what_the_other_process_could_not_do_is_passed_on(
    printed: str, code: int, reason: str
) -> None:
    assert application._hosts_of('a line of Ray\'s\n{"hosts": 3}\n', 0) == 3
    with pytest.raises(Unavailable, match=reason):
        application._hosts_of(printed, code)


def test_a_start_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        gcs_address = "10.0.0.1:6379"

    def never(command: list[str], *, timeout: float, **options: object) -> None:
        assert command[1:3] == ["-m", application.__name__]
        assert ServeArguments.model_validate_json(command[3]) == arguments()
        assert command[4] == Context.gcs_address
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(subprocess, "run", never)
    with pytest.raises(Unavailable, match="did not start; expected within 7 s; allow more"):
        application._bring_up_apart(arguments(), 7.0)


def test_a_controller_that_runs_is_waited_for_and_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[object] = []
    monkeypatch.setattr(application, "controller", lambda: "the controller")
    monkeypatch.setattr(application, "wait_ready", lambda *given: waited.append(given))
    monkeypatch.setattr(application, "start_controller", lambda *_: pytest.fail("one runs"))
    monkeypatch.setattr(application, "living_hosts", lambda: ["one", "two"])
    monkeypatch.setattr(application, "wait_for_hosts", lambda *_, **__: pytest.fail("it runs"))
    config = load_config(None, ["cluster.start_timeout_s=5"])
    assert bring_up(config, None) == 2
    assert waited == [("the controller", 5.0)]


def test_what_was_started_is_stopped_when_its_shards_do_not_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped: list[bool] = []

    def fails(*_: object) -> None:
        raise Unavailable("shards did not become ready")

    nothing_runs(monkeypatch)
    monkeypatch.setattr(application, "wait_for_hosts", lambda *_, **__: None)
    monkeypatch.setattr(application, "survey", lambda *_, **__: [])
    monkeypatch.setattr(application, "start_controller", lambda *_: "new")
    monkeypatch.setattr(application, "wait_loaded", fails)
    monkeypatch.setattr(application, "stop_shards", lambda: stopped.append(True))
    with pytest.raises(Unavailable, match="did not become ready"):
        bring_up(load_config(None, []), None)
    assert stopped == [True]


def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_runs() -> None:
        raise Unavailable("no cluster of Shardline's is served on this Ray")

    monkeypatch.setattr(application, "controller", none_runs)
    monkeypatch.setattr(application, "servable_generation", lambda *_: 1)
    monkeypatch.setattr(application, "before_start", lambda *_: [])
    monkeypatch.setattr(application, "read_generation", lambda _: "its manifest")
    wanted = Wanted(shards=4, replicas=2, cpus=2)
    monkeypatch.setattr(application, "wanted_of", lambda *_: wanted)


def test_hosts_are_waited_for_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under KubeRay the head, which has no CPUs, deploys before the workers are there."""
    cpus = (0, 8, 8)
    head, *workers = [
        Host(node_id=f"n{number}", address=f"10.0.0.{number}", cpus=has)
        for number, has in enumerate(cpus)
    ]
    looks = [(head,), (head, workers[0]), (head, *workers)]
    done: list[str] = []

    def living() -> tuple[Host, ...]:
        return looks.pop(0) if len(looks) > 1 else looks[0]

    def surveyed(*_: object, **__: object) -> list[Check]:
        done.append("survey")
        return [check_fits(living(), Wanted(shards=4, replicas=2, cpus=2))]

    nothing_runs(monkeypatch)
    monkeypatch.setattr(application, "living_hosts", living)
    monkeypatch.setattr(await_hosts, "POLL_S", 0.0)
    monkeypatch.setattr(application, "survey", surveyed)
    monkeypatch.setattr(application, "start_controller", lambda *_: done.append("controller"))
    monkeypatch.setattr(application, "wait_loaded", lambda *_: 1)
    assert bring_up(load_config(None, []), None, hosts=2) == 3
    assert done == ["survey", "controller"]


def test_nothing_is_started_where_the_hosts_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_runs(monkeypatch)
    monkeypatch.setattr(application, "living_hosts", tuple)
    monkeypatch.setattr(application, "survey", lambda *_, **__: pytest.fail("no hosts"))
    monkeypatch.setattr(application, "start_controller", lambda *_: pytest.fail("no hosts"))
    with pytest.raises(Unavailable, match=r"have not joined Ray; expected within 0\.01 s"):
        bring_up(load_config(None, ["cluster.start_timeout_s=0.01"]), None)
