"""A batch job on a real Ray of several logical hosts, when one dies that has some of its stages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_many_hosts import run_scenario

Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with run_scenario("tests.integration.batch_hosts") as folder:
        lines = (Path(folder) / "seen").read_text().splitlines()
        yield {line["event"]: line for line in map(json.loads, lines)}


def test_stages_move_to_a_host_that_has_room(seen: Seen) -> None:
    found = seen["a host to spare"]
    assert "error" not in found
    assert found["same"]


def test_a_job_without_room_ends_and_goes_on_later(seen: Seen) -> None:
    assert "no other has room" in seen["no host to spare"]["error"]
    again = seen["again"]
    assert 0 < again["resumed"] < again["parts"]
    assert again["same"]
