"""The two searchers: exact ranking by row, and a cluster that must be the run's own and whole."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shardline.router.client.answers import Coverage, SearchAnswer
from shardline.shards.core.errors import (
    DataError,
    InvalidInput,
    Overloaded,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.schema import MAX_K, FloatArray
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.evaluation.searchers import (
    ATTEMPTS,
    ClusterSearch,
    ExactSearch,
    open_cluster,
)

ITEM_IDS = np.arange(20) * 3 + 100
WHOLE = Coverage(shards_asked=2, shards_answered=2, rows_asked=20, rows_answered=20, degraded=())


class FakeClient:
    """Answers by exact search over ``items``; what ``events`` holds comes first, one a request."""

    def __init__(self, items: FloatArray, events: list[Any] | None = None) -> None:
        self.items = items
        self.events = events or []
        self.asked: list[dict[str, Any]] = []
        self.model_version, self.generation = "m1", 4

    def status(self) -> dict[str, Any]:
        return {"model_version": self.model_version, "generation": self.generation}

    def search(self, **query: Any) -> SearchAnswer:
        self.asked.append(query)
        event = self.events.pop(0) if self.events else None
        if isinstance(event, Exception):
            raise event
        rows, scores = rank_exact(query["vectors"], self.items, k=query["k"])
        answer = SearchAnswer(
            ids=ITEM_IDS[rows],
            scores=scores,
            generation=self.generation,
            model_version=self.model_version,
            coverage=WHOLE,
            took_ms=1.0,
            search_ms=1.0,
            request_id="r",
        )
        return answer if event is None else replace(answer, **event)


@pytest.fixture
def vectors() -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(0)
    queries, items = (rng.standard_normal((n, 5)).astype(np.float32) for n in (3, 20))
    return queries, items


def connect(client: FakeClient, waits: list[float] | None = None) -> ClusterSearch:
    search = open_cluster(client, ITEM_IDS, "m1")  # type: ignore[arg-type]
    return replace(search, wait=[].append if waits is None else waits.append)


def test_exact_search_is_the_exact_ranking_cut_to_the_catalogue(
    vectors: tuple[FloatArray, FloatArray],
) -> None:
    queries, items = vectors
    rows, scores = ExactSearch(items)(queries, 500)
    expected = rank_exact(queries, items, k=20)
    np.testing.assert_array_equal(scores, expected.scores)
    np.testing.assert_array_equal(rows, expected.ids)


def test_a_cluster_answers_in_rows_of_the_dataset(vectors: tuple[FloatArray, FloatArray]) -> None:
    queries, items = vectors
    client = FakeClient(items)
    rows, scores = connect(client)(queries, 6)
    expected = ExactSearch(items)(queries, 6)
    np.testing.assert_array_equal(scores, expected.scores)
    np.testing.assert_array_equal(rows, expected.ids)
    assert client.asked[0]["min_coverage"] == 1.0, "a partial answer would pass for a whole one"


def test_empty_slots_stay_empty(vectors: tuple[FloatArray, FloatArray]) -> None:
    queries, items = vectors
    ids = np.full((3, 2), -1)
    client = FakeClient(items, [{"ids": ids, "scores": np.full((3, 2), -np.inf, np.float32)}])
    rows, scores = connect(client)(queries, 2)
    assert (rows == -1).all()
    assert np.isneginf(scores).all()


def test_never_more_is_asked_than_a_query_may_return(
    vectors: tuple[FloatArray, FloatArray],
) -> None:
    queries, items = vectors
    client = FakeClient(items)
    search = connect(client)
    search(queries, 10**6)
    many = replace(search, item_ids=np.arange(10**4))
    with pytest.raises(VersionMismatch):  # raised after the request
        replace(many, generation=5)(queries, 10**6)
    assert [query["k"] for query in client.asked] == [20, MAX_K]


def test_another_model_is_refused_before_the_first_search(
    vectors: tuple[FloatArray, FloatArray],
) -> None:
    client = FakeClient(vectors[1])
    with pytest.raises(VersionMismatch, match="another model") as refused:
        open_cluster(client, ITEM_IDS, "m2")  # type: ignore[arg-type]
    assert (refused.value.expected, refused.value.got) == ("m2", "m1")
    assert client.asked == []


@pytest.mark.parametrize("change", [{"model_version": "m2"}, {"generation": 5}])
def test_a_cluster_that_changes_on_the_way_is_refused(
    vectors: tuple[FloatArray, FloatArray], change: dict[str, Any]
) -> None:
    queries, items = vectors
    waits: list[float] = []
    search = connect(FakeClient(items, [None, change]), waits)
    search(queries, 3)
    with pytest.raises(VersionMismatch, match="than when mining began"):
        search(queries, 3)
    assert waits == [], "trying again would not help"


def test_an_item_that_the_dataset_lacks_is_refused(vectors: tuple[FloatArray, FloatArray]) -> None:
    queries, items = vectors
    client = FakeClient(items, [{"ids": np.array([[100, 101]] * 3)}])
    with pytest.raises(DataError, match="unknown") as refused:
        connect(client)(queries, 2)
    assert refused.value.got == "101"


def test_what_is_unavailable_is_tried_again_with_growing_waits(
    vectors: tuple[FloatArray, FloatArray],
) -> None:
    queries, items = vectors
    waits: list[float] = []
    events: list[Any] = [Overloaded("busy"), Unavailable("a shard is missing"), None]
    rows, _ = connect(FakeClient(items, events), waits)(queries, 4)
    np.testing.assert_array_equal(rows, ExactSearch(items)(queries, 4).ids)
    assert waits == [0.5, 1.0]


def test_in_the_end_the_error_is_told(vectors: tuple[FloatArray, FloatArray]) -> None:
    queries, items = vectors
    waits: list[float] = []
    client = FakeClient(items, [Unavailable(f"attempt {n}") for n in range(1, ATTEMPTS + 1)])
    with pytest.raises(Unavailable, match=f"attempt {ATTEMPTS}"):
        connect(client, waits)(queries, 4)
    assert len(waits) == ATTEMPTS - 1
    assert sum(waits) == pytest.approx(15.5)


def test_a_refused_request_is_not_repeated(vectors: tuple[FloatArray, FloatArray]) -> None:
    queries, items = vectors
    client = FakeClient(items, [InvalidInput("too large")])
    with pytest.raises(InvalidInput):
        connect(client)(queries, 4)
    assert len(client.asked) == 1
