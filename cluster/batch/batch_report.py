"""What a job did, in figures."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from shardline.cluster.batch.batch_job import BatchJob
from shardline.cluster.batch.job_parts import Parts
from shardline.cluster.batch.part_files import ClaimedFolder, OutputFolder
from shardline.cluster.batch.spans import Span
from shardline.shards.core.progress import Progress


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


@dataclass(slots=True)
class RunningJob:
    """A job between its start and its manifest: what is left to do, and what was done.

    passes: over the shards, set by whoever makes them.
    """

    output: OutputFolder
    parts: Parts
    todo: Sequence[Span]
    way: str
    started: float
    passes: int = 0
    ended: float = 0.0

    @property
    def report(self) -> BatchReport:
        """Of a job that has ended."""
        parts, job, seconds = self.parts, self.parts.job, self.ended - self.started
        return BatchReport(
            output=str(self.output.path),
            way=self.way,
            generation=job.generation,
            queries=job.rows,
            k=job.wanted.k,
            parts=len(parts.entries),
            resumed_parts=parts.resumed,
            searched=parts.searched,
            seconds=round(seconds, 3),
            queries_per_s=round(parts.searched / seconds, 1),
            bytes=sum(entry.bytes for entry in parts.entries.values()),
            passes=self.passes,
            # kilobytes on Linux
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            fingerprint=job.fingerprint,
        )


@contextmanager
def timed_job(
    job: BatchJob, claimed: ClaimedFolder, progress: Progress, *, way: str
) -> Iterator[RunningJob]:
    """Begins or resumes the job; the block does what is left, and then the result is complete.

    Raises:
        DataError: the folder holds another job's result.
    """
    started = time.monotonic()
    output, parts = claimed.begin(job), Parts(job, progress)
    run = RunningJob(output, parts, parts.resume(output), way, started)
    if run.todo:
        output.reopen()
    yield run
    output.finish(parts.ordered)
    run.ended = time.monotonic()
