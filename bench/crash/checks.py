"""What a shard must hold, from the journal alone, and whether it does."""

from shardline.bench.crash.trapped_replica import Contents
from shardline.bench.crash.writers import DIM, LOG
from shardline.bench.journal import Journal, Write, vectors_of
from shardline.shards.core.messages import WriteReply

SHOWN = 5  # differences of one kind that are named


class Expected:
    """The items after the writes that were acknowledged, in the order of their numbers: a dict."""

    def __init__(self, built: Contents, seed: int) -> None:
        """``built``: the shard before any write."""
        self.seq = built.seq
        self.items = dict(built.items)
        self._seed = seed

    def take(self, journal: Journal) -> None:
        """Adds what was acknowledged since, while nobody writes. A number that no writer knows is
        a write that nobody sent, or that had two effects."""
        with journal.lock:
            writes, journal.acknowledged = journal.acknowledged, {}
        for (log, seq), write in sorted(writes.items(), key=lambda each: each[0]):
            assert log == LOG
            if seq != self.seq + 1:
                journal.violation(f"nobody has written {self.seq + 1} to {seq - 1}")
            self._apply(write, journal)
            self.seq = seq

    def _apply(self, write: Write, journal: Journal) -> None:
        assert isinstance(write.reply, WriteReply)
        existed = sum(item in self.items for item in write.items)
        if (write.reply.rows, write.reply.existed) != (len(write.items), existed):
            journal.violation(f"write {write.key}: {existed} items existed, but {write.reply}")
        for item, vector in zip(write.items, vectors_of(self._seed, write, DIM), strict=True):
            if write.is_upsert:
                self.items[item] = vector.tobytes(), write.title(item)
            else:
                self.items.pop(item, None)

    def differences(self, found: Contents) -> list[str]:
        """Of what a replica holds; none if all is as it must be."""
        told = []
        if found.seq != self.seq:
            told.append(f"has {found.seq} writes, not {self.seq}")
        if found.rows != len(found.items):
            told.append(f"counts {found.rows} rows, and holds {len(found.items)} items")
        lost = sorted(self.items.keys() - found.items.keys())
        more = sorted(found.items.keys() - self.items.keys())
        both = self.items.keys() & found.items.keys()
        other = sorted(item for item in both if self.items[item] != found.items[item])
        for what, items in (("lost", lost), ("should not be there", more), ("differ", other)):
            if items:
                told.append(f"{len(items)} items {what}: {items[:SHOWN]}")
        return told
