"""Exact searches of a shard: as brute force over what it stores, and they hold up nobody."""

import os
import threading
import time
from collections.abc import Sequence

import faiss
import numpy as np
import pytest

from shardline.bench.shard_link import ShardLink
from shardline.bench.vectors import manifold
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ShardlineError,
)
from shardline.shards.core.messages import (
    ErrorReply,
    SearchOptions,
    SearchReply,
    SearchRequest,
)
from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.index import exact_scan
from shardline.shards.index.exact_scan import of_halves
from shardline.shards.live.state import ShardState, apply
from shardline.shards.server import exact_searches, shard_server
from shardline.shards.server.exact_searches import (
    LONGEST_PAUSE_S,
    MAX_EXACT,
    PAUSE_PER_RUN,
    PAUSE_PER_WAIT,
    SWITCHES_S,
    Pauses,
)
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from tests.engine import build_main, flat_shard
from tests.live_model import Model
from tests.reference import assert_answer_order, assert_same_answers, brute_force
from tests.unit.test_live_state import random_records
from tests.unit.test_ties import CORPORA, first_of_all
from tests.unit.test_ties import IDS as TIED_IDS
from tests.unit.test_ties import QUERIES as TIED_QUERIES

ROWS, DIM = 400, 8
SECRET = b"a secret of tests"
# those with exact vectors, or copies of them; then those that store codes alone
STORING = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 4, "nprobe": 1},
    "hnsw": {"kind": "hnsw", "ef_search": 1},
    "pq-rerank": {"kind": "pq", "m": 4, "nbits": 6, "rerank": "fp32"},
    "ivfpq-rerank": {"kind": "ivfpq", "nlist": 4, "m": 4, "nbits": 6, "rerank": "fp32"},
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 4, "m": 4, "rerank": "fp32"},
    "pca-rerank": {"kind": "sq8", "pca": 4, "rerank": "fp32"},
}
CODES = {
    "pq": {"kind": "pq", "m": 4, "nbits": 6, "rerank": "none"},
    "ivfpq": {"kind": "ivfpq", "nlist": 4, "m": 4, "nbits": 6, "rerank": "none"},
    "sq8": {"kind": "sq8", "rerank": "none"},
    "fp16": {"kind": "ivfpq-fs", "nlist": 4, "m": 4, "rerank": "fp16"},
    "pca": {"kind": "flat", "pca": 4, "rerank": "none"},
    "ivf-pca": {"kind": "ivf", "nlist": 4, "pca": 4, "rerank": "none"},
    "hnsw-pca": {"kind": "hnsw", "pca": 4, "rerank": "none"},
}
IDS = np.sort(np.random.default_rng(2).choice(10**6, ROWS, replace=False)).astype(np.int64)
VECTORS = manifold(ROWS, DIM, 4, seed=1)
QUERIES = manifold(4, DIM, 4, seed=1, stream=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(exact_scan, "BLOCK_BYTES", 4 * DIM * 60)


def written(fields: dict, metric: Metric) -> ShardState:
    """A state with writes in it: rows hidden, replaced and new."""
    state = ShardState.of(build_main(VECTORS, metric=metric, **fields), IDS)
    state, _ = apply(state, random_records(np.random.default_rng(5), 40))
    assert state.hidden and state.delta.num_live
    return state


def exactly(state: ShardState, queries: np.ndarray, k: int) -> Ranked:
    return state.search_exactly(queries, k, lambda: None)


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", STORING)
def test_kinds_with_exact_vectors_equal_brute_force(small_blocks, kind, metric) -> None:
    state, model = written(STORING[kind], metric), Model(IDS, VECTORS)
    for record in random_records(np.random.default_rng(5), 40):
        model.apply(record)
    for queries, k in ((QUERIES, 30), (QUERIES[:1], 1), (QUERIES[:2], len(model.items) + 5)):
        found = exactly(state, queries, k)
        assert_answer_order(found)
        assert_same_answers(found, model.answer(queries, k, metric))


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", CODES)
def test_kinds_with_codes_alone_are_exact_over_what_the_codes_stand_for(
    small_blocks, kind, metric
) -> None:
    state = written(CODES[kind], metric)
    ids = np.union1d(IDS, state.delta.ids)
    items, vectors = state.fetch(ids)
    assert len(items) == state.rows
    found = exactly(state, QUERIES, len(items))
    assert_answer_order(found)
    expected = brute_force(QUERIES, vectors, items, len(items), metric)
    if "pca" in CODES[kind] and metric is Metric.L2:
        # distances within the subspace: of one query's items that were not written all are
        # smaller by the same number, so that their order is compared
        is_main = ~np.isin(expected.ids, state.delta.ids)
        for at in range(len(QUERIES)):
            order = expected.ids[at][is_main[at]]
            mine = found.ids[at][~np.isin(found.ids[at], state.delta.ids)]
            np.testing.assert_array_equal(mine, order)
    else:
        assert_same_answers(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2])
@pytest.mark.parametrize("corpus", CORPORA)
def test_ties_at_the_cut_are_cut_by_id(small_blocks, corpus, metric) -> None:
    order = np.argsort(TIED_IDS)
    main = build_main(CORPORA[corpus][order], metric=metric, kind="flat")
    state = ShardState.of(main, TIED_IDS[order])
    expected = first_of_all(CORPORA[corpus], metric)
    for part in (slice(0, 25), slice(0, 1)):
        found = exactly(state, TIED_QUERIES[part], 50)
        np.testing.assert_array_equal(found.ids, expected.ids[part])
        np.testing.assert_array_equal(found.scores, expected.scores[part])


def test_what_look_raises_ends_it_between_two_blocks(small_blocks) -> None:
    state = ShardState.of(build_main(VECTORS, kind="flat"), IDS)
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise DeadlineExceeded("late")

    with pytest.raises(DeadlineExceeded, match="late"):
        state.search_exactly(QUERIES, 5, look)
    with pytest.raises(InvalidInput, match="wrong dimension"):
        state.search_exactly(QUERIES[:, :4].copy(), 5, lambda: None)


def request(exact: bool = True, timeout_ms: float = 10_000.0, rows: int = 1) -> SearchRequest:
    return SearchRequest(
        queries=np.repeat(QUERIES[:1], rows, axis=0),
        k=5,
        timeout_ms=timeout_ms,
        options=SearchOptions(exact=exact),
    )


class Gated(Shard):
    """Its exact searches wait until ``opened``; notes the priority of their thread."""

    def __init__(self, inner: Shard) -> None:
        super().__init__(shard=inner.shard, generation=inner.generation, state=inner.state)
        self.began, self.opened = threading.Semaphore(0), threading.Event()
        self.niceness: list[int] = []

    def search_exactly(self, request, look):
        self.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        self.began.release()
        while not self.opened.wait(0.005):
            try:
                look()
            except DeadlineExceeded as error:
                return error
        return super().search_exactly(request, look)


@pytest.fixture
def gated():
    shard = Gated(flat_shard(VECTORS, IDS))
    server = ShardServer(shard, secret=SECRET)
    address = server.bind()
    server.start(1)
    try:
        with ShardLink(address, SECRET, timeout_s=5) as link:
            yield shard, server, link
    finally:
        server.stop()
    assert not any(each.name == "shard-exact" for each in threading.enumerate())


def test_searches_go_on_beside_an_exact_one_and_few_may_wait(gated) -> None:
    shard, server, link = gated
    for number in range(MAX_EXACT):
        link.send(number, request())
    assert shard.began.acquire(timeout=5)
    link.send(100, request())
    number, refused = link.receive(5)
    assert (number, type(refused)) == (100, ErrorReply)
    assert refused.code == Overloaded.code
    link.send(101, request(exact=False))
    number, reply = link.receive(5)
    assert number == 101
    assert_same_answers(reply.ranked, brute_force(QUERIES[:1], VECTORS, IDS, 5, Metric.DOT))
    assert server.queue_depth == MAX_EXACT
    shard.opened.set()
    answered = dict(link.receive(5) for _ in range(MAX_EXACT))
    assert set(answered) == set(range(MAX_EXACT))
    for each in answered.values():
        assert isinstance(each, SearchReply)
        np.testing.assert_array_equal(each.ranked.ids, reply.ranked.ids)
    assert (server.queue_depth, server.stats.overloaded) == (0, 1)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    # a nice thread that loses its core while it has the GIL stops the whole shard
    assert shard.niceness == [own] * MAX_EXACT
    assert isinstance(link.ask(request(), timeout_s=5), SearchReply), "there is room again"


@pytest.mark.parametrize(
    ("ran_s", "waited_s", "pause_s"),
    [
        (0.004, 0.0, 0.0),
        (3.0, SWITCHES_S / 2, 0.0),
        (0.004, 0.002, PAUSE_PER_WAIT * 0.002),
        (0.004, 0.1, PAUSE_PER_RUN * 0.004),
        (0.2, 0.3, LONGEST_PAUSE_S),
    ],
)
def test_an_exact_search_pauses_where_others_want_the_core(ran_s, waited_s, pause_s) -> None:
    pauses = Pauses(100.0, 7.0)
    pauses.over(200.0, 8.0)  # what was before does not count
    assert pauses.due_s(200.0 + ran_s + waited_s, 8.0 + ran_s) == pytest.approx(pause_s)
    assert pauses.due_s(200.0 + ran_s + waited_s, 8.0 + ran_s) == 0.0, "each wait once"


def test_a_pause_after_each_block_of_an_exact_search(monkeypatch) -> None:
    slept: list[float] = []
    sleep = time.sleep

    def noted(seconds: float) -> None:
        is_exact = threading.current_thread().name == "shard-exact"
        slept.append(seconds) if is_exact else sleep(seconds)

    monkeypatch.setattr(exact_searches.time, "sleep", noted)
    monkeypatch.setattr(Pauses, "due_s", lambda *_: 0.05)
    monkeypatch.setattr(exact_scan, "BLOCK_BYTES", 4 * DIM * (ROWS // 8))
    server = ShardServer(flat_shard(VECTORS, IDS), secret=SECRET)
    address = server.bind()
    server.start(1)
    try:
        with ShardLink(address, SECRET, timeout_s=5) as link:
            assert isinstance(link.ask(request(), timeout_s=5), SearchReply)
    finally:
        server.stop()
    assert slept == [0.05] * (8 + 1), "before each of eight blocks, and once at the end"


def test_many_queries_wait_for_nobody_else(gated, monkeypatch) -> None:
    monkeypatch.setattr(exact_searches, "MAX_EXACT_ROWS", 8)
    shard, _server, link = gated
    link.send(1, request(rows=20))  # alone it may exceed the bound
    link.send(2, request())
    assert link.receive(5)[0] == 2
    shard.opened.set()
    assert link.receive(5)[1].ranked.ids.shape == (20, 5)


def test_an_exact_search_ends_with_its_time_and_says_so(gated) -> None:
    _shard, server, link = gated
    reply = link.ask(request(timeout_ms=40.0), timeout_s=5)
    assert (type(reply), reply.code) == (ErrorReply, DeadlineExceeded.code)
    assert server.stats.expired == 1


def test_a_router_hears_the_shard_during_an_exact_search(gated, monkeypatch) -> None:
    """Else it would take a long one for a process that hangs."""
    monkeypatch.setattr(shard_server, "KEEP_ALIVE_S", 0.01)
    shard, server, link = gated
    kept = []
    link.send(1, request())
    assert shard.began.acquire(timeout=5)
    (session,) = server.sessions
    monkeypatch.setattr(session, "keep_alive", lambda: kept.append(1))
    until = time.monotonic() + 5
    while len(kept) < 3 and time.monotonic() < until:
        shard.began.acquire(timeout=0.01)
    assert len(kept) >= 3
    shard.opened.set()


def test_a_bug_costs_its_answer_only(gated, monkeypatch) -> None:
    shard, server, link = gated
    shard.opened.set()
    with monkeypatch.context() as patch:
        patch.setattr(shard, "search_exactly", lambda *_: 1 / 0)
        assert link.ask(request(), timeout_s=5).code == ShardlineError.code
    assert server.stats.failed == 1
    assert isinstance(link.ask(request(), timeout_s=5), SearchReply)


def test_a_server_stops_in_the_middle_of_one(gated) -> None:
    shard, server, link = gated
    link.send(1, request())
    assert shard.began.acquire(timeout=5)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 5


def test_half_precision_is_decoded_as_numpy_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    halves = every[np.isfinite(every.view(np.float16))]
    decoded = of_halves(halves.view(np.uint8).reshape(-1, 2))
    expected = halves.view(np.float16).astype(np.float32)[:, None]
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


@pytest.mark.parametrize("rows", [[0], [3, 4, 5, 6], [0, 2, 4, 6, 8], [0, 499], range(500)])
def test_stored_halves_are_those_of_faiss(rows: Sequence[int]) -> None:
    vectors = np.random.default_rng(1).standard_normal((500, 16)).astype(np.float32)
    vectors[7] = 0.0
    vectors[8] *= 1e-7
    main = build_main(vectors, metric=Metric.DOT, kind="ivfpq-fs", nlist=8, nprobe=8)
    chosen = np.array(rows, np.int64)
    assert main._stored._are_halves
    np.testing.assert_array_equal(main._stored.of(chosen), main.reconstruct(chosen))
