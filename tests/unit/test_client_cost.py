"""The benchmark of the clients: it asks for a real answer, and its sums are right."""

import pytest

from shardline.bench.load.client_cost import (
    ASYNC,
    RAW,
    SYNC,
    K,
    canned_answer,
    figures,
    lines_of,
    measure,
)
from shardline.router.client.answers import read_search
from shardline.router.client.http1 import ResponseReader


def test_the_canned_answer_is_a_search_of_k() -> None:
    response = ResponseReader().feed(canned_answer())
    assert response is not None and response.keep_alive
    assert read_search(response.body).ids.tolist() == [list(range(K))]


def test_figures_are_milliseconds_and_differences_to_the_raw_socket() -> None:
    found = figures({RAW: [0.001] * 9, SYNC: [0.0015] * 9, ASYNC: [0.002] * 8 + [1.0]})
    assert [each["beyond_raw_ms"] for each in found.values()] == pytest.approx([0.0, 0.5, 1.0])
    assert found[SYNC]["p50_ms"] == pytest.approx(1.5)
    assert found[ASYNC]["p99_ms"] > 900


def test_every_client_is_measured() -> None:
    report = measure(5)
    assert list(report["clients"]) == [RAW, SYNC, ASYNC]
    assert all(each["p50_ms"] > 0 for each in report["clients"].values())
    assert len(lines_of(report)) == 4
