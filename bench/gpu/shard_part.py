"""A shard's own index on the card, by the code that serves it (``shards/index/gpu.py``)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from shardline.bench.gpu.card import Corpus, FloatArray, IdArray, Truth, recall
from shardline.bench.gpu.card_checks import CLOSE, CLOSE_FP16, compare, cpu_kinds
from shardline.bench.gpu.floors import Floor, Plan, flat_floor, ivf_floor
from shardline.bench.gpu.part_findings import Findings, Work, time_search
from shardline.bench.gpu.search_parts import POOL, QUANTISER_SAMPLE, coarse_quantizer
from shardline.shards.core.errors import CardFailed, ConfigError
from shardline.shards.core.schema import Metric
from shardline.shards.index.card_memory import HEAD_ROOM, LOADING, card_memory
from shardline.shards.index.gpu import CardIndex
from shardline.shards.index.layers import Layers, layers_of

RERANK_FACTOR = 4  # of the kind with copies in the host's memory


def shard(work: Work, findings: Findings) -> None:
    """Each kind of ``index.device: cuda``: planned, copied to the card, tested there against the
    CPU as a shard does when it loads, searched beside the CPU, and timed as a shard searches it."""
    sizes = work.sizes
    corpus = Corpus(work.card, sizes.shard_rows, sizes.dim, sizes.block_rows)
    truth = Truth(corpus.queries(sizes.truth_queries), sizes.k)
    blocks = []
    for first, block in corpus.blocks():
        truth.see(first, block)
        blocks.append(block.cpu().numpy())
    rows = np.concatenate(blocks)
    for kind, index in _indexes(work, corpus, rows).items():
        try:
            _kind(work, findings, kind, index, corpus, truth)
        except (ConfigError, CardFailed) as error:  # other kinds may do
            findings.check(f"{kind}: served", False, expected="no error", got=str(error))
        else:
            findings.check(f"{kind}: served", True, expected="no error", got="none")


def _kind(
    work: Work, findings: Findings, kind: str, index: Any, corpus: Corpus, truth: Truth
) -> None:
    """Raises ConfigError, CardFailed: as ``CardIndex``."""
    sizes, layers = work.sizes, layers_of(index)
    rows, has_copies = int(index.ntotal), layers.refine is not None
    nprobe = sizes.nprobes[len(sizes.nprobes) // 2] if layers.is_ivf else None
    free = work.card.free_bytes()
    on_card = CardIndex(layers, metric=Metric.DOT, card=0)
    findings.use(f"{kind}, {rows:,} rows", _plan(layers, rows), free - work.card.free_bytes())
    candidates = RERANK_FACTOR * sizes.k if has_copies else sizes.k
    ask = partial(on_card.search, fetch=sizes.k, candidates=candidates, nprobe=nprobe)
    asked = corpus.queries(sizes.truth_queries).cpu().numpy()
    on_cpu = _searched(work.card.faiss, index, asked, sizes.k, nprobe, has_copies=has_copies)
    is_rounded = has_copies or "fp16" in kind
    compare(findings, kind, on_cpu, ask(asked), CLOSE_FP16 if is_rounded else CLOSE)
    time_search(
        work,
        findings,
        ask,
        corpus.queries(POOL).cpu().numpy(),
        what=kind if nprobe is None else f"{kind}, nprobe {nprobe}",
        rows=rows,
        recall=recall(ask(asked)[1], truth.ids),
        floor_of=_floor_of(work, layers, rows, nprobe),
    )


def _plan(layers: Layers, rows: int) -> Plan:
    """What a shard plans before it loads; what it holds then, with head-room."""
    parts = tuple((name, size) for name, _, size in card_memory(layers, rows).parts)
    resting = tuple(part for part in parts if part[0] not in (LOADING, HEAD_ROOM))
    held = sum(size for name, size in parts if name != LOADING)
    return Plan(parts=resting, worst_parts=parts, held=held)


def _indexes(work: Work, corpus: Corpus, rows: FloatArray) -> dict[str, Any]:
    """Trained and filled on the CPU, as builds do."""
    sizes, faiss = work.sizes, work.card.faiss
    quantizer = coarse_quantizer(work, corpus, sizes.kinds_lists)
    kinds = cpu_kinds(faiss, quantizer, sizes.dim, sizes.kinds_lists, sizes.pq_code)
    half, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    found = {
        "flat": kinds["flat"],
        "flat fp16": faiss.IndexScalarQuantizer(sizes.dim, half, metric),
        "ivf": kinds["ivf"],
        "ivf fp16": kinds["ivf fp16"],
        "ivf sq8": kinds["ivf sq8"],
    }
    coded = kinds[f"ivfpq{sizes.pq_code}"]
    copies = faiss.IndexScalarQuantizer(sizes.dim, half, metric)
    sample = corpus.sample(min(len(rows), QUANTISER_SAMPLE)).cpu().numpy()
    for index in (*found.values(), coded, copies):
        index.train(sample)
    found[f"ivfpq{sizes.pq_code} and copies"] = faiss.IndexRefine(coded, copies)
    for index in found.values():
        index.add(rows)
    return found


def _searched(
    faiss: Any, index: Any, queries: FloatArray, k: int, nprobe: int | None, *, has_copies: bool
) -> tuple[FloatArray, IdArray]:
    """What the CPU finds with the same parameters."""
    params = None if nprobe is None else faiss.SearchParametersIVF(nprobe=nprobe)
    if has_copies:
        params = faiss.IndexRefineSearchParameters(k_factor=RERANK_FACTOR, base_index_params=params)
    found: tuple[FloatArray, IdArray] = index.search(queries, k, params=params)
    return found


def _floor_of(work: Work, layers: Layers, rows: int, nprobe: int | None) -> Callable[[int], Floor]:
    """Of what the card does: copies that re-rank lie in the host's memory."""
    base = layers.base
    dim, code = int(base.d), int(base.code_size)

    def floor_of(batch: int) -> Floor:
        if nprobe is None:
            return flat_floor(rows, dim, batch, code // dim, work.rates)
        return ivf_floor(rows, dim, int(base.nlist), nprobe, batch, code, work.rates)

    return floor_of
