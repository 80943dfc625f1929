"""A client that goes away takes its request with it.

Watching for that from the start costs a task a request; a search that is over within WATCH_AFTER_S
needs no watching.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive

WATCH_AFTER_S = 0.02


@contextmanager
def ended_by_disconnect(receive: Receive) -> Iterator[None]:
    """Cancels the block, in the task that runs it, once the client has gone. The body must have
    been read: ``receive`` is called for nothing but the disconnect.

    Raises:
        ClientDisconnect: it has gone.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, begin)
    try:
        yield
    except asyncio.CancelledError:
        if not gone or task.uncancel():  # cancelled by somebody else, or by him as well
            raise
        raise ClientDisconnect from None
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
