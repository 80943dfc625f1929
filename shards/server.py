"""A shard's TCP server: one event loop in its own thread, in front of one search thread.

    loop thread     accepts, parses frames, queues requests, writes replies
    search thread   takes whatever is queued as one batch, searches, hands the replies back

A batch of a few rows that will take less than INLINE_MS is searched by the loop thread itself
while the search thread is idle: two hand-overs between threads cost more than such a search.
Never do both search at once. It never waits for a batch to fill. The queue is bounded: beyond it
requests are refused at once as ``Overloaded``. A request whose budget has run out while it waited
is dropped unsearched. A frame that breaks the protocol closes its own connection only; a request
that is merely wrong is answered with an ``ErrorReply``. Independent of Ray.
"""

import asyncio
import logging
import math
import queue
import socket
import threading
import time
from dataclasses import dataclass
from typing import TypeAlias, cast

from shards.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ProtocolError,
    ShardlineError,
)
from shards.main_index import set_search_threads
from shards.metrics import BATCH_QUERIES, QUEUE_DEPTH, SEARCH_MS, SHARD_REFUSED, Recorder
from shards.shard import Shard
from shards.types import ErrorReply, FetchRequest, SearchReply, SearchRequest
from shards.wire import (
    KEEP_ALIVE,
    MAX_FRAME_BYTES,
    FrameSplitter,
    Message,
    decode_payload,
    encode_frame,
    new_hello,
    welcome,
)

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
HANDSHAKE_FRAME_BYTES = 1024  # a Proof has about 80; nobody unproven makes us buffer more
MAX_QUEUED_REQUESTS = 1024
MAX_QUEUED_ROWS = 65_536  # queries plus ids to fetch: 32 MB at 128-d
MAX_BATCH_ROWS = 1024  # so that one drained batch keeps nobody waiting for seconds
MAX_UNSENT_BYTES = 2 * MAX_FRAME_BYTES  # of a client that asks but does not read
BYTES_PER_RESULT = 12  # an int64 id and a float32 score
FRAME_MARGIN_BYTES = 1024  # what a reply's frame holds beside its arrays
BACKLOG = 128
# The longest search in the loop thread: nobody notices a handshake that waits this long.
INLINE_MS = 2.0
INLINE_ROWS = 8  # and the largest batch, because what a row costs is only estimated
ESTIMATE_DECAY = 0.5  # so that one dear request (a large k, many lists) is not forgotten at once
STOP_TIMEOUT_S = 10.0
# While a search runs, routers hear so often that we live. Far below their ``late_after_ms``.
KEEP_ALIVE_S = 0.25

Request: TypeAlias = SearchRequest | FetchRequest


@dataclass(slots=True)
class _Work:
    """A queued request; ``deadline`` in seconds of time.monotonic."""

    connection: "_Connection"
    request_id: int
    request: Request
    rows: int
    deadline: float


@dataclass(slots=True)
class ServerStats:
    """Counters since the start; each is written by one thread at a time."""

    requests: int = 0
    batches: int = 0
    overloaded: int = 0
    expired: int = 0
    failed: int = 0


class ShardServer:
    """Serves one shard. ``bind``, then ``start`` with the epoch to announce, then ``stop``.

    ``threads`` is the number of cores one search may use.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        secret: bytes,
        host: str = "127.0.0.1",
        threads: int = 1,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self.shard = shard
        self.secret = secret
        self.epoch = 0
        self.address = (host, 0)  # the port is known once bound
        self.stats = ServerStats()
        self.recorder = Recorder()
        self._label = str(shard.shard)
        self.handshake_timeout_s = handshake_timeout_s
        self.connections: set[_Connection] = set()
        self._host = host
        self._threads = threads
        self._max_queued_requests = max_queued_requests
        self._socket: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._run_loop, name="shard-loop", daemon=True)
        self._search_thread = threading.Thread(
            target=self._run_search, name="shard-search", daemon=True
        )
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._arrived: list[_Work] = []  # loop thread only: what came in since the last dispatch
        self._is_due = False  # loop thread only: a dispatch is scheduled
        self._handed_over = 0  # loop thread only: requests the search thread has not answered
        self._alive_timer: asyncio.TimerHandle | None = None  # loop thread only
        self._ms_per_row = math.inf  # estimated from past searches; unknown means long
        self._queued_rows = 0  # loop thread only: added when queued, taken off when answered
        self._queued_requests = 0
        self._ready = threading.Event()
        self._stopped = False

    @property
    def queue_depth(self) -> int:
        """Requests accepted and not yet answered."""
        return self._queued_requests

    def bind(self) -> tuple[str, int]:
        """Takes a free port and starts listening; clients that connect now wait for ``start``."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._socket = socket.create_server((self._host, 0), family=family, backlog=BACKLOG)
        name = self._socket.getsockname()
        self.address = name[0], name[1]
        return self.address

    def start(self, epoch: int) -> None:
        """Answers from now on; ``epoch`` is announced to every client."""
        assert self._socket is not None, "bind first"
        self.epoch = epoch
        self._search_thread.start()
        self._loop_thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Closes port and connections and ends both threads; may be called twice."""
        if self._stopped:
            return
        self._stopped = True
        if self._loop_thread.is_alive():
            self._queue.put(None)
            self._search_thread.join(STOP_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(STOP_TIMEOUT_S)
        else:
            self._loop.close()
        if self._socket is not None:
            self._socket.close()

    def refresh_metrics(self) -> None:
        """Sets gauges and counters for an export; any thread."""
        self.recorder.set(QUEUE_DEPTH, self.queue_depth, self._label)
        for why in ("overloaded", "expired", "failed"):
            self.recorder.total(SHARD_REFUSED, getattr(self.stats, why), self._label, why)

    # Loop thread

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        set_search_threads(self._threads)
        assert self._socket is not None
        server = self._loop.run_until_complete(
            self._loop.create_server(lambda: _Connection(self), sock=self._socket)
        )
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for connection in list(self.connections):
                connection.abort()
            self._loop.run_until_complete(server.wait_closed())
            self._loop.close()

    def submit(self, connection: "_Connection", request_id: int, request: Request) -> None:
        """Queues a request of a connection, or answers it at once with an error."""
        rows = len(request.queries if isinstance(request, SearchRequest) else request.item_ids)
        try:
            self._admit(request, rows)
        except ShardlineError as error:
            connection.reply(request_id, _error_reply(error))
            return
        self._queued_rows += rows
        self._queued_requests += 1
        deadline = time.monotonic() + request.timeout_ms / 1e3
        self._arrived.append(_Work(connection, request_id, request, rows, deadline))

    def after_read(self) -> None:
        """A connection has been read. With others there may be more to read before the search."""
        if len(self.connections) == 1:
            self._dispatch()
        elif self._arrived and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Searches what has arrived here and now, or hands it over to the search thread."""
        batch, self._arrived, self._is_due = self._arrived, [], False
        if not batch:
            return
        rows = sum(work.rows for work in batch)
        is_short = rows <= INLINE_ROWS and rows * self._ms_per_row <= INLINE_MS
        if is_short and self._handed_over == 0:
            self._deliver(self._answer(batch))
            return
        if self._alive_timer is None:
            self._alive_timer = self._loop.call_later(KEEP_ALIVE_S, self._keep_alive)
        self._handed_over += len(batch)
        for work in batch:
            self._queue.put(work)

    def _keep_alive(self) -> None:
        """Silence tells a router that the process hangs: a long search must not look like that."""
        self._alive_timer = None
        if self._handed_over:
            for connection in self.connections:
                connection.keep_alive()
            self._alive_timer = self._loop.call_later(KEEP_ALIVE_S, self._keep_alive)

    def _admit(self, request: Request, rows: int) -> None:
        """Raises Overloaded or InvalidInput for a request that must not be queued."""
        if isinstance(request, SearchRequest):
            reply_bytes = rows * request.k * BYTES_PER_RESULT
        else:
            reply_bytes = rows * (self.shard.dim * 4 + 8)
        if reply_bytes > MAX_FRAME_BYTES - FRAME_MARGIN_BYTES:
            raise InvalidInput(
                "the reply would not fit a frame",
                expected=f"<= {MAX_FRAME_BYTES} bytes",
                got=f"{reply_bytes} bytes",
                hint="ask for less in one request",
            )
        full = self._queued_rows > 0 and self._queued_rows + rows > MAX_QUEUED_ROWS
        if full or self._queued_requests >= self._max_queued_requests:
            self.stats.overloaded += 1
            raise Overloaded(
                "shard queue is full",
                got=f"{self._queued_requests} requests, {self._queued_rows} rows waiting",
            )

    def _take_back(self, answered: list[tuple[_Work, Message]]) -> None:
        self._handed_over -= len(answered)
        self._deliver(answered)

    def _deliver(self, answered: list[tuple[_Work, Message]]) -> None:
        for work, message in answered:
            self._queued_rows -= work.rows
            self._queued_requests -= 1
            work.connection.reply(work.request_id, message)

    # Search thread

    def _run_search(self) -> None:
        set_search_threads(self._threads)
        while True:
            batch, more = self._next_batch()
            if batch:
                self._loop.call_soon_threadsafe(self._take_back, self._answer(batch))
            if self._stopped or not more:
                return

    def _next_batch(self) -> tuple[list[_Work], bool]:
        """Everything that waits now, up to a bound; False with it when the server stops."""
        batch: list[_Work] = []
        rows = 0
        try:
            work = self._queue.get()
            while work is not None:
                batch.append(work)
                rows += work.rows
                if rows >= MAX_BATCH_ROWS:
                    return batch, True
                work = self._queue.get_nowait()
        except queue.Empty:
            return batch, True
        return batch, False

    # Whichever thread searches

    def _answer(self, batch: list[_Work]) -> list[tuple[_Work, Message]]:
        """A reply for each request, in no order."""
        now = time.monotonic()
        self.stats.requests += len(batch)
        self.stats.batches += 1
        answered: list[tuple[_Work, Message]] = []
        searches: list[tuple[_Work, SearchRequest]] = []
        for work in batch:
            if work.deadline <= now:
                self.stats.expired += 1
                error = DeadlineExceeded("the request's time ran out before the search")
                answered.append((work, _error_reply(error)))
            elif isinstance(work.request, SearchRequest):
                searches.append((work, work.request))
            else:
                answered.append((work, self._fetch(work.request)))
        if searches:
            replies = self._search([request for _, request in searches])
            answered += zip((work for work, _ in searches), replies, strict=True)
        return answered

    def _search(self, requests: list[SearchRequest]) -> list[Message]:
        started = time.perf_counter()
        try:
            replies = self.shard.search_batch(requests)
        except Exception:  # a bug of ours must cost these answers, not the search thread
            logger.exception("search failed")
            self.stats.failed += len(requests)
            return [_INTERNAL_ERROR] * len(requests)
        if all(isinstance(reply, SearchReply) for reply in replies):  # a refusal costs nothing
            rows = sum(len(request.queries) for request in requests)
            took_ms = (time.perf_counter() - started) * 1e3
            self._learn(took_ms / rows)
            self.recorder.observe(SEARCH_MS, took_ms, self._label)
            self.recorder.observe(BATCH_QUERIES, rows, self._label)
        return [
            _error_reply(reply) if isinstance(reply, ShardlineError) else reply for reply in replies
        ]

    def _learn(self, ms_per_row: float) -> None:
        """Takes a measurement into the estimate, which rises at once and falls slowly."""
        if math.isinf(self._ms_per_row):
            self._ms_per_row = ms_per_row
        else:
            self._ms_per_row = max(ms_per_row, ESTIMATE_DECAY * self._ms_per_row)

    def _fetch(self, request: FetchRequest) -> Message:
        try:
            return self.shard.fetch(request)
        except ShardlineError as error:
            return _error_reply(error)
        except Exception:
            logger.exception("fetch failed")
            self.stats.failed += 1
            return _INTERNAL_ERROR


class _Connection(asyncio.Protocol):
    """One client. Lives in the loop thread: nothing here is touched by the search thread."""

    def __init__(self, server: ShardServer) -> None:
        self._server = server
        self._splitter = FrameSplitter(HANDSHAKE_FRAME_BYTES)
        self._hello = new_hello(
            shard=server.shard.shard, generation=server.shard.generation, epoch=server.epoch
        )
        self._is_proven = False
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def reply(self, request_id: int, message: Message) -> None:
        """Sends a frame, unless the client has gone."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(encode_frame(request_id, message))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.warning("client %s does not read its replies", self._peer())
            transport.abort()

    def keep_alive(self) -> None:
        """Says nothing, to a router that has proved itself."""
        if self._is_proven and self._transport is not None and not self._transport.is_closing():
            self._transport.write(KEEP_ALIVE)

    def abort(self) -> None:
        """Drops the connection at once, unsent replies included."""
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # no isinstance here: Ray installs uvloop, whose transports are of no asyncio class
        self._transport = cast(asyncio.Transport, transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.connections.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._server.handshake_timeout_s, self._give_up)
        self._transport.write(encode_frame(0, self._hello))

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            for request_id, payload in self._splitter.feed(data):
                self._take(request_id, decode_payload(payload))
        except ProtocolError as error:
            logger.warning("client %s broke the protocol: %s", self._peer(), error)
            self.abort()
        finally:
            self._server.after_read()

    def pause_writing(self) -> None:
        """The client reads slower than it asks: take no more of its requests."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    # Inside

    def _take(self, request_id: int, message: Message) -> None:
        if not self._is_proven:
            server = self._server
            self.reply(0, welcome(message, server.secret, self._hello, server.address))
            self._is_proven = True
            self._splitter.limit = MAX_FRAME_BYTES
            if self._timer is not None:
                self._timer.cancel()
        elif isinstance(message, SearchRequest | FetchRequest):
            self._server.submit(self, request_id, message)
        else:
            raise ProtocolError("not a request", got=type(message).__name__)

    def _give_up(self) -> None:
        logger.warning("client %s did not prove the secret in time", self._peer())
        self.abort()

    def _peer(self) -> str:
        return str(self._transport.get_extra_info("peername")) if self._transport else "(gone)"


def _error_reply(error: ShardlineError) -> ErrorReply:
    return ErrorReply(code=error.code, message=error.details, field=error.field)


_INTERNAL_ERROR = ErrorReply(code=ShardlineError.code, message="internal error of the shard")
