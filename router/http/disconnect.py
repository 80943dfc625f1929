"""A request that its client ends: by going away, or by not sending the whole body in time.

Watching for a client that goes costs a task a request; a search that is over within WATCH_AFTER_S
needs no watching. Nor does it need a look at its body: so one timer does for both.
"""

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from shardline.router.contract import BodyTimeout

WATCH_AFTER_S = 0.02


class ended_by_client:  # noqa: N801  reads as what it does, like contextlib's own
    """Cancels the block, in the task that runs it, once the client has gone or its body is late.

    With ``body_timeout_ms`` the block reads the body, and calls ``body_is_read`` after that;
    without, the body has been read. From then on ``receive`` is called for the disconnect only.

    Raises:
        ClientDisconnect: the client has gone.
        BodyTimeout: the body was not read in time; never before WATCH_AFTER_S.
    """

    __slots__ = ("_body_timeout_ms", "_error", "_looked", "_receive", "_task", "_timer", "_watcher")

    def __init__(self, receive: Receive, *, body_timeout_ms: float | None = None) -> None:
        self._receive = receive
        self._body_timeout_ms = body_timeout_ms
        self._looked = False
        self._watcher: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "ended_by_client":
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._look_after(WATCH_AFTER_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        # uncancel counts who else has cancelled the task: theirs must stay a cancellation
        if self._error is not None and kind is asyncio.CancelledError and not self._task.uncancel():
            raise self._error from None

    def pause(self) -> None:
        """Nothing ends the block from here to ``body_is_read``."""
        self._timer.cancel()
        self._looked = True

    def body_is_read(self) -> None:
        self._body_timeout_ms = None
        if self._looked:  # so that the timer is the one of the body, or there is none
            self._timer.cancel()
            self._look_after(WATCH_AFTER_S)

    def _look_after(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        if self._body_timeout_ms is None:
            self._watcher = asyncio.create_task(self._watch())
        elif not self._looked:
            self._looked = True
            self._look_after(max(0.0, self._body_timeout_ms / 1000 - WATCH_AFTER_S))
        else:
            expected = f"within {self._body_timeout_ms:g} ms"
            self._end(
                BodyTimeout("the body did not arrive in time", field="body", expected=expected)
            )

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end(ClientDisconnect())

    def _end(self, error: Exception) -> None:
        self._error = error
        self._task.cancel()
