"""Writes of one connection that wait their turn, and what a shard counts for them."""

import asyncio

import numpy as np
import pytest

from shardline.router.fanout import write_room as write_room_module
from shardline.router.fanout.write_room import WriteRoom, bytes_of
from shardline.shards.core.messages import WRITE_ROOM_BYTES, DeleteRequest, UpsertRequest
from shardline.shards.server.handlers import WRITE_REPLY_BYTES
from shardline.shards.wire.frames import encode_frame
from tests.manual_clock import ManualClock

HALF = WRITE_ROOM_BYTES // 2


async def entering(room: WriteRoom, size: int, clock: ManualClock, deadline: float):
    task = asyncio.create_task(room.enter(size, clock, deadline))
    await asyncio.sleep(0)
    return task


async def test_writes_enter_in_the_order_they_came_and_one_of_any_size_fits_alone() -> None:
    room, clock = WriteRoom(), ManualClock()
    later = clock.time() + 10
    assert await room.enter(3 * WRITE_ROOM_BYTES, clock, later)
    first = await entering(room, HALF, clock, later)
    large = await entering(room, 2 * WRITE_ROOM_BYTES, clock, later)
    last = await entering(room, 1, clock, later)
    assert not any(task.done() for task in (first, large, last))
    room.leave(3 * WRITE_ROOM_BYTES)
    assert await first
    await asyncio.sleep(0)
    assert not large.done()
    assert not last.done(), "it would overtake"
    room.leave(HALF)
    assert await large
    assert not last.done()
    room.leave(2 * WRITE_ROOM_BYTES)
    assert await last
    room.leave(1)
    assert room._taken == 0
    assert not room._waiting


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_one_that_gives_up_keeps_nobody_waiting(is_cancelled) -> None:
    room, clock = WriteRoom(), ManualClock()
    assert await room.enter(HALF, clock, 1e9)
    large = await entering(room, WRITE_ROOM_BYTES, clock, clock.time() + 1)
    small = await entering(room, HALF, clock, clock.time() + 10)
    assert not small.done()
    if is_cancelled:
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
    else:
        await clock.advance(1.0)
        assert not await large
    assert await small
    assert room._taken == 2 * HALF


async def test_one_that_is_cancelled_as_its_turn_comes_gives_it_back() -> None:
    room, clock = WriteRoom(), ManualClock()
    assert await room.enter(WRITE_ROOM_BYTES, clock, 1e9)
    task = await entering(room, WRITE_ROOM_BYTES, clock, 1e9)
    room.leave(WRITE_ROOM_BYTES)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert room._taken == 0


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("attributes", [b"", b"x" * 70_000])
def test_no_less_is_counted_than_by_the_shard(rows, attributes) -> None:
    ids, key, vectors = np.arange(rows), "k" * 32, np.zeros((rows, 16), np.float32)
    for message in (
        DeleteRequest(item_ids=ids, key=key, timeout_ms=1e3),
        UpsertRequest(
            item_ids=ids, vectors=vectors, attributes=attributes, key=key, timeout_ms=1e3
        ),
    ):
        counted = len(encode_frame(1, message)) + WRITE_REPLY_BYTES
        assert counted <= bytes_of(message) <= counted + write_room_module.OVERHEAD_BYTES
