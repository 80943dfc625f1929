"""The steps of a halving, and what a configuration gives at one of them: points, times, sizes."""

from dataclasses import dataclass, replace

from shardline.cluster.tuner.configurations import Configuration
from shardline.cluster.tuner.corpus_sample import CorpusSample
from shardline.cluster.tuner.timing import Latency
from shardline.shards.core.messages import SearchParams
from shardline.shards.index.spec import MEASURED_K

STEP = 4  # rows of a rung over those of the rung before
RUNGS = 3
LEAST_RUNG_ROWS = 8000  # of fewer rows, which fit into caches, times say little
LEAST_COUNTED = 5  # results per query: fewer say little


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of the halving: so many ``rows`` of the sample are indexed.

    Each query asks for ``asked`` results, of which the first ``counted`` count. is_last: with the
    whole sample, and trained as a build trains.
    """

    number: int
    rows: int
    asked: int
    counted: int
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a configuration gives with search parameters.

    recall: the share that the target is on, and its standard error; overlap: of the exact
    neighbours, the same without held-out interactions. latency: of a query and shard.
    """

    params: SearchParams
    recall: float
    error: float
    overlap: float
    latency: Latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A configuration after a rung; ``chosen`` is the point that a build would choose.

    rows: indexed; is_last: as many as are measured at most. growth: of the times, from these rows
    to those of a shard. build_seconds: of training and adding the rows; seconds: of all of it.
    """

    configuration: Configuration
    rows: int
    is_last: bool
    points: tuple[Point, ...]
    chosen: Point
    growth: float
    build_seconds: float
    seconds: float

    def scaled(self, factor: float) -> "Outcome":
        """With all latencies times a factor."""
        points = tuple(replace(p, latency=p.latency.scaled(factor)) for p in self.points)
        chosen = next(p for p in points if p.params == self.chosen.params)
        return replace(self, points=points, chosen=chosen)

    def with_chosen(self, chosen: Point) -> "Outcome":
        """With the point of these parameters, which is the chosen one, in place of what it was."""
        points = tuple(chosen if p.params == chosen.params else p for p in self.points)
        return replace(self, points=points, chosen=chosen)


def rungs_of(sample: CorpusSample) -> list[Rung]:
    """RUNGS at most, ascending; the last has the whole sample."""
    sizes = [len(sample.vectors)]
    while len(sizes) < RUNGS and sizes[0] // STEP >= LEAST_RUNG_ROWS:
        sizes.insert(0, sizes[0] // STEP)
    rungs = []
    for number, rows in enumerate(sizes):
        counted = min(MEASURED_K, max(LEAST_COUNTED, round(MEASURED_K * rows / sample.rows)))
        asked = max(counted, min(MEASURED_K, counted * sample.shards))
        rungs.append(
            Rung(number=number, rows=rows, asked=asked, counted=counted, is_last=rows == sizes[-1])
        )
    return rungs
