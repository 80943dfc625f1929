"""The life of a write without HTTP: check, split by shard, deliver every part, sum up.

All parts acknowledged, or the whole write is an error that says which are not: writes have no
partial success. One deadline for all, counted from the arrival. Writes beyond
``max_writes_in_flight`` are refused before any work is done on them; they count apart from
searches, because they wait for disks.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from shardline.router.contract import OtherModel
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.primary import Delivery
from shardline.router.fanout.snapshot import ENCODE_IN_LOOP, TableSnapshot
from shardline.router.featured_writes import encoded
from shardline.router.limits import InFlightLimit
from shardline.router.router_config import RouterConfig
from shardline.router.written import (
    Deletes,
    Part,
    Upserts,
    WriteAnswer,
    WriteKind,
    delete_parts,
    failure,
    newest,
    upsert_parts,
)
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.messages import WriteReply
from shardline.shards.core.metrics import WRITE_MS, WRITES, WRITTEN_ROWS, Recorder

# Items of a small body checked and split in the event loop, some milliseconds; more, and those of a
# large body, go to a thread.
SPLIT_IN_LOOP = 256

OnSeq = Callable[[int, int, int], None]  # generation, shard, its sequence number


class WriteService:
    """All methods run in one event loop."""

    def __init__(
        self, config: RouterConfig, fanout: Fanout, recorder: Recorder, on_seq: OnSeq
    ) -> None:
        """on_seq is told of every acknowledged part, before the answer."""
        self._fanout = fanout
        self._recorder = recorder
        self._on_seq = on_seq
        self._in_flight = InFlightLimit(config.max_writes_in_flight, recorder)

    def admit(self) -> InFlightLimit:
        """Around all work on a write; ``InFlightLimit`` says when it raises."""
        return self._in_flight

    @property
    def taken(self) -> int:
        """Writes being worked on."""
        return self._in_flight.taken

    async def upsert(
        self,
        given: Upserts,
        key: str,
        *,
        arrived_at: float,
        began_at: float,
        request_id: str = "",
        in_loop: bool = True,
    ) -> WriteAnswer:
        """As ``delete``; items by features are encoded first.

        Raises also:
            OtherModel: the table is of another model version.
            InvalidInput: by features, and the generation has no item encoder.
            EncoderUnavailable: it has one, which did not load.
        """

        def split(snapshot: TableSnapshot) -> list[Part]:
            table = snapshot.table
            if given.model_version not in (None, table.model_version):
                raise OtherModel(
                    "the items are for another model than the index",
                    field="model_version",
                    expected=table.model_version,
                    got=given.model_version,
                    hint="encode the items with the model that is served, see /v1/status",
                )
            if given.features is None:
                return upsert_parts(given, table, key)
            return upsert_parts(encoded(given, snapshot.item_encoder()), table, key)

        return await self._write(
            WriteKind.UPSERT, given, split, key, arrived_at, began_at, request_id, in_loop
        )

    async def delete(
        self,
        given: Deletes,
        key: str,
        *,
        arrived_at: float,
        began_at: float,
        request_id: str = "",
        in_loop: bool = True,
    ) -> WriteAnswer:
        """Every part is durable, and in every search from now on that asks for its ``seq``.

        key makes a repeated write one effect. The deadline is counted from arrived_at, on the event
        loop's clock; took_ms from began_at, on time.perf_counter's. in_loop: the body is small
        enough for work on all of it in the event loop; that of others is done in threads.

        Raises:
            InvalidInput: the write breaks a rule; field names where. With ``parts``, a shard says
                so, and others may have applied theirs.
            DeadlineExceeded, Unavailable and its subclasses: the gravest of the reasons why parts
                are not acknowledged; ``parts`` has all.
        """

        def split(snapshot: TableSnapshot) -> list[Part]:
            return delete_parts(given, snapshot.table, key)

        return await self._write(
            WriteKind.DELETE, given, split, key, arrived_at, began_at, request_id, in_loop
        )

    async def _write(
        self,
        kind: WriteKind,
        given: Upserts | Deletes,
        split: Callable[[TableSnapshot], list[Part]],
        key: str,
        arrived_at: float,
        began_at: float,
        request_id: str,
        in_loop: bool,
    ) -> WriteAnswer:
        try:
            with self._fanout.pin() as snapshot:
                table = snapshot.table
            by_features = isinstance(given, Upserts) and given.features is not None
            at_most = ENCODE_IN_LOOP if by_features else SPLIT_IN_LOOP
            is_small = in_loop and len(given.item_ids) <= at_most
            parts = split(snapshot) if is_small else await asyncio.to_thread(split, snapshot)
            deadline = arrived_at + given.timeout_ms / 1000
            replies = await self._delivered(parts, table.generation, key, deadline, in_loop)
        except ShardlineError as error:
            self._recorder.count(WRITES, kind, error.code)
            raise
        rows = sum(part.items for part in parts)
        took_ms = (time.perf_counter() - began_at) * 1000
        self._recorder.count(WRITES, kind, "ok")
        self._recorder.count(WRITTEN_ROWS, kind, by=rows)
        self._recorder.observe(WRITE_MS, took_ms, kind)
        return WriteAnswer(
            kind=kind,
            rows=rows,
            existed=sum(reply.existed for reply in replies),
            duplicates=len(given.item_ids) - rows,
            seq=newest(parts, replies, len(table.shards)),
            generation=table.generation,
            model_version=table.model_version,
            took_ms=took_ms,
            request_id=request_id,
        )

    async def _delivered(
        self, parts: Sequence[Part], generation: int, key: str, deadline: float, in_loop: bool
    ) -> list[WriteReply]:
        """The acknowledgement of every part, all under way at once."""

        async def deliver(part: Part) -> WriteReply | ShardlineError:
            try:
                delivery = Delivery(self._fanout, generation, part.shard, deadline, in_loop=in_loop)
                reply = await delivery.send(part.message)
            except ShardlineError as error:
                return error
            self._on_seq(generation, part.shard, reply.seq)
            return reply

        outcomes = await asyncio.gather(*map(deliver, parts))
        error = failure(parts, outcomes, key)
        if error is not None:
            raise error
        return [outcome for outcome in outcomes if isinstance(outcome, WriteReply)]
