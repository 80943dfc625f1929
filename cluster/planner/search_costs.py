"""What one search of one shard costs one thread, term by term, from ``measured_costs``.

cost = call + centroids + lists opened + rows read + candidates re-ranked. Costs were measured at
128 dimensions and are scaled with the bytes that are read: of a centroid, of a code, of a copy.
"""

import math
from dataclasses import dataclass

from shardline.cluster.planner.index_sizes import code_bytes
from shardline.cluster.planner.measured_costs import (
    CENTROID_COSTS,
    KIND_COSTS,
    MEASURED_DIM,
)
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.index.spec import MEASURED_K, ResolvedIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """``count`` times ``each_us`` of processor time."""

    what: str
    count: float
    each_us: float

    @property
    def us(self) -> float:
        return self.count * self.each_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """Search parameters: lists searched, candidates re-ranked as a multiple of k; None where the
    kind has none."""

    nprobe: int | None
    rerank_factor: int | None


def search_terms(
    index: ResolvedIndex, depth: Depth, *, rows: int, dim: int, metric: Metric, k: int
) -> tuple[Term, ...]:
    """Of one query for k results over ``rows``, the rows of a shard.

    As in a search: for more than MEASURED_K results proportionally more lists are visited, and for
    fewer as many candidates are re-ranked.

    Raises:
        InvalidInput: a kind whose costs were not measured.
    """
    costs = KIND_COSTS.get(index.kind)
    if costs is None:
        raise InvalidInput(
            "the costs of this kind have not been measured",
            field="--kind",
            expected=f"one of {', '.join(sorted(KIND_COSTS))}",
            got=str(index.kind),
            hint="`shardline bench index` and `shardline tune` measure it on your vectors",
        )
    more = max(1.0, k / MEASURED_K)
    wide = dim / MEASURED_DIM
    terms = [Term(what="call", count=1, each_us=costs.call_us)]
    scanned = float(rows)
    if index.nlist:
        lists = min(float(depth.nprobe or 1) * more, float(index.nlist))
        scanned = rows * lists / index.nlist
        terms += [
            Term(
                what="centroids compared",
                count=index.nlist,
                each_us=centroid_us(index.nlist * dim / MEASURED_DIM) * wide,
            ),
            Term(what="lists opened", count=lists, each_us=costs.list_us * wide),
        ]
    read = code_bytes(index, dim=dim, metric=metric) / costs.code_bytes
    terms.append(Term(what="rows read", count=scanned, each_us=costs.row_us * read))
    if index.rerank_factor is not None:
        candidates = float(max(k, MEASURED_K) * (depth.rerank_factor or 1))
        terms.append(
            Term(
                what="candidates re-ranked",
                count=min(candidates, scanned),
                each_us=costs.candidate_us * wide,
            )
        )
    return tuple(terms)


def centroid_us(lists: float) -> float:
    """Of one centroid of MEASURED_DIM, among so many: more of them lie in no cache. Between the
    numbers measured it follows their logarithm."""
    (few, cheap), (many, dear) = CENTROID_COSTS
    share = math.log(max(lists, 1) / few) / math.log(many / few)
    return cheap + (dear - cheap) * min(max(share, 0.0), 1.0)
