"""Queries of a job: what a block of them is, and what every source of them offers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from shardline.cluster.batch.spans import Span
from shardline.shards.core.errors import DataError
from shardline.shards.core.schema import FloatArray, IdArray


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Queries:
    """Consecutive queries: ``ids`` (n,) of any Arrow type, as given, repeats included.

    Exactly one of ``vectors`` (n, dim) float32, checked and of unit length for cosine;
    ``features``, n maps for the query encoder; and neither, for items whose vectors only a live
    cluster knows. ``own`` (n,) int64: the item that each query is, which its results leave out.
    """

    ids: pa.Array
    vectors: FloatArray | None = None
    features: list[dict[str, Any]] | None = None
    own: IdArray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, start: int, stop: int) -> "Queries":
        """Those from ``start`` to before ``stop``; views."""
        part = slice(start, stop)
        return Queries(
            ids=self.ids.slice(start, stop - start),
            vectors=None if self.vectors is None else self.vectors[part],
            features=None if self.features is None else self.features[part],
            own=None if self.own is None else self.own[part],
        )


class QuerySource(Protocol):
    """Where a job's queries come from. Plain data that can be pickled: tasks read on their own."""

    @property
    def rows(self) -> int: ...

    @property
    def id_type(self) -> pa.DataType: ...

    @property
    def drops_own(self) -> bool:
        """Whether each query is an item, which its own results leave out."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the queries are, by content: two sources of the same identity give the same."""

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, Queries]]:
        """The queries of ascending spans, a few blocks in memory at most. A span is taken when its
        queries are asked for.

        Raises:
            DataError: a query that cannot be used; names file, row and column.
        """


def joined(parts: Sequence[Queries]) -> Queries:
    """Consecutive queries of one kind as one block."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Queries(
        ids=pa.concat_arrays([part.ids for part in parts]),
        vectors=None
        if first.vectors is None
        else np.concatenate([part.vectors for part in parts if part.vectors is not None]),
        features=None
        if first.features is None
        else [each for part in parts for each in part.features or ()],
        own=None
        if first.own is None
        else np.concatenate([part.own for part in parts if part.own is not None]),
    )


def cut(spans: Iterable[Span], pieces: "PieceReader") -> Iterator[tuple[Span, Queries]]:
    """Pieces of any length as the blocks of ascending spans; what lies between is skipped."""
    reader: Iterator[Queries] = iter(())
    held: list[Queries] = []
    place = -1
    for span in spans:
        if span.start != place:
            reader, held = pieces(span.start), []
        missing = len(span) - sum(map(len, held))
        while missing > 0:
            piece = next(reader, None)
            if piece is None:
                raise DataError(
                    "the queries have fewer rows than when the job was planned",
                    expected=f"at least {span.stop:,}",
                    hint="leave the files of a running job as they are, and start it again",
                )
            held.append(piece)
            missing -= len(piece)
        whole = joined(held)
        yield span, whole.rows(0, len(span))
        held = [whole.rows(len(span), len(whole))] if len(whole) > len(span) else []
        place = span.stop


class PieceReader(Protocol):
    """Queries from a row on, in pieces of any length."""

    def __call__(self, start: int) -> Iterator[Queries]: ...
