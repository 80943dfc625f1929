"""From an ``IndexSpec``, most fields optional, to the one concrete index that follows from it.

``resolve`` returns a faiss factory string, the search-time defaults, and a sentence that gives the
reason. Every limit is checked here, before anything is trained, so a query cannot exceed one.
"""

import math
from typing import Any

import faiss

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.schema import Metric
from shardline.shards.index.layers import Layers, faiss_metric, layers_of
from shardline.shards.index.spec import (
    MEASURED_K,
    Device,
    IndexKind,
    IndexSpec,
    Rerank,
    ResolvedIndex,
    Storage,
)

AUTO_FLAT_ROWS_CPU = 20_000  # below this an exact scan takes about a millisecond on one core
AUTO_FLAT_ROWS_GPU = 500_000  # 256 MB at 128-d: a tenth of a millisecond of GPU memory bandwidth
AUTO_IVF_BYTES_GPU = 8 << 30  # beyond this, compress: a shard's vectors would crowd a GPU
# A quarter of the lists, within bounds. Queries of a query tower lie outside
# the clusters of the items: at 100,000 items 32 of 512 lists gave recall@100 .84, 128 gave .97 and
# a query still took a tenth of an exact scan (bench/index/kinds.py, `make demo`).
PROBED_SHARE = 4
DEFAULT_NPROBE_RANGE = (32, 128)
DEFAULT_RERANK_FACTOR = 4
DEFAULT_HNSW_M = 32
DEFAULT_EF_CONSTRUCTION = 80
DEFAULT_EF_SEARCH = 256
ROWS_PER_LIST_MIN = 39  # k-means needs about this many training points per centroid
TRAIN_ROWS_PER_LIST = 64
TRAIN_ROWS_MIN = 65_536  # 256 points for each of 256 product quantiser centroids
GPU_MAX_CANDIDATES = 2048  # that a GPU index finds per query, and so that are re-ranked
GPU_SQ8_DIM = 6144  # its scales, 8 bytes per dimension, must be below 48 KiB of shared memory
GPU_PQ_M = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)

IVF_KINDS = frozenset({IndexKind.IVF, IndexKind.IVFPQ, IndexKind.IVFPQ_FS})
PQ_KINDS = frozenset({IndexKind.PQ, IndexKind.IVFPQ, IndexKind.IVFPQ_FS})
EXACT_KINDS = frozenset({IndexKind.FLAT, IndexKind.IVF, IndexKind.HNSW})
GPU_KINDS = frozenset({IndexKind.FLAT, IndexKind.IVF, IndexKind.IVFPQ})
# Which kinds read a field; set for another kind it is refused, because it would do nothing.
FIELD_KINDS: dict[str, frozenset[IndexKind]] = {
    "nlist": IVF_KINDS,
    "nprobe": IVF_KINDS | {IndexKind.FACTORY},
    "m": PQ_KINDS,
    "nbits": PQ_KINDS,
    "storage": frozenset({IndexKind.FLAT, IndexKind.IVF}),
    "hnsw_m": frozenset({IndexKind.HNSW}),
    "ef_construction": frozenset({IndexKind.HNSW, IndexKind.FACTORY}),
    "ef_search": frozenset({IndexKind.HNSW, IndexKind.FACTORY}),
    "rerank": frozenset(IndexKind) - {IndexKind.FACTORY},
    "rerank_factor": frozenset(IndexKind),
    "pca": frozenset(IndexKind) - {IndexKind.FACTORY},
    "factory": frozenset({IndexKind.FACTORY}),
}


def resolve(
    spec: IndexSpec, *, rows: int, dim: int, metric: Metric, gpu: bool = False
) -> ResolvedIndex:
    """The concrete index for a corpus of ``rows`` x ``dim``; ``gpu``: a GPU build and a GPU exist.

    Raises:
        ConfigError: an illegal value or combination; the error's field is ``index.<name>``.
    """
    if rows < 1:
        raise _refuse("kind", "no rows to index", expected=">= 1 row", got=str(rows))
    kind, reason = _choose_kind(spec, rows, dim, gpu)
    _refuse_unused_fields(spec, kind)
    device = _choose_device(spec, kind, gpu)
    if kind is IndexKind.FACTORY:
        return _resolve_factory(spec, rows, dim, metric, reason)
    inner_dim = _inner_dim(spec, rows, dim)
    nlist = _choose_nlist(spec, rows) if kind in IVF_KINDS else None
    rerank = _choose_rerank(spec, kind, device)
    parts = [
        f"PCA{spec.pca}" if spec.pca else "",
        f"IVF{nlist}" if nlist else "",
        _code_part(spec, kind, rows, inner_dim, device),
        {Rerank.NONE: "", Rerank.FP16: "Refine(SQfp16)", Rerank.FP32: "RFlat"}[rerank],
    ]
    is_hnsw = kind is IndexKind.HNSW
    return ResolvedIndex(
        kind=kind,
        factory=",".join(part for part in parts if part),
        device=device,
        card=spec.card if device is Device.CUDA else 0,
        nlist=nlist,
        nprobe=_choose_nprobe(spec, nlist) if nlist else None,
        ef_construction=(spec.ef_construction or DEFAULT_EF_CONSTRUCTION) if is_hnsw else None,
        ef_search=(spec.ef_search or DEFAULT_EF_SEARCH) if is_hnsw else None,
        rerank_factor=_choose_rerank_factor(spec, rerank, device),
        train_rows=_train_rows(rows, nlist, trained=_is_trained(kind, spec)),
        reason=reason,
    )


def _choose_kind(spec: IndexSpec, rows: int, dim: int, gpu: bool) -> tuple[IndexKind, str]:
    size = f"{rows:,} rows x {dim}"
    if spec.kind is not IndexKind.AUTO:
        return spec.kind, f"{spec.kind} as asked, for {size}"
    if gpu and spec.device_kind is not Device.CPU:
        if rows <= AUTO_FLAT_ROWS_GPU:
            return IndexKind.FLAT, f"flat: {size} are scanned exactly in a moment on a GPU"
        if rows * dim * 4 <= AUTO_IVF_BYTES_GPU:
            return IndexKind.IVF, f"ivf: {size} fit GPU memory uncompressed"
        return IndexKind.IVFPQ, (
            f"ivfpq: {size} would crowd GPU memory uncompressed; codes on the GPU, in place of "
            "ivfpq-fs, which has none, are re-ranked from copies in the host's memory"
        )
    if rows <= AUTO_FLAT_ROWS_CPU:
        return IndexKind.FLAT, f"flat: an exact scan of {size} takes about a millisecond on a core"
    return IndexKind.IVFPQ_FS, f"ivfpq-fs: for {size} the fastest re-ranked kind on CPU cores"


def _choose_device(spec: IndexSpec, kind: IndexKind, gpu: bool) -> Device:
    if spec.device_kind is Device.CUDA:
        if not gpu:
            raise _refuse(
                "device",
                "no GPU can be used here",
                expected="a CUDA device and a GPU build of faiss",
                hint="install the gpu extra, or set index.device to cpu",
            )
        if kind not in GPU_KINDS:
            names = ", ".join(sorted(GPU_KINDS))
            hint = "ivfpq with a re-rank is its like on a GPU" if "ivfpq" in kind else None
            raise _refuse(
                "kind", "runs on CPU only", expected=f"{names} on cuda", got=kind, hint=hint
            )
        return Device.CUDA
    wanted = spec.device_kind is Device.AUTO and gpu and kind in GPU_KINDS
    return Device.CUDA if wanted and _fits_gpu(spec) else Device.CPU


def _fits_gpu(spec: IndexSpec) -> bool:
    """Whether an explicit choice rules the GPU out, so that ``device: auto`` means the CPU."""
    return (
        (spec.rerank_factor or 1) * MEASURED_K <= GPU_MAX_CANDIDATES
        and spec.nbits in (None, 8)
        and (spec.m is None or spec.m in GPU_PQ_M)
    )


def _refuse_unused_fields(spec: IndexSpec, kind: IndexKind) -> None:
    for name, kinds in FIELD_KINDS.items():
        if getattr(spec, name) is not None and kind not in kinds:
            raise _refuse(
                name, f"has no effect with kind {kind}", expected="unset", got=_show(spec, name)
            )


def _inner_dim(spec: IndexSpec, rows: int, dim: int) -> int:
    if spec.pca is None:
        return dim
    if spec.pca > dim:
        raise _refuse("pca", "more than the dimension", expected=f"<= {dim}", got=str(spec.pca))
    if spec.pca > rows:
        raise _refuse("pca", "more than the rows", expected=f"<= {rows}", got=str(spec.pca))
    return spec.pca


def _choose_nlist(spec: IndexSpec, rows: int) -> int:
    """Explicit, or the power of two nearest 2 sqrt(rows): every shard scores all centroids."""
    if spec.nlist is not None:
        if spec.nlist > rows:
            raise _refuse("nlist", "more lists than rows", expected=f"<= {rows}", got=spec.nlist)
        return spec.nlist
    by_size = 1 << round(math.log2(2 * math.sqrt(rows)))
    most = 1 << int(math.log2(max(rows // ROWS_PER_LIST_MIN, 1)))
    return min(by_size, most)


def _choose_nprobe(spec: IndexSpec, nlist: int) -> int:
    if spec.nprobe is None:
        fewest, most = DEFAULT_NPROBE_RANGE
        return min(nlist, most, max(fewest, nlist // PROBED_SHARE))
    if spec.nprobe > nlist:
        raise _refuse("nprobe", "more than the lists", expected=f"<= {nlist}", got=spec.nprobe)
    return spec.nprobe


def _choose_rerank(spec: IndexSpec, kind: IndexKind, device: Device) -> Rerank:
    rerank = spec.rerank
    if rerank is None:
        on_card = kind is IndexKind.IVFPQ and device is Device.CUDA
        lossy = kind is IndexKind.IVFPQ_FS or spec.pca or on_card
        rerank = Rerank.FP16 if lossy else Rerank.NONE
    if rerank is Rerank.NONE and kind is IndexKind.IVFPQ_FS:
        raise _refuse(
            "rerank",
            "FastScan scores are 8-bit and do not compare across shards",
            expected="fp16 or fp32",
            got="none",
        )
    keeps = spec.storage in (None, Storage.FP32) and not spec.pca
    if rerank is not Rerank.NONE and kind in EXACT_KINDS and keeps:
        raise _refuse("rerank", f"{kind} is exact already", expected="none", got=rerank)
    return rerank


def _choose_rerank_factor(spec: IndexSpec, rerank: Rerank, device: Device) -> int | None:
    if rerank is not Rerank.NONE:
        most = GPU_MAX_CANDIDATES // MEASURED_K
        if device is Device.CUDA and (spec.rerank_factor or 1) > most:
            raise _refuse(
                "rerank_factor",
                f"a GPU finds at most {GPU_MAX_CANDIDATES} candidates per query",
                expected=f"<= {most}, for {MEASURED_K} results",
                got=spec.rerank_factor,
            )
        return spec.rerank_factor or DEFAULT_RERANK_FACTOR
    if spec.rerank_factor is not None:
        raise _refuse(
            "rerank_factor", "nothing is re-ranked", expected="unset", got=spec.rerank_factor
        )
    return None


def _code_part(spec: IndexSpec, kind: IndexKind, rows: int, dim: int, device: Device) -> str:
    """How the base index stores a vector of ``dim`` values (after the PCA, if there is one)."""
    if kind in (IndexKind.FLAT, IndexKind.IVF):
        return _stored(spec, kind, dim, device)
    if kind is IndexKind.HNSW:
        return f"HNSW{spec.hnsw_m or DEFAULT_HNSW_M}"
    if kind is IndexKind.SQ8:
        return "SQ8"
    is_fastscan = kind is IndexKind.IVFPQ_FS
    nbits = spec.nbits or (4 if is_fastscan else 8)
    if is_fastscan and nbits != 4:
        raise _refuse("nbits", "FastScan codes have 4 bits", expected="4", got=nbits)
    if device is Device.CUDA and nbits != 8:
        raise _refuse("nbits", "a GPU index has 8-bit codes", expected="8", got=nbits)
    if rows < 2**nbits:
        raise _refuse(
            "nbits",
            f"{rows} rows cannot train {2**nbits} centroids a sub-vector",
            expected=f"2^nbits <= {rows}",
            got=nbits,
            hint="use kind flat for so small a corpus",
        )
    m = _choose_m(spec, dim, dim // 2 if is_fastscan else dim // 4, device)
    # "fsr" encodes residuals: recall .98 instead of .91 at 1M rows without strong clusters
    return f"PQ{m}x4fsr" if is_fastscan else f"PQ{m}x{nbits}"


def _stored(spec: IndexSpec, kind: IndexKind, dim: int, device: Device) -> str:
    storage = spec.storage or Storage.FP32
    if storage is Storage.SQ8 and kind is IndexKind.FLAT:
        raise _refuse(
            "storage",
            "a flat index does not have it",
            expected="fp32 or fp16",
            got=storage,
            hint="kind ivf has, and kind sq8 on the CPU",
        )
    if storage is Storage.SQ8 and device is Device.CUDA and dim >= GPU_SQ8_DIM:
        raise _refuse(
            "storage", "too many dimensions on a GPU", expected=f"< {GPU_SQ8_DIM}", got=dim
        )
    return {Storage.FP32: "Flat", Storage.FP16: "SQfp16", Storage.SQ8: "SQ8"}[storage]


def _choose_m(spec: IndexSpec, dim: int, target: int, device: Device) -> int:
    """Explicit, or the legal divisor of ``dim`` that is nearest to ``target`` in ratio."""
    legal = [m for m in range(1, dim + 1) if dim % m == 0]
    if device is Device.CUDA:
        legal = [m for m in legal if m in GPU_PQ_M]
    if spec.m is None:
        return min(legal, key=lambda m: abs(math.log(m / max(target, 1))))
    if spec.m not in legal:
        divides = dim % spec.m == 0
        raise _refuse(
            "m",
            "no code length that faiss has on a GPU"
            if divides
            else f"does not divide the dimension {dim}",
            expected=f"one of {', '.join(map(str, legal))}",
            got=spec.m,
        )
    return spec.m


def _is_trained(kind: IndexKind, spec: IndexSpec) -> bool:
    return spec.pca is not None or kind not in (IndexKind.FLAT, IndexKind.HNSW)


def _train_rows(rows: int, nlist: int | None, *, trained: bool) -> int:
    if not trained:
        return 0
    return min(rows, max(TRAIN_ROWS_MIN, TRAIN_ROWS_PER_LIST * (nlist or 0)))


def _resolve_factory(
    spec: IndexSpec, rows: int, dim: int, metric: Metric, reason: str
) -> ResolvedIndex:
    if spec.factory is None:
        raise _refuse("factory", "missing", expected="a faiss factory string")
    try:
        index = faiss.index_factory(dim, spec.factory, faiss_metric(metric))
    except RuntimeError as error:
        raise _refuse(
            "factory",
            "faiss does not accept it",
            expected=f"a factory string for {metric} over {dim} dimensions",
            got=f"{spec.factory!r} ({_last_line(error)})",
        ) from error
    layers = layers_of(index)
    if not layers.is_known:
        raise _refuse(
            "factory",
            "not an index Shardline can serve",
            expected="flat, SQ, PQ, HNSW or IVF, with a transform or re-rank around it",
            got=spec.factory,
        )
    if layers.is_fastscan and layers.refine is None:
        raise _refuse(
            "factory",
            "FastScan scores are 8-bit and do not compare across shards",
            expected="a re-rank, such as ,RFlat",
            got=spec.factory,
        )
    nlist = int(layers.base.nlist) if layers.is_ivf else None
    if nlist is not None and not 1 <= nlist <= rows:
        raise _refuse("factory", "lists out of range", expected=f"1 to {rows}", got=nlist)
    _refuse_unused_by_factory(spec, layers)
    return ResolvedIndex(
        kind=IndexKind.FACTORY,
        factory=spec.factory,
        device=Device.CPU,
        nlist=nlist,
        nprobe=_choose_nprobe(spec, nlist) if nlist else None,
        ef_construction=spec.ef_construction or DEFAULT_EF_CONSTRUCTION if layers.is_hnsw else None,
        ef_search=spec.ef_search or DEFAULT_EF_SEARCH if layers.is_hnsw else None,
        rerank_factor=spec.rerank_factor or DEFAULT_RERANK_FACTOR if layers.refine else None,
        train_rows=_train_rows(rows, nlist, trained=not layers.whole.is_trained),
        reason=reason,
    )


def _refuse_unused_by_factory(spec: IndexSpec, layers: Layers) -> None:
    used = {
        "nprobe": layers.is_ivf,
        "ef_construction": layers.is_hnsw,
        "ef_search": layers.is_hnsw,
        "rerank_factor": layers.refine is not None,
    }
    for name, is_used in used.items():
        if getattr(spec, name) is not None and not is_used:
            raise _refuse(
                name, f"has no effect with {spec.factory}", expected="unset", got=_show(spec, name)
            )


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rsplit("Error: ", 1)[-1].rsplit(": ", 1)[-1]


def _show(spec: IndexSpec, name: str) -> str:
    return str(getattr(spec, name))


def _refuse(
    name: str,
    message: str,
    *,
    expected: str | None = None,
    got: Any = None,
    hint: str | None = None,
) -> ConfigError:
    shown = None if got is None else str(got)
    return ConfigError(message, field=f"index.{name}", expected=expected, got=shown, hint=hint)
