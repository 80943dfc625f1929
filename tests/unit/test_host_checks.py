"""What hosts say of themselves is judged, with the host and the arithmetic named."""

import dataclasses
import errno
import hashlib
import itertools
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayTaskError

from shardline.cluster.config import load_config
from shardline.cluster.control.hosts import Host
from shardline.cluster.preflight.check import Verdict, enforce
from shardline.cluster.preflight.folders import Folder
from shardline.cluster.preflight.free_memory import FreeMemory
from shardline.cluster.preflight.host_checks import (
    Answer,
    check_clock,
    check_hosts,
    check_silent,
)
from shardline.cluster.preflight.host_facts import HostFacts, Question, code_digest, host_facts
from shardline.cluster.serving import survey as module
from shardline.cluster.serving.survey import (
    Wanted,
    ask_hosts,
    check_fits,
    check_http_options,
    check_rooms,
    check_several,
    first_placement,
    probe_in,
    survey,
)
from shardline.shards.core.errors import ConfigError, DataError, ShardlineError, Unavailable

MIB = 1 << 20


def facts_of(address: str = "10.0.0.2", **changes: Any) -> HostFacts:
    content: dict[str, Any] = {
        "address": address,
        "name": "h2",
        "python": "3.11.7",
        "ray": "2.60.0",
        "shardline": "0.1.0",
        "code": "abc",
        "cores": 2,
        "memory": FreeMemory(available_bytes=4 << 30, swap_bytes=0, limit="this machine"),
        "open_files": 1 << 20,
        "store": Folder(path=Path("/s"), free_bytes=1 << 40, can_execute=True, refusal=None),
        "sees_probe": True,
        "store_error": None,
        "manifest": "f" * 64,
        "manifest_error": None,
        "port_error": None,
        "clock_s": 1000.0,
    }
    return HostFacts(**(content | changes))


OWN = facts_of("10.0.0.1")


def judged(facts: HostFacts) -> list[str]:
    answer = Answer(facts=facts, asked_s=999.0, answered_s=1001.0)
    checks = check_hosts([answer], OWN, in_flight=128)
    return [str(check) for check in checks if check.verdict is not Verdict.OK]


def test_a_host_like_this_one_passes() -> None:
    assert judged(facts_of()) == []


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"python": "3.12.1"}, Unavailable, "another Python than .*; expected 3.11; got 3.12"),
        ({"ray": "2.59.0"}, Unavailable, "another Ray than .*; expected 2.60.0; got 2.59.0"),
        ({"shardline": None}, Unavailable, "another Shardline .*; got none; install the same"),
        ({"sees_probe": False}, DataError, "another store than that of .*mount the shared"),
        ({"store_error": "[Errno 116] Stale file handle: '/s'", "sees_probe": None}, DataError,
         "the store cannot be looked into; .*Stale file handle.*mount"),
        ({"manifest_error": "gone"}, DataError, "the generation cannot be read; got gone"),
        ({"manifest": "e" * 64}, DataError, "its generation is not that of .*got eeee"),
        ({"open_files": 100}, Unavailable, "may open too few files here"),
        ({"port_error": "port 8000 is taken by"}, Unavailable, "port 8000 is taken"),
        (
            {"store": Folder(path=Path("/s"), free_bytes=0, can_execute=False,
                             refusal=OSError(30, "read-only"))},
            DataError, "/s: on a read-only file system",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_host_is_refused_with_its_name(
    changes: dict[str, Any], kind: type[ShardlineError], said: str
) -> None:
    answer = Answer(facts=facts_of(**changes), asked_s=999.0, answered_s=1001.0)
    with pytest.raises(kind, match=f"host 10.0.0.2: .*{said}"):
        enforce(check_hosts([answer], OWN, in_flight=128))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"code": "def"}, "its code differs from that on 10.0.0.1: copy it there again"),
        ({"clock_s": 1001.0 + 3600}, "clock: 1.0 h ahead"),
        ({"clock_s": 999.0 - 50}, "clock: 50 s behind"),
        ({"sees_probe": None}, "shared store: not compared with that of 10.0.0.1"),
    ],
)
def test_what_is_only_odd_is_a_warning(changes: dict[str, Any], said: str) -> None:
    (line,) = judged(facts_of(**changes))
    assert line.startswith("warn")
    assert said in line


def test_a_clock_is_compared_with_the_times_before_and_after() -> None:
    """A host may take seconds to answer: its clock is right if it lies between."""
    assert check_clock(1004.0, 1000.0, 1005.0).verdict is Verdict.OK
    assert check_clock(1007.1, 1000.0, 1005.0).verdict is Verdict.WARN


def test_a_host_that_says_nothing_is_named() -> None:
    (check,) = check_silent({"10.0.0.3": "nothing within 60 s"})
    assert "host 10.0.0.3: reachable: no process could be started there; got nothing" in str(check)
    assert check.verdict is Verdict.FAIL


def hosts_of(*cpus: float) -> list[Host]:
    return [
        Host(node_id=f"n{number}", address=f"10.0.0.{number}", cpus=each)
        for number, each in enumerate(cpus, 1)
    ]


def test_room_is_compared_before_anything_starts() -> None:
    wanted = Wanted(shards=4, replicas=1, cpus=4)
    assert check_fits(hosts_of(8, 8), wanted).verdict is Verdict.OK
    check = check_fits(hosts_of(2, 2), wanted)
    assert check.verdict is Verdict.FAIL
    assert "each of which reserves 4 CPUs" in check.text
    check = check_fits(hosts_of(2, 2), Wanted(shards=4, replicas=3, cpus=0))
    assert "3 replicas of each shard are on as many different hosts, and 2 of 2" in check.text


def test_shards_are_expected_where_the_controller_places_them() -> None:
    placed = first_placement(hosts_of(2, 2, 0), Wanted(shards=4, replicas=1, cpus=0))
    assert sorted(itertools.chain(*placed.values())) == [0, 1, 2, 3]
    assert [len(placed[f"10.0.0.{number}"]) for number in (1, 2, 3)] == [2, 2, 0]
    twice = first_placement(hosts_of(2, 2), Wanted(shards=3, replicas=2, cpus=0))
    assert twice == {"10.0.0.1": [0, 1, 2], "10.0.0.2": [0, 1, 2]}


def test_zones_count_as_they_do_for_the_controller() -> None:
    """Two hosts in one zone, one in another: a shard's two replicas are never in one zone."""
    hosts = [
        Host(node_id=f"n{number}", address=f"10.0.0.{number}", cpus=2, zone=zone)
        for number, zone in enumerate("aab", 1)
    ]
    placed = first_placement(hosts, Wanted(shards=4, replicas=2, cpus=0))
    assert placed["10.0.0.3"] == [0, 1, 2, 3]
    assert sorted(placed["10.0.0.1"] + placed["10.0.0.2"]) == [0, 1, 2, 3]


def test_memory_is_compared_host_by_host() -> None:
    def memory(size: int, swap: int = 0) -> FreeMemory:
        return FreeMemory(available_bytes=size * MIB, swap_bytes=swap * MIB, limit="this machine")

    wanted = Wanted(shards=4, replicas=1, cpus=0)
    loaded = [300 * MIB] * 4

    def verdicts(*sizes: FreeMemory) -> list[tuple[Verdict, str]]:
        named = {f"10.0.0.{number}": size for number, size in enumerate(sizes, 1)}
        checks = check_rooms(hosts_of(2, 2), wanted, named, loaded, cache_bytes=0)
        return [(check.verdict, str(check)) for check in checks]

    (first, _), (second, text) = verdicts(memory(8000), memory(500))
    assert (first, second) == (Verdict.OK, Verdict.FAIL)
    assert "host 10.0.0.2: memory: the shards placed there do not fit" in text
    assert "expected at least 2 shards = 600 MiB; got 500 MiB free" in text
    (_, _), (second, text) = verdicts(memory(8000), memory(700))
    assert second is Verdict.WARN
    assert "2 shards = 600 MiB + about 826 MiB of processes are more than 700 MiB" in text
    (_, _), (second, _) = verdicts(memory(8000), memory(500, swap=200))
    assert second is Verdict.WARN


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("cluster.http_host=10.0.0.1", "cluster.http_host: .*every address.*got '10.0.0.1'"),
        ("cluster.http_port=0", "cluster.http_port: .*same port on every host.*got 0"),
    ],
)
def test_addresses_that_a_launched_cluster_cannot_have(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        enforce([check_http_options(load_config(None, [setting]))])
    assert enforce([check_http_options(load_config(None, ["cluster.http_host=0.0.0.0"]))]) == []


@pytest.mark.parametrize(
    ("settings", "hosts", "said"),
    [
        (["cluster.shard_host=127.0.0.1"], 1, []),
        (["cluster.shard_host=node", "cluster.http_host=0.0.0.0"], 3, []),
        (
            ["cluster.shard_host=127.0.0.1", "cluster.http_host=0.0.0.0"],
            2,
            [("FAIL", "cluster.shard_host: .*2 hosts.*expected \"node\"; got '127.0.0.1'")],
        ),
        (
            ["cluster.shard_host=10.0.0.1", "cluster.http_host=0.0.0.0"],
            2,
            [("FAIL", "cluster.shard_host: .*got '10.0.0.1'")],
        ),
        (
            ["cluster.shard_host=node", "cluster.http_host=127.0.0.1"],
            2,
            [("warn", 'a host whose router is away answers 503: .*"0.0.0.0"')],
        ),
        (
            [
                "cluster.shard_host=node",
                "cluster.http_host=localhost",
                "cluster.router_replicas=1",
            ],
            2,
            [("FAIL", "cluster.router_replicas: .*at least 2, the number of hosts; got 1")],
        ),
    ],
)
def test_loopback_is_for_one_host(
    settings: list[str], hosts: int, said: list[tuple[str, str]]
) -> None:
    checks = list(check_several(load_config(None, settings), hosts))
    assert [check.verdict.value for check in checks] == [verdict for verdict, _ in said]
    for check, (_, text) in zip(checks, said, strict=True):
        assert re.search(text, check.text), check.text


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_host_says_what_it_finds(tmp_path: Path, taken: int) -> None:
    with probe_in(tmp_path) as probe:
        question = Question(
            store=str(tmp_path), generation=None, probe=probe, http_host="127.0.0.1", port=taken
        )
        facts = host_facts("10.0.0.9", question)
        assert facts.sees_probe
        elsewhere = host_facts("x", dataclasses.replace(question, store=str(tmp_path / "none")))
        assert not elsewhere.sees_probe
    assert host_facts("x", dataclasses.replace(question, probe=None)).sees_probe is None
    assert list(tmp_path.iterdir()) == [], "neither the probe nor the file of the look is left"
    assert facts.store.refusal is None
    assert facts.port_error == f"port {taken} is taken by another program"
    assert (facts.manifest, facts.manifest_error) == (None, None)
    assert facts.code == code_digest()
    missing = host_facts("x", dataclasses.replace(question, generation=3, port=None))
    assert missing.manifest_error is not None
    assert missing.port_error is None


def test_a_store_that_cannot_be_looked_into_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stale(path: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    question = Question(
        store=str(tmp_path), generation=None, probe="p", http_host="127.0.0.1", port=None
    )
    monkeypatch.setattr(Path, "exists", stale)
    facts = host_facts("10.0.0.9", question)
    assert facts.sees_probe is None
    assert "Stale file handle" in str(facts.store_error)
    assert facts.store.refusal is not None


def test_the_hosts_are_looked_at_though_the_probe_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @contextmanager
    def probe_in(root: Path) -> Iterator[str]:
        raise OSError(errno.EROFS, "read-only")
        yield ""

    def ask(hosts: list[Host], question: Question) -> tuple[list[Answer], dict[str, str]]:
        assert question.probe is None
        facts = host_facts("10.0.0.2", question)
        return [Answer(facts=facts, asked_s=facts.clock_s, answered_s=facts.clock_s)], {}

    monkeypatch.setattr(module, "probe_in", probe_in)
    monkeypatch.setattr(module, "living_hosts", lambda: hosts_of(2, 2))
    monkeypatch.setattr(module, "ask_hosts", ask)
    context = SimpleNamespace(get_node_id=lambda: "n1")
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: context)
    config = load_config(None, [f"store={tmp_path}", "cluster.shard_host=node"])
    found = [str(each) for each in survey(config, None, is_served=True, has_serve=True)]
    assert f"FAIL  store: {tmp_path}: on a read-only file system" in "\n".join(found)
    assert any(each.startswith("warn  host 10.0.0.2: shared store: not compared") for each in found)
    assert any(each.startswith("ok    host 10.0.0.2: versions") for each in found)


def test_the_digest_is_of_every_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "shardline"
    (package / "router").mkdir(parents=True)
    (package / "router" / "a.py").write_text("one")
    monkeypatch.setattr(
        "shardline.cluster.preflight.host_facts.shardline.__file__", str(package / "__init__.py")
    )
    before = code_digest()
    assert before == hashlib.sha256(b"a.pyone").hexdigest()[:12]
    (package / "router" / "a.py").write_text("two")
    assert code_digest() != before


def test_hosts_that_do_not_answer_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: dict[str, Callable[[], Any]] = {
        "10.0.0.1": lambda: facts_of("10.0.0.1"),
        "10.0.0.2": lambda: _raise(GetTimeoutError("late")),
        "10.0.0.3": lambda: _raise(
            RayTaskError("host_facts", "Traceback\nModuleNotFoundError: No module named 'x'", None)
        ),
    }
    monkeypatch.setattr(module, "_ask", lambda host, question: host.address)
    monkeypatch.setattr(module.ray, "get", lambda address, timeout: outcomes[address]())
    question = Question(store="/s", generation=1, probe="p", http_host="0.0.0.0", port=1)
    answers, silent = ask_hosts(hosts_of(1, 1, 1), question)
    assert [answer.facts.address for answer in answers] == ["10.0.0.1"]
    assert silent == {
        "10.0.0.2": "nothing within 60 s",
        "10.0.0.3": "ModuleNotFoundError: No module named 'x'",
    }


def _raise(error: Exception) -> None:
    raise error
