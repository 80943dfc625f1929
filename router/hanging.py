"""Work that may hang for ever, as reading a file on a share that has gone away does.

It runs in a thread of its own that nobody waits for at the end: the threads of
``asyncio.to_thread`` are joined when the process stops, and there are only so many of them.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def start(work: Callable[[], T], name: str) -> "asyncio.Future[T]":
    """Begins the work; the future of what it returns or raises. Cancelling it stops nothing."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is None:
            outcome.set_result(result)  # type: ignore[arg-type]  # T may allow None
        else:
            outcome.set_exception(error)
            outcome.exception()  # marks it as seen: whoever waited may have given up

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  handed on to whoever waits
            failed = error
        with suppress(RuntimeError):  # the loop has been closed meanwhile: nobody waits
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome
