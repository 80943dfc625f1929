"""Sequence numbers hold across switches: read-your-writes of a client that follows none of them."""

import asyncio
import itertools
import json
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest

from shardline.router.asked_seq import asked_seq
from shardline.router.client.seq import Seq, newer
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.query import SearchAnswer, SeqOrigin
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.router.written import Part, newest
from shardline.shards.core.errors import Behind, InvalidInput
from shardline.shards.core.messages import DeleteRequest, RoutingTable, WriteReply
from tests.fake_shard import SECRET, make_rows, make_table, running_shards

DIM = 8
IDS, VECTORS = make_rows(40, DIM)
CONFIG = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, cache_bytes=0)
QUERY = VECTORS[:1].tolist()


# The rule, against a history of switches that knows everything


@dataclass(frozen=True, slots=True)
class Written:
    """One shard per generation. number: of the write in its generation; at: its place in time."""

    generation: int
    number: int
    version: int  # of the table by which it was written
    at: int


def history(generations: list[int]) -> tuple[list[RoutingTable], list[Written], dict]:
    """A table per generation that goes live, two tables of some, three writes with each table.

    Also what each generation has: a number for every write that was made or brought, by its place
    in time. As the mirror does, all that came before is brought over at a switch, in one write.
    """
    base = make_table((), DIM)
    tables, writes = [], []
    has: dict[int, list[tuple[int, int]]] = {each: [(0, -1)] for each in generations}
    clock, versions = itertools.count(), itertools.count(1)
    for place, generation in enumerate(generations):
        went_live_with: tuple[int, ...] = ()
        if place:  # brought over in one write, which may come twice
            has[generation].append((has[generation][-1][0] + 1, next(clock)))
            went_live_with = (has[generation][-1][0],)
        for _ in range(1 + place % 2):
            version = next(versions)
            changes = {"generation": generation, "version": version, "shards": (None,)}
            tables.append(replace(base, went_live_with=went_live_with, **changes))
            for _ in range(3):
                number, at = has[generation][-1][0] + 1, next(clock)
                has[generation].append((number, at))
                writes.append(Written(generation, number, version, at))
    return tables, writes, has


@pytest.mark.parametrize("generations", [[1], [1, 2], [1, 2, 1], [1, 2, 1, 2, 3], [3, 1, 3]])
def test_what_is_asked_for_has_the_write_or_the_table_is_too_old(generations: list[int]) -> None:
    tables, writes, has = history(generations)
    for table, write in itertools.product(tables, writes):
        origin = SeqOrigin(generation=write.generation, table_version=write.version)
        asked = asked_seq((write.number,), origin, table)
        if asked is None:
            assert write.version > table.version
            assert write.generation != table.generation
            continue
        # the place in time up to which a shard of the table's generation has all that was written
        (least,) = asked
        reached = max(at for number, at in has[table.generation] if number <= least)
        assert reached >= write.at
        if write.generation != table.generation:
            brought = [number for number, _ in has[table.generation]]
            assert least <= max(brought), "no number that the generation never reaches"


def test_numbers_without_an_origin_are_of_the_live_generation() -> None:
    table = replace(make_table((), DIM), shards=(None, None), went_live_with=(3, 3))
    for numbers in ((), (5,), (5, 0)):
        assert asked_seq(numbers, None, table) == numbers
    with pytest.raises(InvalidInput, match="more numbers than the generation has shards") as caught:
        asked_seq((5, 0, 1), None, table)
    assert (caught.value.field, caught.value.got) == ("min_seq", "3")
    assert "min_seq_of" in str(caught.value.hint)


# A router over shards of two generations


async def asked(service: SearchService, seq, generation: int, version: int) -> SearchAnswer:
    origin = {"generation": generation, "table_version": version}
    body = {"vectors": QUERY, "k": 1, "timeout_ms": 300, "min_seq": seq, "min_seq_of": origin}
    query = decode_query(json.dumps(body).encode(), Media.JSON, CONFIG)
    return await service.search(query, arrived_at=asyncio.get_running_loop().time())


async def test_numbers_of_the_generation_before_ask_for_what_was_brought_over() -> None:
    async with (
        running_shards(IDS, VECTORS, 3) as before,
        running_shards(IDS, VECTORS, 2, generation=2) as after,
    ):
        service = SearchService(CONFIG, SECRET, load_encoder=lambda _table: None)
        try:
            await service.apply(make_table(before, DIM, version=7))
            for shard in before:
                shard.seq = 5000
            answer = await asked(service, [5000] * 3, 1, 7)
            assert (answer.generation, answer.table_version) == (1, 7)
            after[0].seq, after[1].seq = 4, 6
            table = make_table(after, DIM, generation=2, version=9, went_live_with=(4, 6))
            await service.apply(table)
            answer = await asked(service, [5000] * 3, 1, 7)
            assert (answer.generation, answer.table_version, answer.seq) == (2, 9, (4, 6))
            assert after[0].requests[-1].options.min_seq == (4, 6)
            after[1].seq = 5  # a replica that has not read all that was brought over
            answer = await asked(service, [5000] * 3, 1, 7)
            assert [each.code for each in answer.coverage.degraded] == ["behind"]
        finally:
            await service.close()


async def test_a_router_that_has_not_heard_of_the_switch_waits_for_it() -> None:
    async with (
        running_shards(IDS, VECTORS, 2) as before,
        running_shards(IDS, VECTORS, 2, generation=2, seq=8) as after,
    ):
        service = SearchService(CONFIG, SECRET, load_encoder=lambda _table: None)
        try:
            await service.apply(make_table(before, DIM, version=7))
            with pytest.raises(Behind, match="not heard of the generation") as caught:
                await asked(service, [8, 8], 2, 9)
            assert caught.value.field == "min_seq_of"
            assert not before[0].requests, "it has none of these writes"
            waiting = asyncio.ensure_future(asked(service, [8, 8], 2, 9))
            await asyncio.sleep(0)
            await service.apply(make_table(after, DIM, generation=2, version=9))
            assert (await waiting).seq == (8, 8)
        finally:
            await service.close()


def test_the_answer_to_a_write_that_crossed_a_switch_asks_for_all_that_was_brought_over() -> None:
    """Its first part was acknowledged by the generation before, for items of any shard."""
    table = make_table((), DIM, generation=2, version=9, went_live_with=(4, 6, 0, 5))
    table = replace(table, shards=(None,) * 4)
    message = DeleteRequest(item_ids=np.array([1]), key="", timeout_ms=0.0)

    def seq(*replies: tuple[int, int, int]) -> tuple[int | None, ...]:
        """replies: of a generation's shard, its number."""
        parts = [Part(shard=shard, message=message) for _, shard, _ in replies]
        given = [WriteReply(generation=of, seq=seq, rows=1, existed=0) for of, _, seq in replies]
        return newest(parts, given, table)

    assert seq((1, 5, 900), (2, 1, 7)) == (4, 7, None, 5)
    assert seq((2, 1, 7), (2, 1, 8)) == (None, 8, None, None)
    table = replace(table, went_live_with=())  # without the writes of the one before
    assert seq((1, 5, 900), (2, 1, 7)) == (None, 7, None, None)


# The clients' side


def test_a_seq_is_a_tuple_that_survives_pickling() -> None:
    seq = Seq([5, None], 2, 9)
    assert seq == (5, None)
    assert seq.origin == {"generation": 2, "table_version": 9}
    again = pickle.loads(pickle.dumps(seq))
    assert (again, again.origin) == (seq, seq.origin)
    assert Seq([5]).origin is Seq([5], 2).origin is None


def test_newer_asks_for_both() -> None:
    assert newer(Seq([5, None], 1, 7), Seq([3, 2, 1], 1, 8)) == (5, 2, 1)
    assert newer(Seq([5], 1, 8), Seq([6], 1, 7)).origin == {"generation": 1, "table_version": 8}
    one, other = Seq([5000], 1, 7), Seq([3, 4], 2, 9)
    assert newer(one, other) is newer(other, one) is other
    assert newer(Seq([5], 1), Seq([6], 1)).origin is None
