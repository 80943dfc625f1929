"""Who is searched next: whatever waits as one batch, background searches in pieces behind it."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from shardline.shards.core.messages import SearchOptions, SearchReply, SearchRequest
from shardline.shards.core.schema import Ranked
from shardline.shards.server.handlers import HANDLERS, Work
from shardline.shards.server.search_queue import STARVED_S, BackgroundSearch, SearchQueue

MAX_ROWS = 10
BACKGROUND = SearchOptions(background=True)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def work(number: int, clock: Clock, rows: int = 1, *, background: bool = False) -> Work:
    queries = np.zeros((rows, 2), np.float32)
    request = SearchRequest(queries=queries, k=1, timeout_ms=1000.0)
    if background:
        request.options = BACKGROUND
    handler = HANDLERS[SearchRequest]
    asker: object = None
    return Work(
        asker=asker,  # type: ignore[arg-type]
        request_id=number,
        request=request,
        handler=handler,
        rows=rows,
        arrived_at=clock.now,
        deadline=clock.now + 1,
        reply_bytes=0,
        taken=0,
    )


def numbers(turn: object) -> list[int] | int | None:
    """Of the requests of a batch, or of a background search."""
    if isinstance(turn, BackgroundSearch):
        return turn.work.request_id
    return [each.request_id for each in turn] if isinstance(turn, list) else None


def test_a_background_search_comes_after_whatever_waits_and_goes_on_in_between() -> None:
    clock = Clock()
    waiting = SearchQueue(MAX_ROWS, clock)
    waiting.put(work(1, clock, background=True))
    waiting.put(work(2, clock))
    waiting.put(work(3, clock))
    assert numbers(waiting.next()) == [2, 3]
    search = waiting.next()
    assert isinstance(search, BackgroundSearch)
    assert numbers(search) == 1
    waiting.put(work(4, clock))
    waiting.put_back(search)
    assert numbers(waiting.next()) == [4]
    assert waiting.next() is search


def test_where_others_always_wait_it_gets_a_piece_now_and_then() -> None:
    clock = Clock()
    waiting = SearchQueue(MAX_ROWS, clock)
    waiting.put(work(0, clock, background=True))
    pieces = []
    for number in range(1, 401):
        waiting.put(work(number, clock))
        turn = waiting.next()
        if isinstance(turn, BackgroundSearch):
            pieces.append(clock.now)
            waiting.put_back(turn)
            turn = waiting.next()
        assert numbers(turn) == [number]
        clock.now += 0.01
    assert len(pieces) == pytest.approx(0.01 * 400 / STARVED_S, abs=2)
    assert np.diff(pieces).min() >= STARVED_S


@pytest.mark.parametrize("seed", range(5))
def test_every_request_gets_its_turn_once_and_batches_are_bounded(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    waiting = SearchQueue(MAX_ROWS, clock)
    turns: Counter[int] = Counter()
    left: Counter[int] = Counter()  # pieces of background searches

    def take() -> None:
        turn = waiting.next()
        if isinstance(turn, BackgroundSearch):
            number = turn.work.request_id
            left[number] -= 1
            if left[number]:
                waiting.put_back(turn)
            else:
                turns[number] += 1
            return
        assert isinstance(turn, list)
        assert sum(each.rows for each in turn[:-1]) < MAX_ROWS
        turns.update(each.request_id for each in turn)

    for number in range(300):
        is_background = rng.random() < 0.3
        if is_background:
            left[number] = rng.randint(1, 4)
        waiting.put(work(number, clock, rng.randint(1, 4), background=is_background))
        clock.now += rng.random() * STARVED_S
        if rng.random() < 0.5:
            take()
    while sum(turns.values()) < 300:
        take()
    assert turns == Counter(range(300))


def test_once_stopped_it_gives_what_was_there_before_and_no_background_search() -> None:
    clock = Clock()
    waiting = SearchQueue(MAX_ROWS, clock)
    waiting.put(work(1, clock))
    waiting.put(work(2, clock, background=True))
    waiting.stop()
    waiting.put(work(3, clock))
    assert numbers(waiting.next()) == [1]
    assert waiting.next() is None
    assert waiting.next() is None


def test_pieces_are_put_together() -> None:
    clock, rng = Clock(), np.random.default_rng(0)
    ids, scores = rng.integers(0, 99, (5, 3)), rng.random((5, 3), np.float32)
    search = BackgroundSearch(work(1, clock, 5, background=True))
    for part, seq, matched in [(slice(0, 2), 7, 20), (slice(2, 5), 9, 30)]:
        search.replies.append(
            SearchReply(
                ranked=Ranked(ids[part], scores[part]),
                rows=40 + seq,
                generation=3,
                seq=seq,
                search_ms=0.5,
                matched=matched,
            )
        )
    reply = search.reply(0.25)
    np.testing.assert_array_equal(reply.ranked.ids, ids)
    np.testing.assert_array_equal(reply.ranked.scores, scores)
    # no later writes than all of its rows have
    assert (reply.seq, reply.rows, reply.search_ms, reply.others_share) == (7, 49, 1.0, 0.25)
    assert reply.matched == 20, "of the first ones no more may have matched"
