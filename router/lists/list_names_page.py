"""The names of a store's lists, page by page: in an order that stays, by bucket and then by name.

A list that exists from the first page to the last is on one of them; one that is created or deleted
meanwhile is on one or on none.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardline.router.list_names import is_list_name
from shardline.router.lists.list_paths import BUCKETS, list_name, names_in
from shardline.router.lists.list_store import ListStore
from shardline.shards.core.errors import CorruptFile, InvalidInput, NewerFormat, Unavailable

MAX_LISTED = 50_000  # names looked at for one page, in steps of a bucket: 50 ms or so
MAX_READ = 4_000  # of them those whose newest version is read, to see that they are not deleted
# Where a page ends: behind the lists of a bucket up to this name
POSITION = re.compile(r"([0-9a-f]{2})/(.*)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamesPage:
    """next: where the next page begins; None: this is the last. A page may be empty, and not the
    last: so many names were looked at, and none begins with the prefix."""

    names: list[str]
    next: str | None


def check_position(value: str, field: str = "after") -> str:
    """Empty, or the ``next`` of a page. Raises InvalidInput: it is neither."""
    match = POSITION.fullmatch(value)
    is_end = match is not None and (not match[2] or is_list_name(match[2]))
    if value and not is_end:
        raise InvalidInput("not a position", field=field, expected="the `next` of a page")
    return value


def names_page(store: ListStore, prefix: str, after: str, limit: int) -> NamesPage:
    """At most ``limit`` names that begin with the prefix. Blocks.

    Raises:
        OSError: the store cannot be read.
    """
    match = POSITION.fullmatch(after)
    first, behind = (int(match[1], 16), match[2]) if match else (0, "")
    names: list[str] = []
    listed = read = 0
    store.refuse_missing_store(store.root)
    for number in range(first, len(BUCKETS)):
        if listed >= MAX_LISTED:
            return NamesPage(names=names, next=f"{BUCKETS[number]}/")
        found = _names_in(store.root / BUCKETS[number])
        listed += len(found)
        for name in sorted(name for name in found if name.startswith(prefix) and name > behind):
            if len(names) >= limit or read >= MAX_READ:
                return NamesPage(names=names, next=f"{BUCKETS[number]}/{behind}")
            read, behind = read + 1, name
            if _exists(store, name):
                names.append(name)
        behind = ""
    return NamesPage(names=names, next=None)


def all_names(store: ListStore) -> Iterator[str]:
    """Of every list that there is a folder of, deleted ones too. Raises OSError."""
    for bucket in BUCKETS:
        yield from sorted(_names_in(store.root / bucket))


def _names_in(bucket: Path) -> list[str]:
    return [name for folder in names_in(bucket) if is_list_name(name := list_name(folder))]


def _exists(store: ListStore, name: str) -> bool:
    """One that is damaged, or of a newer program, does."""
    try:
        stored = store.newest(name)
    except (CorruptFile, NewerFormat, Unavailable):
        return True
    return stored is not None and stored.exists
