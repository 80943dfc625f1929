"""Replays of one query set through two arms, on a made-up server with known differences."""

import json

import numpy as np
import pytest

from shardline.bench.ab.replay import WARM_UP, compare, side_of
from shardline.router.client.answers import SearchAnswer
from shardline.router.contract import Coverage
from shardline.shards.core.errors import InvalidInput, Overloaded
from shardline.shards.core.messages import SearchParams

WHOLE = Coverage(shards_asked=1, shards_answered=1, rows_asked=9, rows_answered=9, degraded=())
K = 10
QUERIES = [{"vectors": np.full((1, 4), n, np.float32)} for n in range(200)]
SLOWER_S = 0.002


class Server:
    """nprobe 1 is SLOWER_S faster, lacks the best result, and one more is missing from it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked: list[tuple[bool, int | None]] = []
        self.fails_at: set[int] = set()

    def clock(self) -> float:
        return self.now_s

    def __call__(self, **fields) -> SearchAnswer:
        is_exact = fields.get("exact") is True
        params = fields.get("params") or SearchParams()
        self.asked.append((is_exact, params.nprobe))
        if len(self.asked) in self.fails_at:
            raise Overloaded("too many")
        number, k = int(fields["vectors"][0, 0]), fields.get("k", K)
        # what all requests around one moment have in common, and differs from moment to moment
        self.now_s += 0.003 + 0.002 * np.sin(number)
        ids = np.arange(number * 100, number * 100 + k + 1)
        if params.nprobe == 1 and not is_exact:
            found = np.append(ids[1:k], -1)
        else:
            self.now_s += SLOWER_S
            found = ids[:k]
        scores = np.where(found < 0, -np.inf, -(found % 100)).astype(np.float32)
        return SearchAnswer(
            ids=found[None].astype(np.int64),
            scores=scores[None],
            generation=1,
            model_version="m",
            coverage=WHOLE,
            took_ms=1.0,
            search_ms=1.0,
            request_id="r",
        )


def replayed(server: Server, a: str = "{}", b: str = '{"params": {"nprobe": 1}}', **options):
    sides = side_of(a, "--a"), side_of(b, "--b")
    given = {"judged": 50, "rng": np.random.default_rng(0), "clock": server.clock, **options}
    return compare(server, QUERIES, sides, **given)


def test_a_known_difference_is_found_within_queries() -> None:
    server = Server()
    found = replayed(server)
    assert (found.queries, found.judged, found.failures) == (200, 50, {})
    for estimate in (found.median_difference_ms, found.mean_difference_ms):
        assert estimate.value == pytest.approx(-2.0, abs=1e-6)
        assert estimate.low <= estimate.value <= estimate.high < -1.9
    # between queries latencies differ by twice as much as between arms
    assert found.a.p50_ms.high - found.a.p50_ms.low > 0.2
    assert found.overlap.value == pytest.approx(0.9)
    assert (found.a.recall.value, found.b.recall.value) == pytest.approx((1.0, 0.9))
    assert found.recall_difference.value == pytest.approx(-0.1)
    assert (found.a.short, found.b.short) == (0, 1)


def test_both_arms_are_asked_in_random_order_after_a_warm_up() -> None:
    server = Server()
    replayed(server, judged=0)
    counted = server.asked[2 * WARM_UP :]
    assert len(counted) == 2 * len(QUERIES)
    firsts = [nprobe for _, nprobe in counted[::2]]
    assert 60 < firsts.count(1) < 140
    assert all({a[1], b[1]} == {None, 1} for a, b in zip(counted[::2], counted[1::2], strict=True))


def test_the_exact_answer_is_asked_once_unless_the_arms_want_different_ones() -> None:
    server = Server()
    replayed(server, judged=5)
    assert sum(is_exact for is_exact, _ in server.asked) == 5
    server = Server()
    found = replayed(server, b='{"params": {"nprobe": 1}, "k": 5}', judged=5)
    assert sum(is_exact for is_exact, _ in server.asked) == 10
    assert found.b.recall.value == pytest.approx(0.8)
    assert found.b.short == 1


def test_two_equal_arms_do_not_differ() -> None:
    found = replayed(Server(), b="{}")
    assert found.overlap.value == 1
    assert not found.median_difference_ms.tells and not found.recall_difference.tells


def test_queries_that_fail_are_counted_and_left_out() -> None:
    server = Server()
    server.fails_at = {2 * WARM_UP + 1, 2 * WARM_UP + 10}
    found = replayed(server, judged=0)
    assert (found.queries, found.failures) == (198, {"overloaded": 2})
    assert found.judged == 0 and np.isnan(found.recall_difference.value)
    server = Server()
    server.fails_at = set(range(2 * WARM_UP + 1, 10_000))
    with pytest.raises(Overloaded):
        replayed(server)


def test_settings_are_fields_of_a_search() -> None:
    assert side_of('{"params": {"nprobe": 4}, "k": 5, "return": ["a"]}', "--a") == {
        "params": SearchParams(nprobe=4),
        "k": 5,
        "return_": ["a"],
    }
    for bad in ("{", "[]", '{"nprobe": 4}', '{"vectors": [[1]]}', '{"params": {"probes": 1}}'):
        with pytest.raises(InvalidInput) as caught:
            side_of(bad, "--b")
        assert caught.value.field.startswith("--b")
    json.dumps(side_of("{}", "--a"))
