"""Requests to write that share an fsync: checked, made records of, and answered."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

from shardline.shards.core.errors import DeltaFull, InvalidInput, NotPrimary, ShardlineError
from shardline.shards.core.messages import (
    MAX_WRITE_KEY_BYTES,
    MAX_WRITTEN_ROWS,
    DeleteRequest,
    UpsertRequest,
    WriteReply,
)
from shardline.shards.core.schema import check_ids
from shardline.shards.live.attributes import check_attributes
from shardline.shards.live.carried_keys import CarriedKeys
from shardline.shards.live.records import Change, Delete, Record, Upsert
from shardline.shards.live.state import Applied, ShardState
from shardline.shards.live.write_keys import WriteKeys, Written, digest_of, refuse_another

WriteRequest: TypeAlias = UpsertRequest | DeleteRequest


class Holder(Protocol):
    """Of whose state the writes become part; read by other threads, so replaced in one step."""

    generation: int
    shard: int
    state: ShardState


class WriteGroup:
    """``add`` the requests; then write ``records``, which may be none; then take the ``replies``.

    A request that repeats a key, of this group too, or one of ``carried``, is no new record.
    """

    def __init__(
        self, keys: WriteKeys, carried: CarriedKeys, holder: Holder, epoch: int, most: int
    ) -> None:
        self.records: list[Record] = []
        self._keys, self._carried, self._epoch = keys, carried, epoch
        self._state = holder.state
        self._generation, self._seq = holder.generation, holder.state.seq
        self._room = most - holder.state.delta.rows
        self._most = most
        self._by_key: dict[str, int] = {}
        # of each request: the index of its record, or what it is answered in any case
        self._outcomes: list[int | WriteReply | ShardlineError] = []

    def add(self, request: WriteRequest) -> None:
        try:
            self._outcomes.append(self._taken(request))
        except ShardlineError as error:
            self._outcomes.append(error)

    def replies(
        self, applied: Sequence[Applied], failure: ShardlineError | None
    ) -> list[WriteReply | ShardlineError]:
        """``failure``: why no record became part of the log."""
        found: list[WriteReply | ShardlineError] = []
        for outcome in self._outcomes:
            if not isinstance(outcome, int):
                found.append(outcome)
            elif failure is not None:
                found.append(failure)
            else:
                record, done = self.records[outcome], applied[outcome]
                found.append(
                    WriteReply(
                        rows=done.rows,
                        existed=done.existed,
                        generation=self._generation,
                        seq=record.seq,
                    )
                )
        return found

    def _taken(self, request: WriteRequest) -> int | WriteReply:
        """Raises InvalidInput, DeltaFull, NotPrimary."""
        if request.epoch not in (0, self._epoch):
            # by a table of the past, in which this shard's generation may have been the live one
            raise NotPrimary(
                "the write is meant for another primary",
                expected=f"epoch {self._epoch}",
                got=str(request.epoch),
            )
        if len(request.key.encode()) > MAX_WRITE_KEY_BYTES:
            raise InvalidInput("too long", field="key", expected=f"<= {MAX_WRITE_KEY_BYTES} bytes")
        change = self._change_of(request)
        if request.key:
            known = self._by_key.get(request.key)
            if known is not None:
                refuse_another(self.records[known].change, digest_of(change))
                return known
            written = self._keys.find(request.key, change)
            if written is not None:
                return self._repeated(written, written.seq)
            written = self._carried.find(request.key)
            if written is not None:
                # its effect was brought over, and is in this state under another number
                return self._repeated(written, self._seq)
        if isinstance(change, Upsert):
            self._make_room(len(change.item_ids))
        self._by_key[request.key] = number = len(self.records)
        self.records.append(
            Record(seq=self._seq + number + 1, epoch=self._epoch, key=request.key, change=change)
        )
        return number

    def _repeated(self, written: Written, seq: int) -> WriteReply:
        return WriteReply(
            rows=written.rows, existed=written.existed, generation=self._generation, seq=seq
        )

    def _change_of(self, request: WriteRequest) -> Change:
        """What is logged: as an answer would show it. Raises InvalidInput."""
        ids = check_ids(request.item_ids)
        if not 0 < len(ids) <= MAX_WRITTEN_ROWS:
            raise InvalidInput(
                "too many items, or none",
                field="item_ids",
                expected=f"1 to {MAX_WRITTEN_ROWS}",
                got=str(len(ids)),
            )
        if len(np.unique(ids)) < len(ids):
            raise InvalidInput("an item comes twice", field="item_ids")
        if isinstance(request, DeleteRequest):
            return Delete(item_ids=ids)
        self._state.main.check_rows(request.vectors, len(ids))
        attributes = check_attributes(request.attributes, ids, self._state.attributes.schema)
        return Upsert(
            item_ids=ids,
            vectors=request.vectors,
            attributes=attributes,
            features=request.features,
        )

    def _make_room(self, rows: int) -> None:
        """Raises DeltaFull."""
        if rows > self._room:
            raise DeltaFull(
                "too many rows are waiting for a compaction",
                expected=f"<= {self._most} rows in the shard's delta",
                got=f"{self._state.delta.rows} and {rows} more",
            )
        self._room -= rows
