"""`shardline status` of a launched cluster: the controller's report, and a router's."""

import json
from typing import Any

import pytest

from shardline.cluster.cli import main
from shardline.cluster.commands import query as module
from shardline.cluster.serving.launched import Launched
from shardline.shards.core.errors import Unavailable
from tests.unit.test_launched import report_of

REPLICA = {
    "shard": 0,
    "replica": 3,
    "host": "10.0.0.2",
    "address": ["10.0.0.2", 4000],
    "epoch": 17,
    "answers": False,
    "stage": "staying",
    "failures": 1,
    "seq": 1200,
    "lag": 34,
    "rows": 5678,
    "reason": {"code": "not_found", "text": "no such folder"},
}


class Router:
    """Stands for an address and its client."""

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers

    def client(self) -> "Router":
        return self

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def status(self) -> dict[str, Any]:
        if not self.answers:
            raise Unavailable("no router answers")
        names = ("generation", "model_version", "index", "dim", "metric", "rows")
        quality = {"generation": 1, "recall": 0.5, "queries": 1, "k": 10, "since": 0.0}
        return {**dict.fromkeys(names, 1), "shards": [], "warnings": [], "quality": quality}


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    report = report_of(
        ("10.0.0.2", 0.25),
        replicas=[REPLICA],
        shards=[{"shard": 0, "primary": 3, "primary_epoch": 18}],
        notes=[{"code": "unavailable", "text": "fewer hosts than replicas"}],
    )
    report["hosts"][2]["alive"] = False
    report["quality"] = {"generation": 1, "recall": 0.95, "queries": 70, "k": 10, "since": 0.0}
    report["repairs"] = [{"code": "compact", "text": "too much has changed"}]
    found = Launched(report=report, node_id="node-10.0.0.1")
    monkeypatch.setattr(module, "launched_of", lambda *_: found)

    def run(*options: str, answers: bool = True) -> tuple[int, str, str]:
        monkeypatch.setattr(module, "address_of", lambda *_: Router(answers=answers))
        with pytest.raises(SystemExit) as ended:
            main(["status", *options])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_replica_that_has_taken_an_index_over_is_named(status, monkeypatch) -> None:
    _, out, _ = status()
    assert "search the index" not in out
    monkeypatch.setitem(REPLICA, "index_of", 7)
    _, out, _ = status()
    assert "all shards search the index of generation 7\n" in out


def test_a_replica_whose_card_has_failed_says_so(status, monkeypatch) -> None:
    _, out, _ = status()
    assert "from the CPU" not in out
    monkeypatch.setitem(REPLICA, "device_note", "served from the CPU: its card has failed")
    _, out, _ = status()
    assert out.count("shard 0, replica 3: served from the CPU: its card has failed\n") == 1


def test_recall_is_that_of_all_routers(status) -> None:
    _, out, _ = status()
    assert out.count("against exact answers") == 1
    assert "recall  0.950 @10, of 70 served queries, against exact answers\n" in out
    assert out.count("repair due: compact: too much has changed\n") == 1


def test_hosts_routers_and_replicas_are_shown(status) -> None:
    code, out, err = status()
    assert (code, err) == (0, "")
    lines = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    assert f"cluster {'c' * 16}, routing table 5" in lines
    assert "10.0.0.1 yes none none" in lines
    assert "10.0.0.2 yes none http://10.0.0.2:8000 0.2 s ago" in lines
    assert "10.0.0.10 no none none" in lines
    assert "0 3 10.0.0.2 17 no staying 5,678 primary 1,200 34" in lines
    assert "shard 0, replica 3: not_found: no such folder" in lines
    assert "warning: fewer hosts than replicas" in lines
    assert "generation 1" in lines


def test_the_controller_is_heard_also_while_no_router_answers(status) -> None:
    code, out, err = status(answers=False)
    assert code == 4
    assert "10.0.0.2" in out
    assert err == "error: no router answers\n"


def test_json_has_both(status) -> None:
    code, out, _ = status("--json")
    report = json.loads(out)
    assert code == 0
    assert report["generation"] == 1
    assert report["cluster"]["replicas"] == [REPLICA]
    code, out, _ = status("--json", answers=False)
    assert (code, list(json.loads(out))) == (4, ["cluster"])
