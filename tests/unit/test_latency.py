"""The latency benchmark where nothing can be measured: it says what failed."""

from pathlib import Path

import numpy as np
import pytest

from bench.latency import answered_ids, refuse_unanswered, run
from bench.openloop import LoadResult
from cluster.config import load_config
from cluster.console import StageProgress
from router.codec import encode_answer
from router.media import Media
from router.messages import Coverage, SearchAnswer
from shards.errors import InvalidInput, Unavailable


def result(
    latencies: list[float], failures: dict[str, int], bodies: dict[int, bytes]
) -> LoadResult:
    return LoadResult(
        latencies_ms=np.array(latencies), failures=failures, late_ms=0.0, bodies=bodies
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
