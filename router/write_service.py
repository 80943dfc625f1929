"""The life of a write without HTTP: check, split by shard, deliver every part, sum up.

All parts acknowledged, or the whole write is an error that says which are not: writes have no
partial success. One deadline for all, counted from the arrival. Writes beyond
``max_writes_in_flight`` are refused before any work is done on them; they count apart from
searches, because they wait for disks.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import numpy as np

from shardline.router.contract import OtherModel
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.primary import Delivery, GenerationChanged
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
from shardline.shards.core.messages import RoutingTable, WriteReply
from shardline.shards.core.metrics import WRITE_MS, WRITES, WRITTEN_ROWS, Recorder

# Items of a small body checked and split in the event loop, some milliseconds; more, and those of a
# large body, go to a thread.
SPLIT_IN_LOOP = 256

Given: TypeAlias = Upserts | Deletes
Sent: TypeAlias = tuple[Part, WriteReply | ShardlineError]
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
            OtherModel: the table is of another model version; or vectors come without the name of
                theirs while a generation of another model is to get the same writes.
            InvalidInput: by features, and the generation has no item encoder.
            EncoderUnavailable: it has one, which did not load.
        """
        return await self._write(
            WriteKind.UPSERT, given, key, arrived_at, began_at, request_id, in_loop
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

        return await self._write(
            WriteKind.DELETE, given, key, arrived_at, began_at, request_id, in_loop
        )

    async def _write(
        self,
        kind: WriteKind,
        given: Given,
        key: str,
        arrived_at: float,
        began_at: float,
        request_id: str,
        in_loop: bool,
    ) -> WriteAnswer:
        deadline = arrived_at + given.timeout_ms / 1000
        try:
            table, sent = await self._all_written(given, key, deadline, in_loop)
        except ShardlineError as error:
            self._recorder.count(WRITES, kind, error.code)
            raise
        parts = [part for part, _ in sent]
        replies = [reply for _, reply in sent if isinstance(reply, WriteReply)]
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
            seq=newest(parts, replies, table),
            generation=table.generation,
            table_version=table.version,
            model_version=table.model_version,
            took_ms=took_ms,
            request_id=request_id,
        )

    async def _all_written(
        self, given: Given, key: str, deadline: float, in_loop: bool
    ) -> tuple[RoutingTable, list[Sent]]:
        """The table in the end, and every part with its acknowledgement.

        Where another generation goes live meanwhile, what is not acknowledged is split by its table
        and sent there; what is acknowledged was brought to it before it went live.
        """
        done: list[Sent] = []
        lost: list[Part] = []  # of the generation before, to be split anew
        may_be_applied = False
        while True:
            with self._fanout.pin() as snapshot:
                table = snapshot.table
            try:
                parts = await self._parts(given, snapshot, key, in_loop)
            except ShardlineError as error:
                if not lost:
                    raise
                raise _failure([*done, *((part, error) for part in lost)], key) from error
            send = partial(self._delivered, table.generation, deadline, in_loop, may_be_applied)
            sent = list(zip(parts, await asyncio.gather(*map(send, parts)), strict=True))
            crossing = [outcome for _, outcome in sent if isinstance(outcome, GenerationChanged)]
            if len(crossing) < sum(isinstance(outcome, ShardlineError) for _, outcome in sent):
                raise _failure([*done, *sent], key)
            done += [(part, outcome) for part, outcome in sent if isinstance(outcome, WriteReply)]
            if not crossing:
                return table, done
            lost = [part for part, outcome in sent if isinstance(outcome, GenerationChanged)]
            may_be_applied = any(each.may_be_applied for each in crossing)
            given = _left(given, lost, table)

    async def _parts(
        self, given: Given, snapshot: TableSnapshot, key: str, in_loop: bool
    ) -> list[Part]:
        """Requests to the shards of the snapshot's table. Raises: as ``upsert``."""
        by_features = isinstance(given, Upserts) and given.features is not None
        at_most = ENCODE_IN_LOOP if by_features else SPLIT_IN_LOOP
        if in_loop and len(given.item_ids) <= at_most:
            return split(given, snapshot, key)
        return await asyncio.to_thread(split, given, snapshot, key)

    async def _delivered(
        self, generation: int, deadline: float, in_loop: bool, may_be_applied: bool, part: Part
    ) -> WriteReply | ShardlineError:
        """The acknowledgement of a part, or why there is none."""
        delivery = Delivery(
            self._fanout,
            generation,
            part.shard,
            deadline,
            in_loop=in_loop,
            may_be_applied=may_be_applied,
        )
        try:
            reply = await delivery.send(part.message)
        except ShardlineError as error:
            return error
        self._on_seq(generation, part.shard, reply.seq)
        return reply


def split(given: Given, snapshot: TableSnapshot, key: str) -> list[Part]:
    """Requests to the shards of the snapshot's table.

    Raises:
        InvalidInput, OtherModel, EncoderUnavailable: as ``WriteService.upsert``.
    """
    table = snapshot.table
    if isinstance(given, Deletes):
        return delete_parts(given, table, key)
    if given.model_version not in (None, table.model_version):
        raise OtherModel(
            "the items are for another model than the index",
            field="model_version",
            expected=table.model_version,
            got=given.model_version,
            hint="encode the items with the model that is served, see /v1/status",
        )
    if given.features is not None:
        return upsert_parts(encoded(given, snapshot.item_encoder()), table, key)
    if given.model_version is None and table.other_model is not None:
        raise OtherModel(
            "vectors must name their model while generations of two models get the writes",
            field="model_version",
            expected=f"{table.model_version}, which is live",
            hint=f"name it, and {table.other_model} does not get the items; or send features",
        )
    return upsert_parts(given, table, key)


def _left(given: Given, lost: Sequence[Part], table: RoutingTable) -> Given:
    """The items of parts that the shards of ``table`` have not acknowledged: vectors that named no
    model are of the one that was live then."""
    left = given.of(np.concatenate([part.message.item_ids for part in lost]))
    if isinstance(left, Upserts) and left.features is None and left.model_version is None:
        return replace(left, model_version=table.model_version)
    return left


def _failure(sent: Sequence[Sent], key: str) -> ShardlineError:
    """Of parts of which one is not acknowledged, at least."""
    outcomes = [
        outcome.as_failure() if isinstance(outcome, GenerationChanged) else outcome
        for _, outcome in sent
    ]
    error = failure([part for part, _ in sent], outcomes, key)
    assert error is not None
    return error
