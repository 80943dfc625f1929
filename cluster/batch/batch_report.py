"""What a job did, in figures."""

import resource
from dataclasses import dataclass

from shardline.cluster.batch.local_batch import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """queries: all of the job; searched: those that this run answered, in ``seconds``, which
    include the loading of shards; queries_per_s: of these. bytes: of all parts. passes: over the
    shards. peak_rss_bytes: of this process. way: local, ray or live."""

    output: str
    way: str
    generation: int
    queries: int
    k: int
    parts: int
    resumed_parts: int
    searched: int
    seconds: float
    queries_per_s: float
    bytes: int
    passes: int
    peak_rss_bytes: int
    fingerprint: str


def report_of(parts: Parts, output: str, *, way: str, passes: int, seconds: float) -> BatchReport:
    """The report of a finished job."""
    job, entries = parts.plan.job, parts.ordered
    return BatchReport(
        output=output,
        way=way,
        generation=job.generation,
        queries=job.rows,
        k=job.wanted.k,
        parts=len(entries),
        resumed_parts=parts.resumed,
        searched=parts.searched,
        seconds=round(seconds, 3),
        queries_per_s=round(parts.searched / seconds, 1),
        bytes=sum(entry.bytes for entry in entries),
        passes=passes,
        # kilobytes on Linux
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        fingerprint=job.fingerprint,
    )
