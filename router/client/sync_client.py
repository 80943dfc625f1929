"""The blocking client: msgpack both ways, numpy in and out, typed errors.

    with Client("http://localhost:8000", key="...") as client:
        answer = client.search(features=[{"user_id": 7}], k=10)
        answer.ids[0], answer.scores[0], answer.coverage.share

Any number of threads may share a client; each call in flight has a connection of its own, kept
for the next call. In a forked child the client opens connections of its own.
"""

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
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
from shardline.router.client.http1 import Response, ResponseReader, Server
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
    import ssl

    from numpy.typing import ArrayLike

RECEIVE_BYTES = 1 << 16


class StaleConnection(ConnectionError):
    """A kept connection that the server had closed before it saw the request."""


class Connection:
    """A connected socket and the parser of what comes over it."""

    def __init__(self, server: Server, tls: "ssl.SSLContext | None", timeout_s: float) -> None:
        """Raises OSError: it cannot be made within ``timeout_s`` or CONNECT_TIMEOUT_S."""
        try:
            within = min(timeout_s, CONNECT_TIMEOUT_S)
            self._socket = socket.create_connection((server.host, server.port), within)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=server.host)
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {within:.3g} s") from error
        self._reader = ResponseReader()
        self._is_reused = False
        self._pid = os.getpid()
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)

    @property
    def is_usable(self) -> bool:
        """Not of the process that this one was forked from, and silent: data or an end of the
        stream that nobody asked for belong to no request."""
        return self._pid == os.getpid() and not self._readable.poll(0)

    def exchange(self, message: bytes, remaining: Callable[[], float]) -> Response:
        """``remaining``: seconds there are left.

        Raises:
            StaleConnection: a kept connection has ended, without a byte of an answer.
            TimeoutError, OSError: no answer, for another reason.
        """
        is_sent = False
        try:
            self._socket.settimeout(remaining())
            with suppress(ConnectionError):  # a refusal may have come before all was sent
                self._socket.sendall(message)
                is_sent = True
            response = None
            while response is None:
                self._socket.settimeout(remaining())
                response = self._reader.feed(self._socket.recv(RECEIVE_BYTES))
            self._is_reused = True
            return response if is_sent else replace(response, keep_alive=False)
        except ConnectionError as error:
            if self._is_reused and not self._reader.started:
                raise StaleConnection from error
            raise

    def close(self) -> None:
        self._socket.close()


class Client(ClientCore):
    """One server. Its address is connected to directly: no proxy is used, whatever the environment
    says, and no redirect is followed, so that the key goes nowhere else."""

    _idle: deque[Connection]
    _sleep = staticmethod(time.sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections; a call in another thread ends its own when it is answered."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()

    def search(self, **fields: Unpack[SearchFields]) -> SearchAnswer:
        """ids (n, k) int64 and scores (n, k) float32, best first; empty slots are -1 and -inf.

        exclude_lists names lists, as ``put_list`` writes them, whose items are not to come back.
        Exactly one of vectors (n, dim), features (n maps), item_ids (n,), texts (n strings, for the
        text encoder of the server: docs/TEXT.md). What else is left out is the server's choice: k
        results per query, timeout_ms it may take, min_coverage (share of rows below which the
        answer is Unavailable), params (SearchParams) of the index, min_seq (the ``seq`` of an
        answer: of each shard, how many writes it must have applied to be asked), background (True:
        it gives way to all other searches), exact (True: every item is scored, which takes long:
        for measuring recall), filter (only items that match it: a map as docs/FILTERS.md describes
        it, or a list with one per query, None for none), exclude (a list with one list or array of
        item ids per query, which do not come back), exclude_lists (names of lists whose items do
        not come back), exclude_history (True: nor do the items of the history feature), cap, boost,
        diversify (at most so many items per value of an attribute, scores by attributes, different
        items: maps as docs/RESULTS.md describes them). return_ names attributes of items that the
        answer is to bring, return_original_ids the ids they had before their import. experiment_key
        (who asks) makes the search part of the server's experiments; the answer's ``arms`` says
        how.

        Raises:
            InvalidInput: a field is wrong; field names which.
            VersionMismatch, DeadlineExceeded, Overloaded, Unavailable: as the server said, and
                Unavailable too when it cannot be reached.
        """
        return self._send(self._search_call(**fields))

    def upsert(self, items: Any = None, **fields: Unpack[UpsertOptions]) -> UpsertAnswer:
        """Writes items: adds them, or replaces the whole of those that are there.

        Either ``items``, which are maps with item_id, vector and maybe attributes, or a table of
        pyarrow, pandas or polars with columns item_id and vector, the others being attributes; or
        by name item_ids (n,), vectors (n, dim) and attributes, a map of names to lists, or a table.
        More than a server takes at once is sent in several requests, in order. A request is sent
        again where no answer comes, with an idempotency key, so that it has one effect; ``key`` is
        what the keys begin with, where a program repeats a whole call. model_version: refused where
        the index is of another. timeout_ms: of each request. progress is called with the
        number of items whose requests are answered.

        Raises:
            InvalidInput: a field is wrong; field names which. Requests before it are written.
            VersionMismatch: the index is of another model; or generations of two models get the
                writes, and vectors come without ``model_version``.
            NotPrimary, ReadOnly, StoreFull, DeltaFull, DeadlineExceeded, Unavailable: not all items
                of a request were acknowledged; ``parts`` of the error says which shards failed.
        """
        given: UpsertFields = {**fields, "items": items}
        return self._written(self._upsert_calls(given), fields.get("progress"))

    def delete(self, item_ids: "ArrayLike", **fields: Unpack[DeleteOptions]) -> DeleteAnswer:
        """Deletes items (n,); those that do not exist are counted. key, timeout_ms, progress and
        errors as of ``upsert``."""
        given: DeleteFields = {**fields, "item_ids": item_ids}
        return self._written(self._delete_calls(given), fields.get("progress"))

    def send_events(self, events: Iterable[Mapping[str, Any]]) -> int:
        """Stores what came of searches; returns how many events were stored. Each is a map with
        ``event``, its kind, and ``key`` or ``request_id``; ``item_id``, ``value``, ``at`` (a
        datetime with a zone, or seconds since 1970), ``event_id`` and ``arms`` may be in it.
        Returns when all are on the server's disk. More than a server takes at once is sent in
        several requests, in order; a request that is sent again adds nothing.

        Raises:
            InvalidInput: an event is wrong; field names which. Requests before it are stored.
            NotFound: the server stores no events.
            StoreFull, ReadOnly, DeadlineExceeded, Unavailable: not all are known to be stored.
        """
        return sum(self._send(call) for call in self._event_calls(events))

    def _written(
        self, calls: Iterable[tuple[int, Call[Written]]], progress: Callable[[int], None] | None
    ) -> Written:
        total: Written | None = None
        done = 0
        for items, call in calls:
            total = together(total, self._send(call))
            done += items
            if progress is not None:
                progress(done)
        assert total is not None  # there is at least one request
        return total

    def put_list(self, name: str, item_ids: "ArrayLike") -> ListWritten:
        """Replaces the list of this name by these ids (n,), or creates it. With a key of scope
        write. A search names lists in ``exclude_lists``; docs/LISTS.md has the rules.

        Raises:
            InvalidInput: not a name, or beyond a limit. StoreFull, ReadOnly: the store does not
                take it. DeadlineExceeded, Unavailable: it may have been written or not; to send it
                again does no harm.
        """
        return self._send(self._list_call(list_put(name, item_ids)))

    def change_list(
        self, name: str, *, add: "ArrayLike | None" = None, remove: "ArrayLike | None" = None
    ) -> ListWritten:
        """Adds ids to a list and removes some, in one step, with no loss of what others change at
        the same time; one that does not exist is taken for an empty one. Raises: as ``put_list``.
        """
        return self._send(self._list_call(list_change(name, add, remove)))

    def delete_list(self, name: str) -> ListWritten:
        """Deletes a list; that there is none is no error. Raises: as ``put_list``."""
        return self._send(self._list_call(list_delete(name)))

    def get_list(self, name: str) -> ListAnswer:
        """The ids of a list. Raises NotFound, or Unavailable."""
        return self._send(self._list_call(list_get(name)))

    def lists(self, prefix: str = "") -> Iterator[str]:
        """The names of all lists that begin with the prefix, asked for page by page."""
        after: str | None = None
        is_last = False
        while not is_last:
            page = self._send(self._list_call(list_names(prefix, after)))
            yield from page.names
            after = page.next
            is_last = after is None

    def item(self, item_id: int, *, timeout_ms: float | None = None) -> ItemAnswer:
        """One item's stored vector (dim,) float32, and attributes. Raises NotFound, or as
        ``search``."""
        return self._send(self._item_call(item_id, timeout_ms))

    def status(self) -> dict[str, Any]:
        """What the router serves: generation, model, index, shards, encoder."""
        return self._send(self._get_call("/v1/status"))

    def healthy(self) -> bool:
        """Whether a server answers at all. Asks once."""
        return self._answers("/healthz")

    def ready(self) -> bool:
        """Whether a server answers, and can answer queries. Asks once."""
        return self._answers("/readyz")

    def _answers(self, path: str) -> bool:
        outcome = self._attempt(self._get_call(path).message, self._attempts())
        return isinstance(outcome, Response) and outcome.is_success

    def _send(self, call: Call[Answer]) -> Answer:
        attempts = self._attempts()
        while True:
            outcome = self._attempt(call.message, attempts)
            pause_s = attempts.pause_after(outcome)
            if pause_s is None:
                return self._finish(call, outcome)
            self._sleep(pause_s)

    def _attempt(self, message: bytes, attempts: Attempts) -> Outcome:
        try:
            kept = self._take()
            if kept is not None:
                with suppress(StaleConnection):  # no failure: it was closed before the request
                    return self._exchange(kept, message, attempts)
            fresh = Connection(self._server, self._tls, attempts.remaining())
            return self._exchange(fresh, message, attempts)
        except OSError as error:
            return error

    def _take(self) -> Connection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.is_usable:
                return connection
            connection.close()

    def _exchange(self, connection: Connection, message: bytes, attempts: Attempts) -> Response:
        try:
            response = connection.exchange(message, attempts.remaining)
        except BaseException:  # its answer may still come, and belongs to no other request
            connection.close()
            raise
        if response.keep_alive and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()
        return response
