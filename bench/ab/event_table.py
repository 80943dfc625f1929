"""The events of a store as one table: repeats taken out, and whose each of them is.

Events without a key belong to the search of their request_id, and with it to that search's key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shardline.router.experiments.event_files import SCHEMA, event_files, read_events
from shardline.router.experiments.stored_event import SEARCH
from shardline.shards.core.errors import CorruptFile

NOBODY = -1
REQUEST = "\0"  # before the request id of a search without a key: no key begins so


@dataclass(frozen=True, slots=True, eq=False)
class EventTable:
    """rows: as ``SCHEMA`` (n,). owners (n,): of each, the number of its key in ``keys``, or of its
    search where that has no key; NOBODY where neither is known. keys: the text of a key, or REQUEST
    and the id of a request. damaged: files that were left out."""

    rows: pa.Table
    owners: NDArray[np.int64]
    keys: pa.Array
    damaged: tuple[str, ...] = ()

    def kinds(self) -> NDArray[np.object_]:
        """(n,) what each event is."""
        return np.asarray(self.rows["event"].to_numpy(zero_copy_only=False), dtype=object)

    def arms(self, experiment: str) -> NDArray[np.object_]:
        """(n,) the arm of each event in an experiment; None where it is in none."""
        found = np.full(self.rows.num_rows, None, dtype=object)
        start = 0
        for chunk in self.rows["arms"].chunks:
            # a slice of an array has the keys of the whole one
            whole = pa.concat_arrays([chunk])
            offsets = whole.offsets.to_numpy()
            places = np.repeat(np.arange(len(whole)), np.diff(offsets)) + start
            first, last = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
            names = whole.keys.slice(first, last - first).to_numpy(zero_copy_only=False)
            values = whole.items.slice(first, last - first).to_numpy(zero_copy_only=False)
            is_ours = names == experiment
            found[places[is_ours]] = values[is_ours]
            start += len(whole)
        return found

    def experiments(self) -> list[str]:
        """The names of all that any search is in; callers' events may name others."""
        names: set[str] = set()
        searches = self.rows.filter(pc.equal(self.rows["event"], SEARCH))
        for chunk in searches["arms"].chunks:
            names.update(pc.unique(pa.concat_arrays([chunk]).keys).to_pylist())
        return sorted(names)


def load_events(folder: Path, since: datetime | None = None) -> EventTable:
    """All events of a store since a moment, by the time that they have; [] where there are none."""
    tables, damaged = _read_all(folder, since)
    rows = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    if since is not None:
        rows = rows.filter(pc.greater_equal(rows["at"], pa.scalar(since, SCHEMA.field("at").type)))
    return owned(without_repeats(rows), damaged)


def _read_all(folder: Path, since: datetime | None) -> tuple[list[pa.Table], list[str]]:
    """The tables of all files, and what is wrong with those that are damaged. Looks again where a
    file has gone meanwhile, because a router may have merged it into another."""
    known: dict[Path, pa.Table | CorruptFile] = {}
    while True:
        paths = list(event_files(folder, since))
        try:
            for path in paths:
                if path not in known:
                    known[path] = _read(path)
        except FileNotFoundError:
            continue  # its day is gone, or its events are in a new file: fewer are left each time
        found = [known[path] for path in paths]
        damaged = [str(each) for each in found if isinstance(each, CorruptFile)]
        return [each for each in found if not isinstance(each, CorruptFile)], damaged


def _read(path: Path) -> pa.Table | CorruptFile:
    try:
        return read_events(path)
    except CorruptFile as error:
        return error


def without_repeats(rows: pa.Table) -> pa.Table:
    """Of events with the same event_id the first alone."""
    ids = rows["event_id"].to_pylist()
    seen: set[str] = set()
    keep = []
    for each in ids:
        keep.append(each is None or each not in seen)
        if each is not None:
            seen.add(each)
    return rows if all(keep) else rows.filter(pa.array(keep, pa.bool_()))


def owned(rows: pa.Table, damaged: Sequence[str] = ()) -> EventTable:
    """The table with the owner of each event."""
    searches = rows.filter(pc.equal(rows["event"], SEARCH))
    own_name = pc.binary_join_element_wise(REQUEST, searches["request_id"], "")
    by_request = dict(
        zip(
            searches["request_id"].to_pylist(),
            pc.coalesce(searches["key"], own_name).to_pylist(),
            strict=True,
        )
    )
    names = [
        key if key is not None else by_request.get(request)
        for key, request in zip(
            rows["key"].to_pylist(), rows["request_id"].to_pylist(), strict=True
        )
    ]
    encoded = pa.array(names, pa.string()).dictionary_encode()
    owners = encoded.indices.fill_null(NOBODY).to_numpy(zero_copy_only=False).astype(np.int64)
    return EventTable(rows, owners, encoded.dictionary, tuple(damaged))
