"""Embedding sets: item ids and vectors in Arrow files, from training or from elsewhere.

    _manifest.json      model_version, dim, metric, normalised, rows, created_at, cut, files; last
    items-00000.arrow   item ids, vectors, attribute columns, as in ``vector_files``
    queries.arrow       sample queries that builds measure recall with; may be absent
    query_encoder/      present when a model of ours wrote the set
    item_encoder/       likewise, unless it was written before items could be encoded elsewhere

Vectors are checked when they are written and, because others may write such files, when they are
read. Those of metric cosine have unit length on disk.
Sets are written and read in batches and never held in memory as a whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shardline.shards.core.encoder_files import ITEM_ENCODER_FOLDER, QUERY_ENCODER_FOLDER
from shardline.shards.core.errors import CorruptFile, DataError, InvalidInput
from shardline.shards.core.files import (
    FileEntry,
    describe_file,
    describe_tree,
    read_manifest,
    staged_folder,
    verify_files,
    write_manifest,
)
from shardline.shards.core.schema import (
    FloatArray,
    IdArray,
    Metric,
    check_ids,
    check_vectors,
    query_vectors,
    unit_vectors,
)
from shardline.shards.storage.cut import Cut, cut_from_json
from shardline.shards.storage.vector_files import (
    MAX_SAMPLE_QUERIES,
    QUERIES_NAME,
    ROWS_PER_BATCH,
    item_batch,
    open_ipc,
    read_queries,
    vector_matrix,
    write_queries,
)

KIND = "embedding set"
VERSION = 1
ROWS_PER_FILE = 1 << 20  # 512 MB at 128 dimensions


@dataclass(frozen=True, slots=True)
class EmbeddingBatch:
    """item_ids (n,) int64; vectors (n, dim) float32, checked; attributes of the n rows."""

    item_ids: IdArray
    vectors: FloatArray
    attributes: pa.RecordBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSet:
    """A complete set on disk. ``files`` are the item files, in order of their rows.

    cut: what its rows contain of a live generation's writes; None where nobody has said it.
    """

    folder: Path
    model_version: str
    dim: int
    metric: Metric
    normalised: bool
    rows: int
    created_at: str
    files: tuple[FileEntry, ...]
    has_queries: bool
    cut: Cut | None = None

    @property
    def encoder_folder(self) -> Path | None:
        """Where the query encoder lies; None for foreign vectors, which have none."""
        return self._if_there(QUERY_ENCODER_FOLDER)

    @property
    def item_encoder_folder(self) -> Path | None:
        """Where the item encoder lies; None for foreign vectors, and for an older export."""
        return self._if_there(ITEM_ENCODER_FOLDER)

    @property
    def queries_file(self) -> Path | None:
        """Where the sample queries lie, for ``read_queries``; None for a set without."""
        return self.folder / QUERIES_NAME if self.has_queries else None

    def queries(self) -> FloatArray:
        """(n, dim) float32 sample queries, at least one, checked as items are.

        Raises:
            CorruptFile: ``queries_file`` is not such a file. DataError: its vectors are refused.
        """
        assert self.queries_file is not None
        queries = read_queries(self.queries_file, dim=self.dim)
        if not len(queries):
            raise CorruptFile(f"{self.queries_file}: no sample queries", expected="at least one")
        try:
            return query_vectors(queries, dim=self.dim, metric=self.metric, field="embedding")
        except InvalidInput as error:
            raise as_data_error(error, self.queries_file) from error

    def item_ids(self) -> IdArray:
        """(rows,) int64, all different, in file order; vectors are not read.

        Raises:
            DataError: a negative id, or an id that occurs twice, in whatever files.
        """
        parts = [batch.column("item_id").to_numpy() for batch in self._record_batches()]
        try:
            return check_ids(np.concatenate([np.empty(0, np.int64), *parts]), unique=True)
        except InvalidInput as error:
            raise as_data_error(error, self.folder) from error

    def batches(self, rows: int = ROWS_PER_BATCH) -> Iterator[EmbeddingBatch]:
        """All rows in file order, at most ``rows`` at a time. The arrays may be read-only views.

        Under cosine all vectors have unit length, those of a set that was written without, too.

        Raises:
            CorruptFile: a file does not hold the rows or columns its manifest promises.
            DataError: a vector that is not finite, or zero under cosine.
        """
        for whole in self._record_batches():
            for start in range(0, whole.num_rows, rows):
                batch = whole.slice(start, rows)
                vectors = vector_matrix(batch.column("embedding"), self.dim)
                try:
                    check_vectors(vectors, dim=self.dim, metric=self.metric, field="embedding")
                except InvalidInput as error:
                    raise as_data_error(error, self.folder) from error
                yield EmbeddingBatch(
                    batch.column("item_id").to_numpy(),
                    unit_vectors(vectors, self.metric),
                    batch.select(batch.schema.names[2:]),
                )

    def _if_there(self, name: str) -> Path | None:
        folder = self.folder / name
        return folder if folder.is_dir() else None

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        for entry in self.files:
            path, rows = self.folder / entry.name, 0
            reader = open_ipc(path)
            _check_schema(reader.schema, self.dim, path)
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                rows += batch.num_rows
                yield batch
            if rows != entry.rows:
                raise CorruptFile(
                    f"{path}: wrong number of rows", expected=str(entry.rows), got=str(rows)
                )


def open_embedding_set(
    folder: Path, *, verify: bool = True, version: str | None = None
) -> EmbeddingSet:
    """The set in a folder, every file's checksum verified first.

    ``verify=False`` is for further readers of a set that one reader has verified. ``version`` is
    the model version that the set must be of: the folder's name, for a set in a store.

    Raises:
        NotFound: no complete set there. NewerFormat: written by a newer version.
        CorruptFile: a file was altered, cut or lost, or the set is of another version.
    """
    manifest = read_manifest(folder, kind=KIND, version=VERSION)
    if version is not None and manifest["model_version"] != version:
        raise CorruptFile(
            f"{folder}: another embedding set's folder",
            expected=f"the manifest of version {version}",
            got=f"that of version {manifest['model_version']}",
            hint="give the folder the version of its manifest as its name again",
        )
    entries = [FileEntry(**entry) for entry in manifest["files"]]
    if verify:
        verify_files(folder, entries)
    return EmbeddingSet(
        folder=folder,
        model_version=manifest["model_version"],
        dim=manifest["dim"],
        metric=Metric(manifest["metric"]),
        normalised=manifest["normalised"],
        rows=manifest["rows"],
        created_at=manifest["created_at"],
        files=tuple(entry for entry in entries if entry.rows is not None),
        has_queries=any(entry.name == QUERIES_NAME for entry in entries),
        cut=_cut_in(manifest, folder),
    )


class EmbeddingWriter:
    """Appends batches to a staged set; see ``embedding_writer``.

    cut: as in ``EmbeddingSet``, until the block ends.
    """

    def __init__(
        self, folder: Path, dim: int, metric: Metric, rows_per_file: int, cut: Cut | None = None
    ) -> None:
        self.folder = folder
        self.dim = dim
        self.metric = metric
        self.cut = cut
        self.files: list[FileEntry] = []
        self._rows_per_file = rows_per_file
        self._writer: Any = None
        self._schema: pa.Schema | None = None
        self._rows = 0
        self._ids: list[IdArray] = []

    def append(
        self, item_ids: IdArray, vectors: FloatArray, attributes: pa.RecordBatch | None = None
    ) -> None:
        """item_ids (n,) int64, vectors (n, dim) float32, attributes n rows in the same order.

        Vectors are stored with unit length when the metric is cosine.

        Raises:
            InvalidInput: an id or vector that ``shards.core.schema`` refuses, or other attribute
                columns than before.
        """
        ids = check_ids(item_ids)
        if attributes is not None:
            _refuse_reserved(attributes.schema.names)
        batch = item_batch(ids, self._stored(vectors, "embedding"), attributes)
        self._schema = self._schema or batch.schema
        if batch.schema != self._schema:
            raise InvalidInput(
                "attribute columns changed",
                field="attributes",
                expected=_columns(self._schema),
                got=_columns(batch.schema),
            )
        self._ids.append(ids)
        for start in range(0, len(ids), ROWS_PER_BATCH):
            self._write(batch.slice(start, ROWS_PER_BATCH))

    def queries(self, vectors: FloatArray) -> None:
        """Adds the sample queries: vectors (n, dim) float32, at most MAX_SAMPLE_QUERIES.

        Raises:
            InvalidInput: a vector that ``shards.core.schema`` refuses.
        """
        assert len(vectors) <= MAX_SAMPLE_QUERIES
        write_queries(self.folder / QUERIES_NAME, self._stored(vectors, "queries"))

    def finish(self) -> int:
        """Closes the last file; the number of rows written.

        Raises:
            InvalidInput: no rows at all, or an item id that was appended twice.
        """
        self._close()
        if not self._ids:
            raise InvalidInput("an embedding set without items", expected="at least one row")
        return len(check_ids(np.concatenate(self._ids), unique=True))

    def _stored(self, vectors: FloatArray, field: str) -> FloatArray:
        checked = check_vectors(vectors, dim=self.dim, metric=self.metric, field=field)
        return unit_vectors(checked, self.metric)

    def _write(self, batch: pa.RecordBatch) -> None:
        while batch.num_rows:
            if self._writer is None:
                path = self.folder / f"items-{len(self.files):05d}.arrow"
                self._writer = pa.ipc.new_file(str(path), batch.schema)
            head = batch.slice(0, self._rows_per_file - self._rows)
            self._writer.write_batch(head)
            self._rows += head.num_rows
            batch = batch.slice(head.num_rows)
            if self._rows == self._rows_per_file:
                self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            name = f"items-{len(self.files):05d}.arrow"
            self.files.append(describe_file(self.folder, name, self._rows))
            self._writer, self._rows = None, 0


@contextmanager
def embedding_writer(
    target: Path,
    *,
    model_version: str,
    dim: int,
    metric: Metric,
    created_at: str,
    cut: Cut | None = None,
    rows_per_file: int = ROWS_PER_FILE,
) -> Iterator[EmbeddingWriter]:
    """A writer whose set appears at ``target``, complete, when the block ends without an error.

    Whatever else the block puts into ``writer.folder`` is listed in the manifest too.
    created_at: ISO 8601 time, the caller's clock. cut: as in ``EmbeddingSet``.

    Raises:
        FileExistsError: the target exists already.
    """
    with staged_folder(target) as staging:
        writer = EmbeddingWriter(staging, dim, metric, rows_per_file, cut)
        try:
            yield writer
            rows = writer.finish()
        finally:
            writer._close()
        names = {entry.name for entry in writer.files}
        others = [entry for entry in describe_tree(staging) if entry.name not in names]
        body = {
            "model_version": model_version,
            "dim": dim,
            "metric": str(metric),
            "normalised": metric is Metric.COSINE,
            "rows": rows,
            "created_at": created_at,
            "cut": None if writer.cut is None else writer.cut.to_json(),
            "files": [asdict(entry) for entry in [*writer.files, *others]],
        }
        write_manifest(staging, kind=KIND, version=VERSION, body=body)


def _cut_in(manifest: dict[str, Any], folder: Path) -> Cut | None:
    try:
        return cut_from_json(manifest.get("cut"))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{folder}: the manifest's cut is none", got=repr(error)) from error


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _refuse_reserved(names: list[str]) -> None:
    for name in ("item_id", "embedding"):
        if name in names:
            raise InvalidInput(
                "an attribute has the name of a column of ours",
                field=name,
                hint="rename the catalogue's column",
            )


def _check_schema(schema: pa.Schema, dim: int, path: Path) -> None:
    expected = {"item_id": pa.int64(), "embedding": pa.list_(pa.float32(), dim)}
    found = {name: schema.field(name).type for name in schema.names[:2]}
    if list(found) != list(expected) or any(found[n] != expected[n] for n in expected):
        raise CorruptFile(
            f"{path}: wrong columns",
            expected=", ".join(f"{name} {kind}" for name, kind in expected.items()),
            got=", ".join(f"{name} {kind}" for name, kind in found.items()),
        )


def as_data_error(error: InvalidInput, where: Path | str) -> DataError:
    """What ``shards.core.schema`` refused, as a fault of the file it was read from."""
    field = f"{where}: {error.field}" if error.field else str(where)
    return DataError(
        error.message, field=field, expected=error.expected, got=error.got, hint=error.hint
    )
