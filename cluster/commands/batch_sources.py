"""The queries that ``batch`` was given, as a source: files, users of a data set, or all items."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.cluster.batch.csv_queries import open_query_files
from shardline.cluster.batch.queries import Queries, QuerySource
from shardline.cluster.batch.query_files import FeatureFiles, IdFiles, VectorFiles, encoded
from shardline.cluster.batch.spans import Span
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.schema import ORIGINAL_ID, IdArray, Metric
from shardline.shards.storage.generation import GenerationManifest, verify_query_encoder
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.user_queries import query_features

ALL_SPLITS = ("train", "val", "test")  # a user's history is all that the user took


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which queries the command was given, in the names of its options."""

    queries: tuple[str, ...]
    features: bool
    users: Path | None
    items: bool
    id_column: str | None
    vector_column: str | None

    def check(self) -> None:
        """Raises InvalidInput: not exactly one kind of queries."""
        kinds = {
            "--queries": bool(self.queries) and self.users is None,
            "--users": self.users is not None,
            "--items": self.items,
        }
        if sum(kinds.values()) != 1:
            raise InvalidInput(
                "say which queries to answer",
                expected=f"one of {', '.join(kinds)}",
                got=", ".join(name for name, given in kinds.items() if given) or "none",
            )
        if self.features and not kinds["--queries"]:
            raise InvalidInput("--features says what is in --queries", hint="leave it out")
        unread = {
            "--id-column": self.id_column is not None and not self.queries,
            "--vector-column": self.vector_column is not None
            and (self.features or not kinds["--queries"]),
        }
        for option, given in unread.items():
            if given:
                raise InvalidInput(
                    f"{option} names a column of --queries that is not read here",
                    hint="leave it out",
                )

    def on_all_hosts(self) -> "Asked":
        """With absolute paths: what reads them on another host has another working folder."""
        queries = tuple(
            each if "://" in each or not each else absolute(each) for each in self.queries
        )
        users = None if self.users is None else self.users.absolute()
        return replace(self, queries=queries, users=users)

    def refuse_inside(self, out: Path) -> None:
        """Raises InvalidInput: results would be written among the queries, and be read as such."""
        for each in self.queries:
            if each and "://" not in each and out.resolve().is_relative_to(Path(each).resolve()):
                raise InvalidInput(
                    "the output folder lies in the folder of the queries",
                    field="--out",
                    got=f"{out} in {each}",
                    hint="choose a folder elsewhere",
                )


def absolute(path: str) -> str:
    return str(Path(path).absolute())


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """What turns features into vectors: a folder; None where a live cluster does it.

    kinds: name -> kind of the features it takes.
    """

    kinds: dict[str, str]
    folder: Path | None


def generation_encoder(folder: Path, manifest: GenerationManifest) -> Encoder:
    """That of a generation.

    Raises:
        NotFound: it was built without one. CorruptFile: a file is altered.
    """
    place = verify_query_encoder(folder, manifest)
    features = QueryEncoder.load(place).features
    return Encoder(kinds={each["name"]: each["kind"] for each in features}, folder=place)


def open_source(
    asked: Asked,
    *,
    dim: int,
    metric: Metric,
    items: Callable[[], QuerySource],
    encoder: Callable[[], Encoder],
    work: Path,
    note: Callable[[str], None],
) -> QuerySource:
    """Everything that can be known of the queries without reading them all is checked.

    work: for files that the job needs while it runs. note: prints a line.

    Raises:
        NotFound, DataError, InvalidInput: as the sources.
    """
    if asked.items:
        return items()
    files = open_query_files(asked.queries, work, asked.id_column, note)
    if asked.users is not None:
        named = IdFiles(files, id_column=asked.id_column) if files else None
        return DatasetUsers(asked.users, encoder(), named)
    source: FeatureFiles | VectorFiles
    if asked.features:
        found = encoder()
        source = FeatureFiles(
            files, kinds=found.kinds, encoder=found.folder, id_column=asked.id_column
        )
    else:
        source = VectorFiles(
            files,
            dim=dim,
            metric=metric,
            id_column=asked.id_column,
            vector_column=asked.vector_column,
        )
    if source.unused:
        note(f"not used: column {', '.join(source.unused)}")
    return source


class DatasetUsers:
    """Users of a data set, by what they took and by their columns in its table of users."""

    drops_own = False

    def __init__(self, path: Path, encoder: Encoder, named: IdFiles | None = None) -> None:
        """named: the users to ask, by their own ids; None: all of them, as the table has them.

        Raises:
            NotFound: a user that the data set does not have, or a feature that is no column.
        """
        self._path, self._encoding = path, encoder
        self._dataset: Dataset | None = None
        self._encoder: QueryEncoder | None = None
        dataset = self._open()
        ids = _own_ids(dataset)
        self._rows: IdArray = np.arange(len(ids)) if named is None else _rows_of(ids, named)
        self.rows = len(self._rows)
        self.id_type: pa.DataType = ids.type
        self._ids = ids.take(pa.array(self._rows))
        self._identity = {
            "kind": "users",
            "data": dataset.identity,
            "named": None if named is None else named.identity,
        }
        query_features(dataset, encoder.kinds, self._rows[:1], ALL_SPLITS)

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None, "_encoder": None}  # each process opens its own

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, Queries]]:
        dataset, folder = self._open(), self._encoding.folder
        if folder is not None and self._encoder is None:
            self._encoder = QueryEncoder.load(folder)
        for span in spans:
            users, ids = self._rows[span.start : span.stop], self._ids.slice(span.start, len(span))
            features = query_features(dataset, self._encoding.kinds, users, ALL_SPLITS)
            if self._encoder is None:
                yield span, Queries(ids=ids, features=features)
                continue

            def where(place: int, field: str, ids: pa.Array = ids) -> str:
                return f"{self._path}: user {ids[place]}: {field}"

            yield span, Queries(ids=ids, vectors=encoded(self._encoder, features, where))

    def _open(self) -> Dataset:
        if self._dataset is None:
            self._dataset = open_dataset(self._path, keep=True)
        return self._dataset


def _own_ids(dataset: Dataset) -> pa.Array:
    """The ids of all users as their source calls them."""
    table = dataset.users()
    name = ORIGINAL_ID if ORIGINAL_ID in table.column_names else "user_id"
    column = table[name].combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _rows_of(ids: pa.Array, named: IdFiles) -> IdArray:
    """The row of each named user, compared as text: files have numbers where we have texts."""
    rows = {text: row for row, text in enumerate(ids.cast(pa.string()).to_pylist())}
    found = np.empty(named.rows, dtype=np.int64)
    for place, text in enumerate(named.texts()):
        row = rows.get(text) if text is not None else None
        if row is None:
            raise NotFound(
                "no such user in the data set", field=named.name_of(place), got=repr(text)
            )
        found[place] = row
    return found
