"""A file of queries: it must stay as it was at its checksum for as long as the job reads it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from shardline.shards.core.errors import DataError
from shardline.shards.storage.locations import Location, Version
from shardline.shards.storage.table_parts import Part, TableFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A part with the name the user knows it by, and the checksum of what the user has there.

    version: of the part's file when it was opened, before the checksum.
    """

    part: Part
    name: str
    sha256: str
    version: Version

    @property
    def rows(self) -> int:
        return self.part.num_rows

    def batches(
        self, columns: Sequence[str], first: int = 0
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """As ``Part.batches``; every batch is of the content that the checksum is of.

        Raises:
            DataError: as there, or the file is not what it was.
        """
        try:
            for row, batch in self.part.batches(columns, first):
                if self.part.form is not TableFormat.PARQUET:
                    # pages of a mapped file: whoever cuts it short ends a process that reads them
                    self._refuse_changed()
                    batch = _copied(batch)
                self._refuse_changed()
                yield row, batch
        except DataError:
            self._refuse_changed()  # the reason of whatever was found amiss
            raise

    def _refuse_changed(self) -> None:
        refuse_changed(self.part.location, self.version, self.name)


def refuse_changed(location: Location, version: Version, name: str) -> None:
    """Raises DataError: the file is not the one that it was at ``version``."""
    found = location.version()
    if found != version:
        raise DataError(
            f"{name}: changed while the job reads it",
            expected="the file as it was at the job's start",
            got="no file" if found is None else "another size or time of change",
            hint="leave the files of a running job as they are, and start it again",
        )


def _copied(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.take(pa.array(range(batch.num_rows), pa.int64()))
