"""``shardline batch --url``: complete answers only, of one generation, at a pace that yields."""

import random
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.live_batch import WAITS_S, LiveCluster, LiveSearch
from shardline.cluster.batch.live_columns import AnsweredColumns
from shardline.cluster.batch.pace import (
    FULL_IN_FLIGHT,
    LEAST_DUTY,
    MAX_PAUSE_S,
    SHARED_DUTY,
    SHARED_QUERIES,
    SHARED_RESULTS,
    SIZES,
    Pace,
)
from shardline.cluster.batch.queries import Queries
from shardline.cluster.cli import cli
from shardline.router.client.answers import SearchAnswer
from shardline.router.client.sync_client import Client as SyncClient
from shardline.router.contract import Coverage, PayloadTooLarge
from shardline.router.limits import MAX_RETURNED_VALUES
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import (
    DataError,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.schema import Metric
from tests.batch_store import read_parts, write_queries
from tests.fake_shard import make_rows
from tests.live_router import DIM, NUM_ROWS, LiveRouter, running_router
from tests.reference import brute_force

K = 7


@pytest.fixture(scope="module")
def router() -> Iterator[LiveRouter]:
    with running_router(RouterConfig()) as found:
        yield found


@pytest.fixture(scope="module")
def narrow() -> Iterator[LiveRouter]:
    """With limits below those that a job begins with."""
    config = RouterConfig(
        max_k=50, default_k=50, max_batch=3, default_timeout_ms=4000, max_timeout_ms=5000
    )
    with running_router(config) as found:
        yield found


def batch(router: LiveRouter, tmp_path: Path, *arguments: object) -> str:
    words = ["--store", str(tmp_path / "store"), "batch", "--url", router.url]
    done = CliRunner().invoke(cli, [*words, *map(str, arguments)], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_a_live_cluster_gives_what_brute_force_gives(router: LiveRouter, tmp_path: Path) -> None:
    ids, vectors = make_rows(NUM_ROWS, DIM)
    queries = vectors[::2]
    path = write_queries(tmp_path / "q.parquet", queries)
    out = tmp_path / "out"
    options = ("--queries", path, "--out", out, "-k", K, "--block-rows", 12)
    batch(router, tmp_path, *options)
    expected = brute_force(queries, vectors, ids, K, Metric.COSINE)
    assert read_parts(out)["ids"].to_pylist() == expected.ids.tolist()
    assert '"resumed_parts": 3' in batch(router, tmp_path, *options, "--json")


def test_a_filter_is_the_clusters_to_evaluate(router: LiveRouter, tmp_path: Path) -> None:
    ids, vectors = make_rows(NUM_ROWS, DIM)
    path = write_queries(tmp_path / "q.parquet", vectors[:9])
    options = ("--queries", path, "--out", tmp_path / "out", "-k", K)
    with pytest.raises(InvalidInput, match=r"filter.price: no such column"):
        batch(router, tmp_path, *options, "--filter", '{"price": 3}')
    batch(router, tmp_path, *options, "--filter", '{"item_id": {"$gte": 40}}')
    expected = brute_force(vectors[:9], vectors[40:], ids[40:], K, Metric.COSINE)
    found = read_parts(tmp_path / "out")["ids"].to_pylist()
    assert found == [[item for item in row if item >= 0] for row in expected.ids.tolist()]


def test_decimals_of_answers_are_those_of_the_files() -> None:
    """Some are texts: floats do not hold them."""
    kind, text = pa.decimal128(38, 20), "0.12345678901234567890"
    answer: Any = SimpleNamespace(
        ids=np.array([[1, 2, 3, -1]]), attributes={"price": [[0.1, text, None, None]]}
    )
    wanted = Wanted(k=4, attributes=("price",), original_ids=False)
    (column,) = AnsweredColumns([answer], wanted, {"price": kind}).of(np.array([1, 2, 3])).values()
    assert column.type == kind
    assert column.to_pylist() == [Decimal("0.1"), Decimal(text), None]


def test_smaller_limits_of_a_cluster_are_kept(narrow: LiveRouter) -> None:
    """It refuses a time limit above 5 s and more than 3 queries per request."""
    ids, vectors = make_rows(NUM_ROWS, DIM)
    with SyncClient(narrow.url) as client:
        search = LiveSearch(
            client=client,
            cluster=LiveCluster.of(client.status()),
            wanted=Wanted(k=K),
            types={},
            wait=lambda seconds: None,
        )
        search.pace.took(1.0, 0.0)
        assert search.pace.size == SIZES[-1]
        table = answered(search, Queries(ids=pa.array(ids), vectors=vectors))
    expected = brute_force(vectors, vectors, ids, K, Metric.COSINE)
    assert table["ids"].to_pylist() == expected.ids.tolist()
    assert (search.pace.size, search.timeout_ms) == (2, None)


def test_features_are_encoded_by_the_cluster(router: LiveRouter, tmp_path: Path) -> None:
    pq.write_table(pa.table({"slope": [0.5, 0.25], "id": ["a", "b"]}), tmp_path / "q.parquet")
    out = tmp_path / "out"
    batch(router, tmp_path, "--queries", tmp_path / "q.parquet", "--features", "--out", out)
    table = read_parts(out)
    assert table["query_id"].to_pylist() == ["a", "b"]
    assert [len(each) for each in table["ids"].to_pylist()] == [NUM_ROWS] * 2


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (("-k", 51), InvalidInput, "k.*1 to 50"),
        (("--return", "title"), NotFound, "--return and --original-ids needs"),
        (("--generation", 3), InvalidInput, "--live"),
    ],
)
def test_what_a_cluster_refuses_is_said_first(
    narrow: LiveRouter, tmp_path: Path, options: tuple[Any, ...], kind: Any, said: str
) -> None:
    path = write_queries(tmp_path / "q.parquet", make_rows(NUM_ROWS, DIM)[1][:3])
    arguments = ("--queries", path, "--out", tmp_path / "out", *options)
    with pytest.raises(kind, match=said):
        batch(narrow, tmp_path, *arguments)
    assert not (tmp_path / "out").exists()


def test_vectors_of_another_dimension(router: LiveRouter, tmp_path: Path) -> None:
    path = write_queries(tmp_path / "q.parquet", np.ones((3, 5), np.float32))
    with pytest.raises(DataError, match=r"embedding.*vectors of 8 numbers"):
        batch(router, tmp_path, "--queries", path, "--out", tmp_path / "out")


class Client:
    """Gives answers and errors in order, the last one for ever. Each query finds the number that
    its vector is made of."""

    def __init__(self, *outcomes: Any, others_share: float = 0.125) -> None:
        self.outcomes = list(outcomes)
        self.others_share = others_share
        self.asked: list[int] = []
        self.lock = threading.Lock()

    def search(self, **fields: Any) -> SearchAnswer:
        assert fields["background"] is True
        with self.lock:
            self.asked.append(len(fields["vectors"]))
            outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        count, k = len(fields["vectors"]), fields["k"]
        return SearchAnswer(
            ids=np.repeat(fields["vectors"][:, :1].astype(np.int64), k, axis=1),
            scores=np.zeros((count, fields["k"]), np.float32),
            generation=outcome,
            model_version="m1",
            coverage=Coverage(
                rows_asked=1, rows_answered=1, shards_asked=1, shards_answered=1, degraded=()
            ),
            took_ms=1.0,
            search_ms=1.0,
            request_id="r",
            others_share=self.others_share,
        )


def search_of(client: Client, waited: list[float]) -> LiveSearch:
    cluster = LiveCluster(generation=7, model_version="m1", dim=DIM, metric=Metric.DOT)
    return LiveSearch(
        client=client,  # type: ignore[arg-type]
        cluster=cluster,
        wanted=Wanted(k=1),
        types={},
        clock=iter(np.arange(1e6)).__next__,
        wait=waited.append,
    )


def answered(search: LiveSearch, queries: Queries) -> pa.Table:
    return search.table(queries, search.answers(queries))


def queries(count: int) -> Queries:
    numbers = np.arange(count, dtype=np.float32)
    return Queries(ids=pa.array(range(count)), vectors=np.repeat(numbers[:, None], DIM, axis=1))


def test_what_is_unavailable_is_asked_again() -> None:
    waited: list[float] = []
    client = Client(Unavailable("one shard is away"), Overloaded("busy"), 7)
    assert answered(search_of(client, waited), queries(2)).num_rows == 2
    assert waited[:2] == [0.5, 1]


def test_people_hear_of_an_interruption_once() -> None:
    lines: list[str] = []
    search = search_of(Client(Unavailable("a shard is away"), Overloaded("busy"), 7), [])
    search.note = lines.append
    answered(search, queries(3))
    assert lines == ["no complete answer, asking again: a shard is away", "answered again"]


def test_what_stays_unavailable_ends_the_job_which_can_go_on() -> None:
    gone = Client(Unavailable("for good"))
    with pytest.raises(Unavailable, match=r"61.5 s; got for good; .*the same command goes on"):
        answered(search_of(gone, []), queries(2))
    assert len(gone.asked) == len(WAITS_S) + 1


def found(table: pa.Table) -> list[int]:
    return [ids[0] for ids in table["ids"].to_pylist()]


def test_a_request_that_failed_is_cut_anew() -> None:
    client = Client(DeadlineExceeded("too slow"), 7)
    search = search_of(client, [])
    search.pace.took(0.001, 0.0)
    assert found(answered(search, queries(40))) == list(range(40))
    assert client.asked == [40, 16, 16, 8]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_in_order_whatever_fails_or_is_too_large(seed: int) -> None:
    """With several requests in flight, as beside nobody."""
    rng = random.Random(seed)
    outcomes: list[Any] = [
        rng.choice([7, 7, 7, Overloaded("busy"), PayloadTooLarge("too large")]) for _ in range(60)
    ]
    client = Client(*outcomes, 7, others_share=0.0)
    search = search_of(client, [])
    search.clock = lambda: 0.0
    count = rng.randint(300, 900)
    try:
        assert found(answered(search, queries(count))) == list(range(count))
    except PayloadTooLarge:  # of a single query
        assert min(client.asked) == 1


@pytest.mark.parametrize(
    "refusal", [InvalidInput("too much", field="return"), PayloadTooLarge("too large")]
)
def test_a_size_that_was_refused_is_not_asked_again(refusal: Exception) -> None:
    client = Client(refusal, 7, others_share=0.0)
    search = search_of(client, [])
    assert answered(search, queries(130)).num_rows == 130
    assert client.asked[:2] == [16, 8]
    assert max(client.asked[1:]) == 8
    assert search.pace.size == 8
    with pytest.raises(type(refusal)):
        answered(search_of(Client(refusal), []), queries(3))


def test_what_smaller_requests_do_not_cure_is_raised() -> None:
    with pytest.raises(InvalidInput, match="k"):
        answered(search_of(Client(InvalidInput("out of range", field="k")), []), queries(3))


@pytest.mark.parametrize(("k", "attributes", "size"), [(1000, 5, 32), (2048, 64, 2), (100, 0, 64)])
def test_requests_stay_below_what_an_answer_may_bring(k: int, attributes: int, size: int) -> None:
    wanted = Wanted(k=k, attributes=tuple(f"a{number}" for number in range(attributes)))
    client, cluster = Client(7), search_of(Client(7), []).cluster
    search = LiveSearch(client=client, cluster=cluster, wanted=wanted, types={})  # type: ignore[arg-type]
    search.pace.took(0.001, 0.0)
    assert search.pace.size == size
    assert size * k * attributes <= MAX_RETURNED_VALUES


def test_another_generation_ends_the_job() -> None:
    with pytest.raises(VersionMismatch, match=r"generation 7.*generation 8"):
        answered(search_of(Client(7, 7, 8), []), queries(40))


def test_alone_a_job_has_several_large_requests_in_flight_and_no_pauses() -> None:
    waited: list[float] = []
    client = Client(7, others_share=0.0)
    search = search_of(client, waited)
    assert found(answered(search, queries(600))) == list(range(600))
    assert client.asked[0] == SHARED_QUERIES
    assert client.asked[1:-1] == [SIZES[-1]] * (len(client.asked) - 2)
    assert sum(waited) == 0
    assert search.pace.in_flight == FULL_IN_FLIGHT


def test_beside_others_it_has_one_small_request_in_flight_and_pauses() -> None:
    waited: list[float] = []
    client = Client(7, others_share=0.25)
    assert answered(search_of(client, waited), queries(64)).num_rows == 64
    assert client.asked == [SHARED_QUERIES] * 4
    # a request takes a second of this clock, and is under way in a share of the time that is left
    assert waited == pytest.approx([min(MAX_PAUSE_S, 1 / (SHARED_DUTY * 0.75) - 1)] * 4)


def test_the_pace_follows_what_the_others_do() -> None:
    pace = Pace(k=100)
    assert (pace.size, pace.in_flight) == (SHARED_QUERIES, 1), "nothing is known yet"
    for share, size, in_flight, duty in [
        (0.0, SIZES[-1], FULL_IN_FLIGHT, 1.0),
        (1e-9, SHARED_QUERIES, 1, SHARED_DUTY),
        (0.5, SHARED_QUERIES, 1, SHARED_DUTY / 2),
        (1.0, SHARED_QUERIES, 1, LEAST_DUTY),
        (0.0, SIZES[-1], FULL_IN_FLIGHT, 1.0),
    ]:
        pause_s = pace.took(0.01, share)
        assert (pace.size, pace.in_flight) == (size, in_flight)
        assert pause_s == pytest.approx(0.01 / duty - 0.01)
    assert pace.took(60.0, 0.5) == MAX_PAUSE_S


@pytest.mark.parametrize(("k", "size"), [(10, 16), (100, 16), (300, 4), (2048, 1), (5000, 1)])
def test_beside_others_requests_have_few_results(k: int, size: int) -> None:
    pace = Pace(k)
    assert pace.size == size
    assert size == 1 or size * k <= SHARED_RESULTS


def test_after_a_refusal_it_is_as_slow_as_beside_others() -> None:
    pace = Pace(k=100)
    pace.took(0.001, 0.0)
    pace.refused()
    assert (pace.size, pace.in_flight) == (SHARED_QUERIES, 1)
    pace.too_large(4)
    pace.took(0.001, 0.0)
    assert (pace.size, pace.in_flight) == (2, FULL_IN_FLIGHT)
