"""The output folder of a job: one Parquet part per block, complete or absent, and what the job is.

    _job.json                           the job, written first; another job is refused
    part-000012-5f0c2d9e8b7a6541.parquet  block 12 of the job with that fingerprint
    _manifest.json                      all parts with their checksums; written last
    _work/                              what a running job keeps; gone at its end

Names that begin with ``_`` are passed over by Spark, DuckDB, Polars, pandas and Arrow.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shardline.cluster.batch.batch_job import BatchJob
from shardline.cluster.batch.spans import Span
from shardline.shards.core.errors import DataError, Unavailable
from shardline.shards.core.files import (
    MANIFEST_NAME,
    FileEntry,
    atomic_path,
    describe_file,
    fsync_folder,
    write_json,
    write_manifest,
)
from shardline.shards.core.small_files import MAX_MANIFEST_BYTES, read_json
from shardline.shards.storage.column_types import LIBRARY_ERRORS

KIND = "batch result"
MANIFEST_VERSION = 1
JOB_NAME = "_job.json"
LOCK_NAME = "_lock"
WORK_NAME = "_work"
BLOCK_KEY = b"shardline.block"  # in the footer of a part: which block of which job it is
# what a killed process leaves of a file
UNFINISHED = re.compile(
    r"\.(_job\.json|_manifest\.json|part-\d{6,}-[0-9a-f]{16}\.parquet)\.\w+\.tmp"
)
NEW_FOLDER = "choose an empty or a new folder, or remove this one"


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder that holds the parts of one job, locked for this process."""

    path: Path
    job: BatchJob

    @property
    def work(self) -> Path:
        """For files of the running job; empty at its start."""
        return self.path / WORK_NAME

    def part_name(self, span: Span) -> str:
        return f"part-{span.number:06d}-{self.job.fingerprint}.parquet"

    def write(self, span: Span, table: pa.Table) -> FileEntry:
        """The part of a block, atomically; its rows are those of the block, in order.

        Raises:
            OSError: the disk is full, say. What was written before stays.
        """
        assert table.num_rows == len(span)
        name = self.part_name(span)
        table = table.replace_schema_metadata({BLOCK_KEY: _mark(self.job, span)})
        with atomic_path(self.path / name) as temporary:
            # plain pages: ids do not repeat enough for a dictionary, and all readers know these
            pq.write_table(
                table,
                temporary,
                compression="snappy",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                row_group_size=len(span),
            )
        return describe_file(self.path, name, rows=len(span))

    def kept(self, spans: Sequence[Span]) -> Iterator[tuple[Span, FileEntry]]:
        """The blocks whose parts are here and whole: every page is read. Others are removed."""
        # one listing: a network disk remembers for half a minute that a name asked for was absent
        present = {path.name for path in self.path.iterdir()}
        for span in spans:
            path = self.path / self.part_name(span)
            if path.name not in present:
                continue
            if _is_whole(path, _mark(self.job, span), len(span)):
                yield span, describe_file(self.path, path.name, rows=len(span))
            else:
                self.reopen()
                path.unlink()

    def reopen(self) -> None:
        """No longer complete: call it before a part is removed or written."""
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        fsync_folder(self.path)

    def finish(self, entries: Sequence[FileEntry]) -> None:
        """Declares the result complete. Call it last."""
        shutil.rmtree(self.work, ignore_errors=True)
        body = {
            "fingerprint": self.job.fingerprint,
            "job": self.job.described,
            "rows": self.job.rows,
            "parts": [asdict(entry) for entry in entries],
        }
        write_manifest(self.path, kind=KIND, version=MANIFEST_VERSION, body=body)


@dataclass(frozen=True, slots=True)
class ClaimedFolder:
    """A folder that is this process's alone, and new, empty, or a batch job's."""

    path: Path

    @property
    def work(self) -> Path:
        """For files of the running job; empty at its start, gone at its end."""
        return self.path / WORK_NAME

    def begin(self, job: BatchJob) -> OutputFolder:
        """Notes the job, if it is not the one noted here already.

        Raises:
            DataError: it holds another job's result.
        """
        try:
            found = read_json(self.path / JOB_NAME, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            write_json(self.path / JOB_NAME, {"kind": KIND, **job.described})
            return OutputFolder(self.path, job)
        # as JSON gives it back: tuples are lists there
        wanted = json.loads(json.dumps({"kind": KIND, **job.described}))
        differing = _way_differs(found, wanted) or _differences(found, wanted)
        if differing:
            raise DataError(
                f"{self.path}: the output of another job",
                got="; ".join(differing),
                hint=_way_on(found, job),
            )
        return OutputFolder(self.path, job)


@contextmanager
def claimed_folder(path: Path) -> Iterator[ClaimedFolder]:
    """The output folder of a job, made or found, for this process alone.

    What a killed process has left unfinished is removed. A folder in which no job began is left as
    it was found.

    Raises:
        DataError: it holds something else than a batch job's output. Unavailable: another process
            works in it.
    """
    _check_folder(path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(path):
            for left in _unfinished(path):
                left.unlink()
            shutil.rmtree(path / WORK_NAME, ignore_errors=True)
            (path / WORK_NAME).mkdir()
            try:
                yield ClaimedFolder(path)
            finally:
                shutil.rmtree(path / WORK_NAME, ignore_errors=True)
                if not (path / JOB_NAME).exists():
                    (path / LOCK_NAME).unlink(missing_ok=True)
    finally:
        if is_new:
            with suppress(OSError):  # another process uses it by now
                path.rmdir()


def _check_folder(path: Path) -> None:
    if not path.exists():
        if path.is_symlink():
            hint = "make that folder, or choose another path"
            raise DataError(f"{path}: a link to {path.readlink()}, which does not exist", hint=hint)
        return
    if not path.is_dir():
        raise DataError(f"{path}: a file, where the folder of results is needed", hint=NEW_FOLDER)
    names = {each.name for each in path.iterdir()}
    if JOB_NAME in names:
        return
    ours = {LOCK_NAME, WORK_NAME, *(each.name for each in _unfinished(path))}
    others = sorted(names - ours if LOCK_NAME in names else names)
    if others:
        raise DataError(
            f"{path}: not empty, and not the output of a batch job",
            got=", ".join(others[:5]),
            hint=NEW_FOLDER,
        )


def _unfinished(path: Path) -> list[Path]:
    return [each for each in path.iterdir() if UNFINISHED.fullmatch(each.name)]


def _mark(job: BatchJob, span: Span) -> bytes:
    return f"{job.fingerprint}-{span.number}".encode()


def _is_whole(path: Path, mark: bytes, rows: int) -> bool:
    try:
        with pa.memory_map(str(path)) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            metadata = parquet.schema_arrow.metadata or {}
            if metadata.get(BLOCK_KEY) != mark:
                return False
            found: int = sum(batch.num_rows for batch in parquet.iter_batches())
            return found == rows
    except LIBRARY_ERRORS:
        return False


def _differences(found: object, wanted: dict[str, object], prefix: str = "") -> list[str]:
    """Where two jobs differ, as 'k: 10 there, 100 here'."""
    if not isinstance(found, dict):
        return [f"{prefix or 'the note of the job'}: not readable"]
    texts: list[str] = []
    for name in sorted({*found, *wanted}):
        there, here = found.get(name), wanted.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            texts += _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            texts.append(f"{prefix}{name}: {_short(there)} there, {_short(here)} here")
    return texts


def _way_differs(found: object, wanted: dict[str, object]) -> list[str]:
    """Of a job by a running cluster and one offline, whose other fields mean different things."""
    if not isinstance(found, dict) or found.get("live") == wanted["live"]:
        return []
    return ["one by a running cluster" if found.get("live") else "one offline"]


def _way_on(found: object, job: BatchJob) -> str:
    """What to do where the folder holds the job ``found``: most often an earlier generation's."""
    there = found.get("generation") if isinstance(found, dict) else None
    is_offline = not job.live and isinstance(found, dict) and found.get("live") is False
    if not is_offline or type(there) is not int or there == job.generation:
        return NEW_FOLDER
    return f"--generation {there} goes on with that one, while the store has it; else {NEW_FOLDER}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = _lock_handle(folder)
    try:
        yield
    finally:
        os.close(handle)


def _lock_handle(folder: Path) -> int:
    """The lock's file, locked. Raises Unavailable: another process has it."""
    while True:
        handle = os.open(folder / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise Unavailable(
                f"{folder}: another process writes its results here",
                hint="wait until it has ended, or choose another folder",
            ) from error
        if _is_at(handle, folder / LOCK_NAME):
            return handle
        os.close(handle)  # its holder removed it between our two calls: the name is free again


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
