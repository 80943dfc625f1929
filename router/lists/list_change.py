"""What a write makes of a list: pure functions from its newest version to the next one."""

from dataclasses import dataclass

import numpy as np

from shardline.router.lists.list_file import StoredList
from shardline.router.lists.list_store import Change
from shardline.shards.core.errors import CorruptFile, InvalidInput
from shardline.shards.core.schema import IdArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ListChange:
    """ids to add and to remove: each rising, each once, none in both."""

    add: IdArray
    remove: IdArray


def replaced(ids: IdArray, limit: int) -> Change:
    """The ids instead of whatever there is. What it returns raises InvalidInput: there are more
    than ``limit``."""

    def change(before: StoredList) -> StoredList | None:
        _refuse_long(len(ids), limit, "item_ids")
        is_same = before.exists and not before.is_damaged and np.array_equal(before.ids, ids)
        return None if is_same else StoredList(ids=ids)

    return change


def changed(given: ListChange, limit: int) -> Change:
    """With the ids added and removed. What it returns raises InvalidInput where the list would have
    more than ``limit`` ids, and CorruptFile of one that is damaged."""

    def change(before: StoredList) -> StoredList | None:
        if before.is_damaged:
            raise CorruptFile(
                f"version {before.version} of the list is damaged",
                hint="replace the whole list: PUT /v1/lists/{name}",
            )
        kept = np.setdiff1d(before.ids, given.remove, assume_unique=True)
        ids = np.union1d(kept, given.add)
        if np.array_equal(ids, before.ids) and (before.exists or not given.add.size):
            return None
        if len(ids) > len(before.ids):  # one that is longer since the limit was lowered may shrink
            _refuse_long(len(ids), limit, "add")
        return StoredList(ids=ids)

    return change


def deleted(before: StoredList) -> StoredList | None:
    return StoredList(is_gone=True) if before.exists else None


def _refuse_long(count: int, limit: int, field: str) -> None:
    if count > limit:
        raise InvalidInput(
            "too many ids in one list",
            field=field,
            expected=f"<= {limit}, router.max_list_ids",
            got=str(count),
            hint="what is true of many items is an attribute: filter by it",
        )
