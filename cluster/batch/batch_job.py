"""What a job is: everything that its result depends on, and a fingerprint of it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardline.cluster.batch.queries import QuerySource
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.files import MANIFEST_NAME, sha256_of
from shardline.shards.core.filter_language import check_filter
from shardline.shards.core.messages import NO_PARAMS, SearchParams
from shardline.shards.core.schema import MAX_K, check_k
from shardline.shards.storage.generation import GenerationManifest

FORMAT_VERSION = 1  # of parts: raised when the same job would give other bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What each query gets: ``k`` results, and which columns beside their ids and scores.

    attributes: names in the order of their columns. An item among the queries is left out of its
    own results where ``drops_own`` is set. filter: what items must match, None for all.
    """

    k: int
    params: SearchParams = NO_PARAMS
    attributes: tuple[str, ...] = ()
    original_ids: bool = False
    drops_own: bool = False
    filter: dict[str, Any] | None = None

    @property
    def searched_k(self) -> int:
        """Results asked of the index: one more where one may be dropped."""
        return self.k + self.drops_own

    @property
    def packed_filter(self) -> bytes:
        """As shards take it; b"" for none. Raises InvalidInput: it is no filter."""
        return b"" if self.filter is None else check_filter(self.filter, "--filter")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A job: its queries and generation by content, what is wanted, and how it is cut into blocks.

    content: of the generation, the checksum of its manifest; of a live cluster, its model. live: a
    running cluster answers, with the writes that it has by then.
    """

    queries: dict[str, Any]
    rows: int
    generation: int
    content: str
    wanted: Wanted
    block_rows: int
    live: bool = False

    @property
    def described(self) -> dict[str, Any]:
        """As JSON, for the output folder."""
        described = asdict(self) | {"parts_format": FORMAT_VERSION}
        if self.wanted.filter is None:  # as jobs were described before there were filters
            del described["wanted"]["filter"]
        return described

    @property
    def fingerprint(self) -> str:
        """16 hex digits, in the names of its parts: the same for the same job wherever it runs."""
        canonical = json.dumps(self.described, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def checked_wanted(wanted: Wanted) -> Wanted:
    """Raises InvalidInput: k is out of range, a name comes twice, or the filter is none."""
    check_k(wanted.k, limit=MAX_K - wanted.drops_own)
    _ = wanted.packed_filter
    for name in wanted.attributes:
        if wanted.attributes.count(name) > 1:
            raise InvalidInput("named twice", field="--return", got=name)
    return wanted


def job_of(
    source: QuerySource,
    folder: Path,
    manifest: GenerationManifest,
    wanted: Wanted,
    block_rows: int,
) -> BatchJob:
    """The job of a source's queries on the generation in ``folder``."""
    return BatchJob(
        queries=source.identity,
        rows=source.rows,
        generation=manifest.generation,
        content=sha256_of(folder / MANIFEST_NAME),
        wanted=wanted,
        block_rows=block_rows,
    )
