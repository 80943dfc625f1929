"""The latency benchmark: both ways of asking, its table, and what it says where nothing answers."""

from pathlib import Path

import numpy as np
import pytest

from shardline.bench.load.latency import (
    WARM_UP,
    answered_ids,
    in_a_row_over_http,
    latency_over_http,
    refuse_unanswered,
    run,
    table_rows,
)
from shardline.bench.load.openloop import LoadResult
from shardline.cluster.config import load_config
from shardline.cluster.console import StageProgress
from shardline.cluster.serving.endpoint import Endpoint
from shardline.router.http.codec import decode_query, encode_answer
from shardline.router.http.media import Media
from shardline.router.query import Coverage, SearchAnswer
from shardline.shards.core.errors import InvalidInput, Unavailable
from tests.unit.fake_endpoint import FakeEndpoint, running


def result(
    latencies: list[float], failures: dict[str, int], bodies: dict[int, bytes]
) -> LoadResult:
    return LoadResult(
        latencies_ms=np.array(latencies), failures=failures, seconds=1.0, late_ms=0.0, bodies=bodies
    )


def answer(ids: list[int]) -> bytes:
    row = np.array([ids], dtype=np.int64)
    return encode_answer(
        SearchAnswer(
            ids=row,
            scores=-row.astype(np.float32),
            generation=1,
            model_version="m",
            coverage=Coverage(
                shards_asked=1, shards_answered=1, rows_asked=9, rows_answered=9, degraded=[]
            ),
            took_ms=1.0,
            search_ms=0.5,
            request_id="r",
            reasons={},
        ),
        Media.MSGPACK,
    )


def test_the_ids_of_the_answers_there_are() -> None:
    some = result([1.0, 2.0], {"HTTP 503": 1}, {0: answer([3, 4]), 2: answer([5, 6])})
    refuse_unanswered(some, "search")
    assert answered_ids(some).tolist() == [[3, 4], [5, 6]]


def test_without_any_answer_it_says_what_failed() -> None:
    none = result([], {"HTTP 503": 3, "ConnectionRefusedError": 17}, {})
    with pytest.raises(Unavailable) as caught:
        refuse_unanswered(none, "search")
    assert str(caught.value) == (
        "no search was answered; got 17 x ConnectionRefusedError, 3 x HTTP 503"
    )


def test_a_run_without_a_request_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    config = load_config(None, [f"store={tmp_path / 'store'}"])
    with pytest.raises(InvalidInput, match="too short for one request; expected >= 2; got 1"):
        run(config, rows=10, dim=4, k=1, rate=0.5, seconds=1, progress=StageProgress())
    assert not (tmp_path / "store").exists()


def test_more_results_than_rows_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    config = load_config(None, [f"store={tmp_path / 'store'}"])
    with pytest.raises(InvalidInput, match=r"^-k: no answer is that long; expected <= 10; got 11"):
        run(config, rows=10, dim=4, k=11, rate=5.0, seconds=1, progress=StageProgress())
    assert not (tmp_path / "store").exists()


def test_both_ways_ask_the_queries_in_order_after_a_warm_up_that_is_not_counted() -> None:
    queries = np.eye(3, dtype=np.float32)
    fake = FakeEndpoint()
    with running(fake) as (host, port):
        endpoint = Endpoint(url=f"http://{host}:{port}", generation=1, pid=1, started=0.0)
        empty, search = in_a_row_over_http(endpoint, queries, k=2, seconds=0.05)
        in_a_row = [body for body in fake.bodies if body]
        assert fake.bodies.count(b"") == WARM_UP + empty.requests
        fake.bodies.clear()
        open_empty, open_search = latency_over_http(endpoint, queries, k=2, rate=1000.0)
    asked = [decode_query(body, Media.MSGPACK).vectors for body in in_a_row]
    assert len(asked) == WARM_UP + search.requests > WARM_UP + 3
    first = [queries.tolist().index(vectors[0].tolist()) for vectors in asked[WARM_UP:]]
    assert first == [number % 3 for number in range(search.requests)]
    assert empty.failures == search.failures == {}
    assert open_empty.requests == open_search.requests == 3
    assert sorted(open_search.bodies) == [0, 1, 2]
    assert fake.bodies.count(b"") == WARM_UP + 3


def test_the_table_puts_each_way_after_its_own_floor() -> None:
    summary = result([1.0, 2.0, 3.0], {"HTTP 429": 1}, {}).summary()
    report = {
        "setup": {"rate": 20.0},
        "in_a_row": {"empty_request": summary, "search": summary | {"p50_ms": 2.5}},
        "empty_request": summary,
        "search": summary | {"p99_9_ms": 1234.5678},
        "bare_index_ms": {"p50": 0.3, "p99": 0.6},
    }
    figures = ("2.00", "2.80", "2.98", "3.00", "3.0", "4", "1")
    assert table_rows(report) == [
        ("empty request (floor), in a row", *figures),
        ("search, in a row", "2.50", *figures[1:]),
        ("empty request (floor), at 20 a second", *figures),
        ("search, at 20 a second", *figures[:3], "1234.57", *figures[4:]),
        ("the same indexes, bare, in turn", "0.30", "", "0.60", "", "", "", ""),
    ]
