"""The configurations of an index that are tried: kinds, and the parameters a build fixes.

Only what is fixed when an index is built. The parameters of a search (nprobe, ef_search,
rerank_factor) are measured for each, as every build does (``cluster.tuning``).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardline.shards.core.errors import ConfigError, InvalidInput
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import ROWS_PER_LIST_MIN, resolve
from shardline.shards.index.spec import Device, IndexKind, IndexSpec, Rerank, ResolvedIndex
from shardline.shards.index.template import bytes_to_come

# The likeliest first: when the time is up, the rest has not been tried.
KINDS = (
    IndexKind.IVFPQ_FS,
    IndexKind.IVF,
    IndexKind.IVFPQ,
    IndexKind.SQ8,
    IndexKind.FLAT,
    IndexKind.HNSW,
    IndexKind.PQ,
)
NLIST_SCALES = (0.5, 1.0, 2.0)  # of what a build takes by itself, about 2 sqrt(rows)
# sub-vectors of the codes, as shares of the dimension
M_SHARES = {
    IndexKind.IVFPQ_FS: (1 / 2, 1 / 4),
    IndexKind.IVFPQ: (1 / 2, 1 / 4, 1 / 8),
    IndexKind.PQ: (1 / 2, 1 / 4),
}
RERANKS = {
    IndexKind.IVFPQ_FS: (Rerank.FP16, Rerank.FP32),  # FastScan scores are never the last word
    IndexKind.IVFPQ: (Rerank.NONE, Rerank.FP16),
    IndexKind.PQ: (Rerank.NONE, Rerank.FP16),
}
GRAPHS = ((16, 80), (32, 80), (32, 200))  # hnsw_m, ef_construction
PCA_FROM_DIM = 256  # below, a PCA saves less than its re-ranking costs
PCA_SHARE = 1 / 4
SHOWN = ("nlist", "m", "hnsw_m", "ef_construction", "pca", "rerank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One index that could be built over the whole corpus; bytes are per vector, as after a build.

    variations: 0 for what is tried first; 1 for another number of lists than a build takes by
    itself, for copies in full precision, or for a graph built with more care; 2 for two of these.
    """

    spec: IndexSpec
    index: ResolvedIndex
    bytes_per_vector: float
    variations: int

    @property
    def name(self) -> str:
        """The kind and what sets it apart, such as ``ivfpq-fs nlist=2048 m=64 rerank=fp16``."""
        given = ((name, getattr(self.spec, name)) for name in SHOWN)
        return " ".join([self.spec.kind, *(f"{name}={value}" for name, value in given if value)])

    @property
    def family(self) -> tuple[object, ...]:
        """What it has in common with its variations."""
        spec = self.spec
        return spec.kind, spec.m, spec.hnsw_m, spec.pca, spec.rerank is Rerank.NONE


def configurations(
    *, rows: int, dim: int, metric: Metric, kinds: Collection[IndexKind] = ()
) -> list[Configuration]:
    """All that are worth a try over a corpus of ``rows`` x ``dim``, the likeliest kinds first.

    kinds: only these; none for all. What cannot be built over so few rows is left out.

    Raises:
        InvalidInput: nothing is left.
    """
    found: dict[str, Configuration] = {}
    for kind in KINDS:
        if kinds and kind not in kinds:
            continue
        for fields in _fields_of(kind, dim):
            for nlist, is_own in _lists(kind, rows, dim, metric):
                spec = IndexSpec(kind=kind, nlist=nlist, device=Device.CPU, **fields)
                try:
                    index = resolve(spec, rows=rows, dim=dim, metric=metric)
                except ConfigError:
                    continue  # too few rows for its codes, say
                careful = fields.get("ef_construction") == GRAPHS[-1][1]
                made = Configuration(
                    spec=spec,
                    index=index,
                    bytes_per_vector=bytes_to_come(index, dim=dim, metric=metric),
                    variations=(not is_own) + (spec.rerank is Rerank.FP32) + careful,
                )
                found.setdefault(made.name, made)
    if not found:
        raise InvalidInput(
            "no index of these kinds can be built over this corpus",
            field="--kind",
            expected=", ".join(KINDS),
            got=f"{', '.join(kinds) or 'all'}, for {rows:,} rows x {dim}",
        )
    return list(found.values())


def within_bytes(
    tried: Sequence[Configuration], max_bytes_per_vector: float | None
) -> list[Configuration]:
    """Those that fit; what an index takes is known before it is built.

    Raises:
        InvalidInput: none does.
    """
    if max_bytes_per_vector is None:
        return list(tried)
    fitting = [each for each in tried if each.bytes_per_vector <= max_bytes_per_vector]
    if not fitting:
        least = min(tried, key=lambda each: each.bytes_per_vector)
        raise InvalidInput(
            "no configuration is that small",
            field="--max-bytes-per-vector",
            expected=f">= {least.bytes_per_vector:.0f}, what {least.name} takes",
            got=f"{max_bytes_per_vector:g}",
        )
    return fitting


def _fields_of(kind: IndexKind, dim: int) -> Iterator[dict[str, Any]]:
    """The build parameters to try, without the number of lists."""
    if kind is IndexKind.HNSW:
        for links, queue in GRAPHS:
            yield {"hnsw_m": links, "ef_construction": queue}
        return
    for share in M_SHARES.get(kind, (None,)):
        m = None if share is None else nearest_divisor(dim, share)
        for rerank in RERANKS.get(kind, (None,)):
            yield {"m": m, "rerank": rerank}
    if dim >= PCA_FROM_DIM and kind in (IndexKind.IVF, IndexKind.IVFPQ_FS):
        pca = nearest_divisor(dim, PCA_SHARE)
        m = nearest_divisor(pca, 1 / 2) if kind is IndexKind.IVFPQ_FS else None
        yield {"m": m, "rerank": Rerank.FP16, "pca": pca}


def nearest_divisor(dim: int, share: float) -> int:
    """The divisor of ``dim`` that is nearest to that share of it, in ratio; the smaller of two."""
    wanted = max(dim * share, 1.0)
    divisors = (each for each in range(1, dim + 1) if dim % each == 0)
    return min(divisors, key=lambda each: max(each / wanted, wanted / each))


def _lists(
    kind: IndexKind, rows: int, dim: int, metric: Metric
) -> Iterator[tuple[int | None, bool]]:
    """Numbers of lists to try, and whether each is what a build takes by itself."""
    own = resolve(IndexSpec(kind=IndexKind.IVF), rows=rows, dim=dim, metric=metric).nlist
    if own is None or kind not in (IndexKind.IVF, IndexKind.IVFPQ, IndexKind.IVFPQ_FS):
        yield None, True
        return
    for scale in sorted(NLIST_SCALES, key=lambda scale: scale != 1.0):
        nlist = round(own * scale)
        if scale == 1.0 or 1 <= nlist <= rows // ROWS_PER_LIST_MIN:
            yield nlist, scale == 1.0
