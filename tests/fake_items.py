"""The items of a client of one shard, in a dict: upserts, deletes and GETs, with their keys."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from shardline.router.client.answers import DeleteAnswer, UpsertAnswer
from shardline.router.client.seq import Seq
from shardline.router.contract import ItemAnswer
from shardline.shards.core.errors import NotFound, ShardlineError


class FakeItems:
    """One shard in a dict. fails: the next errors, before anything is applied, or after."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[np.ndarray, str | None]] = {}
        self.fails: list[tuple[ShardlineError, bool]] = []
        self.answers: dict[str | None, Any] = {}
        self.seq = 0
        self.generation = 1
        self.sent: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """It can be entered again."""

    def upsert(self, *, item_ids: Sequence[int], vectors: Any, **fields: Any) -> UpsertAnswer:
        titles = (fields["attributes"] or {}).get("title", [None] * len(item_ids))

        def apply() -> UpsertAnswer:
            updated = sum(item in self.items for item in item_ids)
            self.items.update(zip(item_ids, zip(vectors, titles, strict=True), strict=True))
            created = len(item_ids) - updated
            return UpsertAnswer(created=created, updated=updated, **self._written(item_ids))

        return self._once(fields, apply)

    def delete(self, item_ids: Sequence[int], **fields: Any) -> DeleteAnswer:
        def apply() -> DeleteAnswer:
            deleted = sum(self.items.pop(item, None) is not None for item in item_ids)
            missing = len(item_ids) - deleted
            return DeleteAnswer(deleted=deleted, missing=missing, **self._written(item_ids))

        return self._once(fields, apply)

    def item(self, item_id: int) -> ItemAnswer:
        if item_id not in self.items:
            raise NotFound("no such item")
        vector, title = self.items[item_id]
        return ItemAnswer(
            item_id=item_id,
            vector=vector,
            attributes={"title": title},
            shard=0,
            seq=self.seq,
            generation=self.generation,
            model_version="m1",
        )

    def _once(self, fields: dict[str, Any], apply: Any) -> Any:
        self.sent.append(fields)
        error, is_applied = self.fails.pop(0) if self.fails else (None, True)
        key = fields.get("key") or f"own-{len(self.sent)}"
        if is_applied and key not in self.answers:
            self.answers[key] = apply()
        if error is not None:
            raise error
        return self.answers[key]

    def _written(self, item_ids: Sequence[int]) -> dict[str, Any]:
        self.seq += 1
        return {
            "rows": len(item_ids),
            "duplicates": 0,
            "seq": Seq([self.seq], self.generation, 1),
            "generation": self.generation,
            "model_version": "m1",
            "took_ms": 1.0,
            "request_id": "r",
        }
