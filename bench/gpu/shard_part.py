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
from shardline.shards.core.errors import ConfigError
from shardline.shards.core.schema import Metric
from shardline.shards.index.card_memory import card_memory
from shardline.shards.index.gpu import CardIndex
from shardline.shards.index.layers import Layers, layers_of

RERANK_FACTOR = 4  # of the kind with copies in the host's memory


def shard(work: Work, findings: Findings) -> None:
    """Each kind of ``index.device: cuda``: planned, copied to the card, tested there against the
    CPU as a shard does when it loads, searched beside the CPU, and timed as a shard searches it."""
    sizes = work.sizes
    nprobe = sizes.nprobes[len(sizes.nprobes) // 2]
    corpus = Corpus(work.card, sizes.kinds_rows, sizes.dim, sizes.block_rows)
    truth = Truth(corpus.queries(sizes.truth_queries), sizes.k)
    blocks = []
    for first, block in corpus.blocks():
        truth.see(first, block)
        blocks.append(block.cpu().numpy())
    rows = np.concatenate(blocks)
    for kind, index in _indexes(work, corpus, rows).items():
        layers = layers_of(index)
        free = work.card.free_bytes()
        try:
            on_card = CardIndex(layers, metric=Metric.DOT, card=0)
        except ConfigError as error:
            findings.check(
                f"{kind}: loaded, and its self-test", False, expected="passed", got=str(error)
            )
            continue
        findings.check(f"{kind}: loaded, and its self-test", True, expected="passed", got="passed")
        memory = card_memory(layers, len(rows))
        planned = tuple((name, size) for name, _, size in memory.parts)
        plan = Plan(parts=planned, worst_parts=planned, held=memory.total)
        findings.use(f"{kind}, {len(rows):,} rows", plan, free - work.card.free_bytes())
        has_copies, visited = layers.refine is not None, nprobe if layers.is_ivf else None
        candidates = RERANK_FACTOR * sizes.k if has_copies else sizes.k
        ask = partial(on_card.search, fetch=sizes.k, candidates=candidates, nprobe=visited)
        asked = corpus.queries(sizes.truth_queries).cpu().numpy()
        is_rounded = has_copies or "fp16" in kind
        compare(
            findings,
            kind,
            _searched(work.card.faiss, index, asked, sizes.k, visited, has_copies=has_copies),
            ask(asked),
            CLOSE_FP16 if is_rounded else CLOSE,
        )
        time_search(
            work,
            findings,
            ask,
            corpus.queries(POOL).cpu().numpy(),
            what=kind if visited is None else f"{kind}, nprobe {visited}",
            rows=len(rows),
            recall=recall(ask(asked)[1], truth.ids),
            floor_of=_floor_of(work, layers, len(rows), visited),
        )
        del on_card, ask


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
