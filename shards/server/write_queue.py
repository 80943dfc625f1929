"""The writes of a shard that are not answered yet, as its loop thread counts them.

They have bounds of their own and share none with searches: a disk that hangs, or a bulk load, keeps
them here for long, and searches must not notice. What exceeds a bound is refused at once.
"""

from shardline.shards.core.errors import NotPrimary, Overloaded
from shardline.shards.core.messages import ErrorReply
from shardline.shards.server.answering import ServerStats, error_reply
from shardline.shards.server.handlers import Work
from shardline.shards.server.write_thread import WriteThread
from shardline.shards.wire.frames import Message

MAX_WRITES = 1024
MAX_WRITE_ROWS = 65_536  # 32 MB of vectors at 128-d; four groups of the write thread


class WriteQueue:
    """Any thread may read ``requests``; the rest is the loop thread's.

    thread: what writes them; None: the shard takes no writes.
    """

    def __init__(self, thread: WriteThread | None, stats: ServerStats) -> None:
        self.requests = 0  # the write thread has not answered
        self.rows = 0  # of these
        self._thread = thread
        self._stats = stats

    def submit(self, work: Work) -> None:
        """Hands a write to the write thread, or answers it at once with an error."""
        if self._thread is None:
            _answer(work, error_reply(NotPrimary("this shard takes no writes")))
        elif self.requests >= MAX_WRITES or (
            self.requests and self.rows + work.rows > MAX_WRITE_ROWS
        ):
            _answer(work, self.refusal())
        else:
            self.requests += 1
            self.rows += work.rows
            self._thread.submit(work)

    def refusal(self) -> ErrorReply:
        """Of a write for which there is no room; counted."""
        self._stats.overloaded += 1
        got = f"{self.requests} writes of {self.rows} rows under way"
        return error_reply(Overloaded("too many writes wait for the disk", got=got))

    def take_back(self, answered: list[tuple[Work, Message | None]]) -> None:
        """What the write thread has answered."""
        for work, message in answered:
            assert message is not None, "the reply to a write has a known size"
            self.requests -= 1
            self.rows -= work.rows
            _answer(work, message)


def _answer(work: Work, message: Message) -> None:
    work.asker.reply_to_write(work.request_id, message, work.taken)
