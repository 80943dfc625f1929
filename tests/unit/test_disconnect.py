"""A client that goes away ends its request, and no other."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect

from shardline.router.contract import BodyTimeout
from shardline.router.http import disconnect
from shardline.router.http.disconnect import ended_by_client


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 0.0)


async def never():
    await asyncio.Event().wait()


async def gone():
    return {"type": "http.disconnect"}


def no_task_is_left():
    return asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_block_ends_when_the_client_goes():
    with pytest.raises(ClientDisconnect), ended_by_client(gone):
        await never()
    assert asyncio.current_task().cancelling() == 0
    await asyncio.sleep(0)
    assert no_task_is_left()


async def test_what_is_left_of_the_body_is_no_disconnect():
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        return messages.pop() if messages else await gone()

    with pytest.raises(ClientDisconnect), ended_by_client(receive):
        await never()
    assert messages == []


async def test_a_block_that_ends_first_is_left_alone():
    waiting = asyncio.Event()

    async def receive():
        waiting.set()
        await never()

    with ended_by_client(receive):
        await waiting.wait()
    await asyncio.sleep(0)
    assert no_task_is_left()


async def test_a_short_block_is_not_watched(monkeypatch):
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 60.0)

    with ended_by_client(gone):
        await asyncio.sleep(0)


async def test_a_cancellation_from_elsewhere_stays_one():
    async def work():
        with ended_by_client(never):
            await never()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_beside_the_disconnect_stays_one():
    async def work():
        with ended_by_client(gone):
            await never()

    task = asyncio.create_task(work())
    while not task.cancelling():  # until the watcher has seen that the client is gone
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_block_passes():
    with pytest.raises(KeyError), ended_by_client(never):
        raise KeyError


async def test_a_body_that_is_late_ends_the_block():
    with (
        pytest.raises(BodyTimeout, match="within 5 ms"),
        ended_by_client(gone, body_timeout_ms=5),
    ):
        await never()
    assert asyncio.current_task().cancelling() == 0


@pytest.mark.parametrize("looks", [0, 1])
async def test_once_the_body_is_read_only_the_client_is_watched(looks):
    """Whether it was there at the first look, or came after it."""

    with (
        pytest.raises(ClientDisconnect),
        ended_by_client(gone, body_timeout_ms=60_000) as client,
    ):
        while client._looked < looks:
            await asyncio.sleep(0)
        client.body_is_read()
        await never()
    await asyncio.sleep(0)
    assert no_task_is_left()


async def test_a_pause_lasts_until_the_body_is_read():
    with pytest.raises(ClientDisconnect), ended_by_client(gone, body_timeout_ms=1) as client:
        client.pause()
        await asyncio.sleep(0.01)  # longer than the body may take, and the client has gone
        assert asyncio.current_task().cancelling() == 0
        client.body_is_read()
        await never()
