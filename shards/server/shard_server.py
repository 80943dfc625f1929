"""A shard's server: one event loop in its own thread, in front of one search thread.

    loop thread     accepts, parses frames, queues requests, writes replies
    search thread   takes whatever is queued as one batch, searches, hands the replies back;
                    background searches in pieces, while nothing else waits (``search_queue``)
    filter thread   evaluates filters that are new to the shard, before the search thread gets their
                    searches (``filter_thread``)
    write thread    takes whatever writes wait as one group (``write_thread``)
    exact thread    one exact search after the other (``exact_searches``)

A batch of a few rows that will take less than INLINE_MS is searched by the loop thread itself
while the search thread is idle: two hand-overs between threads cost more than such a search.
Never do both search at once. It never waits for a batch to fill. The queue is bounded: beyond it
requests are refused at once as ``Overloaded``; writes have bounds of their own. A request whose
budget has run out while it waited is dropped unsearched. A frame that breaks the protocol closes
its own connection only; a request that is merely wrong is answered with an ``ErrorReply``.
Independent of Ray.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from shardline.shards.core.errors import (
    CorruptFile,
    InvalidInput,
    NotPrimary,
    Overloaded,
    ProtocolError,
    ShardlineError,
)
from shardline.shards.core.messages import ReplicaKey
from shardline.shards.core.metrics import QUEUE_DEPTH, Recorder
from shardline.shards.index.main_index import set_search_threads
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.takeover import Takeover
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.answering import Answerer, ServerStats, error_reply
from shardline.shards.server.exact_searches import ExactSearches, is_exact
from shardline.shards.server.filter_thread import FilterThread
from shardline.shards.server.handlers import HANDLERS, Work
from shardline.shards.server.search_queue import BackgroundSearch, SearchQueue
from shardline.shards.server.session import Session
from shardline.shards.server.shard import Shard
from shardline.shards.server.write_queue import WriteQueue
from shardline.shards.server.write_thread import WriteThread
from shardline.shards.wire import local_socket
from shardline.shards.wire.frames import MAX_FRAME_BYTES, Message
from shardline.shards.wire.handshake import ServerAddress

HANDSHAKE_TIMEOUT_S = 5.0
MAX_QUEUED_REQUESTS = 1024
MAX_QUEUED_ROWS = 65_536  # queries plus ids to fetch: 32 MB at 128-d
MAX_BATCH_ROWS = 1024  # so that one drained batch keeps nobody waiting for seconds
MAX_REPLY_BYTES = MAX_FRAME_BYTES - 1024  # the rest is what a frame holds beside its arrays
BACKGROUND_QUEUE_SHARE = 0.5  # of both: the rest is for those who wait
BACKLOG = 128
# The longest search in the loop thread: nobody notices a handshake that waits this long.
INLINE_MS = 2.0
INLINE_ROWS = 8  # and the largest batch, because what a row costs is only estimated
INLINE_FILTERED = 2  # searches with filters of it, each of which may take as long as that
STOP_TIMEOUT_S = 10.0
# While a search runs, routers hear so often that we live. Far below their ``silent_after_ms``.
KEEP_ALIVE_S = 0.1


class ShardServer:
    """Serves one shard. ``bind``, then ``start`` with the epoch to announce, then ``stop``.

    ``threads`` is the number of cores one search may use. writes: of the shard; None: it takes
    none, and follows no log. changeover: to newer main indexes; None: it keeps the one it has.
    on_damage: as of ``WriteThread``.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        secret: bytes,
        host: str = "127.0.0.1",
        replica: int = 0,
        threads: int = 1,
        writes: ShardWrites | None = None,
        changeover: Changeover | None = None,
        on_damage: Callable[[CorruptFile], None] | None = None,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self.shard = shard
        self.key = ReplicaKey(shard.generation, shard.shard, replica)
        self.secret = secret
        self.epoch = 0
        self.address: ServerAddress = (host, 0)  # the port is known once bound
        self.stats = ServerStats()
        self.recorder = Recorder()
        self.handshake_timeout_s = handshake_timeout_s
        self.sessions: set[Session] = set()
        self._answerer = Answerer(shard, self.key, self.recorder, self.stats)
        self._dim = shard.dim
        self._host = host
        self._threads = threads
        self._max_queued_requests = max_queued_requests
        self._socket: socket.socket | None = None
        self._local_socket: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._run_loop, name="shard-loop", daemon=True)
        self._search_thread = threading.Thread(
            target=self._run_search, name="shard-search", daemon=True
        )
        self._write_thread: WriteThread | None = None
        if writes is not None:
            self._write_thread = WriteThread(
                writes, self._deliver_writes, changeover=changeover, on_damage=on_damage
            )
        self._writes = WriteQueue(self._write_thread, self.stats)
        self._exact = ExactSearches(shard, self.stats, self._deliver_exact)
        self._queue = SearchQueue(MAX_BATCH_ROWS)
        self._filters = FilterThread(shard, self._queue.put)
        self._arrived: list[Work] = []  # loop thread only: what came in since the last dispatch
        self._is_due = False  # loop thread only: a dispatch is scheduled
        # loop thread only: requests that search or filter thread has and has not answered
        self._handed_over = 0
        self._alive_timer: asyncio.TimerHandle | None = None  # loop thread only
        self._queued_rows = 0  # loop thread only: added when queued, taken off when answered
        self._queued_requests = 0
        self._ready = threading.Event()
        self._failure: BaseException | None = None  # why the loop thread never listened
        self._stopped = False

    @property
    def queue_depth(self) -> int:
        """Requests accepted and not yet answered."""
        return self._queued_requests + self._writes.requests + self._exact.requests

    def bind(self) -> tuple[str, int]:
        """Takes a free port and starts listening, there and on the Unix socket beside it.

        Clients that connect now wait for ``start``.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._socket = socket.create_server((self._host, 0), family=family, backlog=BACKLOG)
        name = self._socket.getsockname()
        self.address = name[0], name[1]
        self._local_socket = local_socket.listen(self.address, BACKLOG)
        return self.address

    def start(self, epoch: int) -> None:
        """Answers from now on; ``epoch`` is announced to every client."""
        assert self._socket is not None, "bind first"
        self.epoch = epoch
        self._search_thread.start()
        self._loop_thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._queue.stop()
            raise self._failure
        if self._write_thread is not None:
            self._write_thread.start()

    def stop(self) -> None:
        """Closes port and connections and ends both threads; may be called twice."""
        if self._stopped:
            return
        self._stopped = True
        if self._write_thread is not None:
            self._write_thread.stop()
        if self._loop_thread.is_alive():
            self._queue.stop()
            self._search_thread.join(STOP_TIMEOUT_S)
            self._exact.stop()
            self._filters.stop()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(STOP_TIMEOUT_S)
        else:
            self._loop.close()
        for listening in (self._socket, self._local_socket):
            if listening is not None:
                listening.close()

    def lead(self, epoch: int) -> int:
        """Makes it the primary of its shard: ``ShardWrites.lead``.

        Raises:
            NotPrimary: it takes no writes, or a later epoch has been given to another.
            CorruptFile, NotFound, OSError: of the log.
        """
        if self._write_thread is None:
            raise NotPrimary("this shard takes no writes")
        return self._write_thread.lead(epoch).result()

    def seal(self, epoch: int) -> int:
        """Nobody acknowledges writes to its shard any more: ``ShardWrites.seal``.

        Raises: as ``lead``.
        """
        if self._write_thread is None:
            raise NotPrimary("this shard takes no writes")
        return self._write_thread.seal(epoch).result()

    def take_over(self, takeover: Takeover) -> int:
        """Starts to take over another generation's index: ``Changeover.take_over``.

        Raises: as that, and NotPrimary: another replica takes the writes of this shard.
        """
        if self._write_thread is None:
            raise NotPrimary("this shard takes no writes")
        return self._write_thread.take_over(takeover).result()

    def mark(self) -> int:
        """``ShardWrites.mark``'s number. Raises: as that, or NotPrimary."""
        if self._write_thread is None:
            raise NotPrimary("this shard takes no writes")
        return self._write_thread.mark().result()

    def refresh_metrics(self) -> None:
        """Sets gauges and counters for an export; any thread."""
        self.recorder.set(QUEUE_DEPTH, self.queue_depth, *self.key.labels)
        self._answerer.refresh_metrics()

    # Loop thread

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        set_search_threads(self._threads)
        try:
            servers = self._loop.run_until_complete(self._listen())
        except Exception as error:  # noqa: BLE001  whatever it is, ``start`` raises it
            self._failure = error
            return
        finally:
            self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            # whoever is being accepted becomes a session first: a closed server would drop it open
            if accepting := asyncio.all_tasks(self._loop):
                self._loop.run_until_complete(asyncio.wait(accepting, timeout=STOP_TIMEOUT_S))
            for server in servers:
                server.close()
            for session in list(self.sessions):
                session.abort()
            for server in servers:
                self._loop.run_until_complete(server.wait_closed())
            self._loop.close()

    async def _listen(self) -> list[asyncio.Server]:
        assert self._socket is not None
        servers = [await self._loop.create_server(lambda: Session(self), sock=self._socket)]
        if self._local_socket is not None:
            servers.append(
                await self._loop.create_unix_server(lambda: Session(self), sock=self._local_socket)
            )
        return servers

    def work_for(self, session: Session, request_id: int, message: Message, size: int) -> Work:
        """What a session is to submit for a message of ``size`` bytes, once it has room.

        Raises:
            ProtocolError: the message is no request.
        """
        handler = HANDLERS.get(type(message))
        if handler is None:
            raise ProtocolError("not a request", got=type(message).__name__)
        request: Any = message  # of the handler's type
        rows = len(handler.rows_of(request))
        reply_bytes = handler.reply_bytes(request, rows, self._dim)
        now = time.monotonic()
        deadline, taken = now + request.timeout_ms / 1e3, size + reply_bytes
        return Work(session, request_id, request, handler, rows, now, deadline, reply_bytes, taken)

    def submit(self, work: Work) -> None:
        """Queues a request of a session that is no write, or answers it at once with an error."""
        if is_exact(work) and work.reply_bytes <= MAX_REPLY_BYTES:
            self._exact.submit(work)
            self._be_heard()
            return
        share = BACKGROUND_QUEUE_SHARE if work.is_background else 1.0
        is_full = (
            self._queued_rows + work.rows > share * MAX_QUEUED_ROWS and self._queued_rows > 0
        ) or self._queued_requests >= share * self._max_queued_requests
        if is_full or work.reply_bytes > MAX_REPLY_BYTES:
            error = error_reply(self._refusal(work))
            work.asker.reply(work.request_id, error, work.taken)
            return
        self._queued_rows += work.rows
        self._queued_requests += 1
        self._arrived.append(work)

    def submit_write(self, work: Work) -> None:
        """As ``submit``; what becomes of it keeps no search waiting."""
        self._writes.submit(work)
        self._be_heard()

    def refuse_write(self, work: Work) -> None:
        """Answers a write for which its session has no room."""
        work.asker.reply(work.request_id, self._writes.refusal())

    def after_read(self) -> None:
        """A session has been read. With others there may be more to read before the search."""
        if len(self.sessions) == 1:
            self._dispatch()
        elif self._arrived and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Searches what has arrived here and now, or hands it over to the search thread."""
        batch, self._arrived, self._is_due = self._arrived, [], False
        if not batch:
            return
        if self._handed_over == 0 and self._is_short(batch):
            self._deliver(self._answerer.answer(batch))
            return
        self._be_heard()
        self._handed_over += len(batch)
        for work in batch:
            if work.has_filter and not self.shard.is_prepared(work.request):
                self._filters.submit(work)
            else:
                self._queue.put(work)

    def _is_short(self, batch: Sequence[Work]) -> bool:
        """Whether it may be searched in the loop thread."""
        plain_rows = filtered_rows = filtered = 0
        for work in batch:
            if not work.handler.may_be_inline(self.shard, work.request):
                return False
            if work.has_filter:
                filtered_rows += work.rows
                filtered += 1
            else:
                plain_rows += work.rows
        return (
            plain_rows + filtered_rows <= INLINE_ROWS
            and filtered <= INLINE_FILTERED
            and (not plain_rows or plain_rows * self._answerer.ms_per_row <= INLINE_MS)
        )

    def _be_heard(self) -> None:
        if self._alive_timer is None:
            self._alive_timer = self._loop.call_later(KEEP_ALIVE_S, self._keep_alive)

    def _keep_alive(self) -> None:
        """Silence tells a router that the process hangs: a long search or fsync must not look like
        that."""
        self._alive_timer = None
        if self._handed_over or self._writes.requests or self._exact.requests:
            for session in self.sessions:
                session.keep_alive()
            self._be_heard()

    def _refusal(self, work: Work) -> ShardlineError:
        """Why a request is not queued: it is too large, or the queue is full."""
        if work.reply_bytes > MAX_REPLY_BYTES:
            return InvalidInput(
                "the reply would not fit a frame",
                expected=f"<= {MAX_FRAME_BYTES} bytes",
                got=f"{work.reply_bytes} bytes",
                hint="ask for less in one request",
            )
        self.stats.overloaded += 1
        return Overloaded(
            "shard queue is full",
            got=f"{self._queued_requests} requests, {self._queued_rows} rows waiting",
        )

    def _deliver_writes(self, answered: list[tuple[Work, Message | None]]) -> None:
        """Write thread."""
        self._loop.call_soon_threadsafe(self._writes.take_back, answered)

    def _deliver_exact(self, work: Work, message: Message) -> None:
        """Exact thread."""
        self._loop.call_soon_threadsafe(self._exact.take_back, work, message)

    def _take_back(self, answered: list[tuple[Work, Message | None]]) -> None:
        self._handed_over -= len(answered)
        self._deliver(answered)

    def _deliver(self, answered: list[tuple[Work, Message | None]]) -> None:
        answered.reverse()
        while answered:  # emptied on the way: a large reply is not kept beside its frame
            work, message = answered.pop()
            self._queued_rows -= work.rows
            self._queued_requests -= 1
            if message is None:
                work.asker.ask_again(work)
            else:
                work.asker.reply(work.request_id, message, work.taken)

    # Search thread

    def _run_search(self) -> None:
        set_search_threads(self._threads)
        while (turn := self._queue.next()) is not None:
            answered = self._search(turn)
            if answered:
                self._loop.call_soon_threadsafe(self._take_back, answered)
            if self._stopped:
                return

    def _search(self, turn: list[Work] | BackgroundSearch) -> list[tuple[Work, Message | None]]:
        if not isinstance(turn, BackgroundSearch):
            return self._answerer.answer(turn)
        reply = self._answerer.answer_piece(turn)
        if reply is None:
            self._queue.put_back(turn)
            return []
        return [(turn.work, reply)]
