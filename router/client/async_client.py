"""The asyncio client: the verbs, arguments and errors of ``Client``, as coroutines.

    async with AsyncClient("http://localhost:8000", key="...") as client:
        answers = await asyncio.gather(*(client.search(vectors=v, k=10) for v in batches))

At most ``MAX_CONNECTIONS`` calls are under way at a time; the others wait. Connections belong to
the event loop, and the process, that made them: in another one the client makes new ones.
"""

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from shardline.router.client.answers import (
    Answer,
    DeleteAnswer,
    SearchAnswer,
    UpsertAnswer,
    Written,
    together,
)
from shardline.router.client.calls import Call, ClientCore, SearchFields
from shardline.router.client.http1 import Response, ResponseReader
from shardline.router.client.list_calls import (
    ListAnswer,
    ListWritten,
    list_change,
    list_delete,
    list_get,
    list_names,
    list_put,
)
from shardline.router.client.retries import CONNECT_TIMEOUT_S, Attempts, Outcome
from shardline.router.client.write_calls import (
    DeleteFields,
    DeleteOptions,
    UpsertFields,
    UpsertOptions,
)
from shardline.router.contract import ItemAnswer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MAX_CONNECTIONS = 100  # more only queue in the server; a file descriptor each


class AsyncConnection(asyncio.Protocol):
    """A connected transport and the parser of what comes over it."""

    def __init__(self) -> None:
        self._reader = ResponseReader()
        self._waiting: asyncio.Future[Response] | None = None
        self._transport: Any = None
        self.is_usable = True
        self.is_reused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # asyncio sets TCP_NODELAY

    def data_received(self, data: bytes) -> None:
        self._feed(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_usable = False
        if isinstance(error, OSError) and self._waiting is not None:
            self._fail(error)
        else:
            self._feed(b"")

    def _feed(self, data: bytes) -> None:
        if self._waiting is None:  # data or an end of the stream that nobody asked for
            self.close()
            return
        try:
            response = self._reader.feed(data)
        except ConnectionError as error:
            self._fail(error)
            self.close()
            return
        if response is not None and not self._waiting.done():
            self._waiting.set_result(response)

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)

    @property
    def is_stale(self) -> bool:
        """It was kept, and ended without a byte of an answer."""
        return self.is_reused and not self._reader.started

    async def exchange(self, message: bytes) -> Response:
        """Raises OSError: the connection ended first."""
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            response = await self._waiting
        finally:
            self._waiting = None
        # a refusal may come before all was sent
        self.is_usable &= response.keep_alive and not self._transport.get_write_buffer_size()
        self.is_reused = True
        return response

    def close(self) -> None:
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        """Ends the connection from another event loop than its own, which may be closed."""
        self.is_usable = False
        with contextlib.suppress(OSError):  # the server was first
            self._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


class AsyncClient(ClientCore):
    """One server, connected to directly, as by ``Client``."""

    _idle: deque[AsyncConnection]
    _home: tuple[int, asyncio.AbstractEventLoop] | None = None
    _sleep = staticmethod(asyncio.sleep)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections; calls under way end theirs when they are answered."""
        self._is_closed = True
        self._enter_loop()
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # transports close in the loop's next round

    async def search(self, **fields: Unpack[SearchFields]) -> SearchAnswer:
        """As ``Client.search``."""
        return await self._send(self._search_call(**fields))

    async def upsert(self, items: Any = None, **fields: Unpack[UpsertOptions]) -> UpsertAnswer:
        """As ``Client.upsert``."""
        given: UpsertFields = {**fields, "items": items}
        return await self._written(self._upsert_calls(given), fields.get("progress"))

    async def delete(self, item_ids: "ArrayLike", **fields: Unpack[DeleteOptions]) -> DeleteAnswer:
        """As ``Client.delete``."""
        given: DeleteFields = {**fields, "item_ids": item_ids}
        return await self._written(self._delete_calls(given), fields.get("progress"))

    async def send_events(self, events: Iterable[Mapping[str, Any]]) -> int:
        """As ``Client.send_events``."""
        return sum([await self._send(call) for call in self._event_calls(events)])

    async def _written(
        self, calls: Iterable[tuple[int, Call[Written]]], progress: Callable[[int], None] | None
    ) -> Written:
        total: Written | None = None
        done = 0
        for items, call in calls:  # one after the other: of two with the same id the last one wins
            total = together(total, await self._send(call))
            done += items
            if progress is not None:
                progress(done)
        assert total is not None  # there is at least one request
        return total

    async def put_list(self, name: str, item_ids: "ArrayLike") -> ListWritten:
        """As ``Client.put_list``."""
        return await self._send(self._list_call(list_put(name, item_ids)))

    async def change_list(
        self, name: str, *, add: "ArrayLike | None" = None, remove: "ArrayLike | None" = None
    ) -> ListWritten:
        """As ``Client.change_list``."""
        return await self._send(self._list_call(list_change(name, add, remove)))

    async def delete_list(self, name: str) -> ListWritten:
        """As ``Client.delete_list``."""
        return await self._send(self._list_call(list_delete(name)))

    async def get_list(self, name: str) -> ListAnswer:
        """As ``Client.get_list``."""
        return await self._send(self._list_call(list_get(name)))

    async def lists(self, prefix: str = "") -> AsyncIterator[str]:
        """As ``Client.lists``."""
        after: str | None = None
        is_last = False
        while not is_last:
            page = await self._send(self._list_call(list_names(prefix, after)))
            for name in page.names:
                yield name
            after = page.next
            is_last = after is None

    async def item(self, item_id: int, *, timeout_ms: float | None = None) -> ItemAnswer:
        """As ``Client.item``."""
        return await self._send(self._item_call(item_id, timeout_ms))

    async def status(self) -> dict[str, Any]:
        """As ``Client.status``."""
        return await self._send(self._get_call("/v1/status"))

    async def healthy(self) -> bool:
        """As ``Client.healthy``."""
        return await self._answers("/healthz")

    async def ready(self) -> bool:
        """As ``Client.ready``."""
        return await self._answers("/readyz")

    async def _answers(self, path: str) -> bool:
        outcome = await self._attempt(self._get_call(path).message, self._attempts())
        return isinstance(outcome, Response) and outcome.is_success

    async def _send(self, call: Call[Answer]) -> Answer:
        attempts = self._attempts()
        while True:
            outcome = await self._attempt(call.message, attempts)
            pause_s = attempts.pause_after(outcome)
            if pause_s is None:
                return self._finish(call, outcome)
            await self._sleep(pause_s)

    async def _attempt(self, message: bytes, attempts: Attempts) -> Outcome:
        self._enter_loop()
        idle = self._idle  # of this loop: another one may enter before the answer comes
        try:
            async with asyncio.timeout(attempts.remaining()), self._limit:
                while idle:
                    kept = idle.pop()
                    if kept.is_usable:
                        try:
                            return await self._exchange(kept, message, idle)
                        except OSError:
                            if not kept.is_stale:
                                raise
                            break  # no failure: it was closed before the request
                made = await self._connect(attempts.remaining())
                return await self._exchange(made, message, idle)
        except OSError as error:  # TimeoutError is one
            return error

    async def _connect(self, timeout_s: float) -> AsyncConnection:
        within = min(timeout_s, CONNECT_TIMEOUT_S)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(within):
                _, connection = await loop.create_connection(
                    AsyncConnection, self._server.host, self._server.port, ssl=self._tls
                )
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {within:.3g} s") from error
        return connection

    async def _exchange(
        self, connection: AsyncConnection, message: bytes, idle: deque[AsyncConnection]
    ) -> Response:
        try:
            response = await connection.exchange(message)
        except BaseException:  # its answer may still come, and belongs to no other request
            connection.close()
            raise
        if connection.is_usable and idle is self._idle and not self._is_closed:
            idle.append(connection)
        else:
            connection.close()
        return response

    def _enter_loop(self) -> None:
        """Begins anew in another event loop or process. What was kept is ended, in another process
        left untouched: it is the parent's, and so is the selector that it is in."""
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            if self._home is not None and self._home[0] == home[0]:
                for connection in self._idle:
                    connection.end()
            self._left, self._idle = self._idle, deque()
            self._home = home
            self._limit = asyncio.Semaphore(MAX_CONNECTIONS)
