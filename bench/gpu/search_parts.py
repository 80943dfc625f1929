"""Searches on the card by kind, rows and batch: latency, recall, memory, floor."""

import time
from collections.abc import Callable
from typing import Any

import torch

from shardline.bench.gpu.card import (
    Ask,
    Corpus,
    FloatArray,
    Truth,
    centroids,
    plain,
    recall,
    reranked,
)
from shardline.bench.gpu.card_checks import clone_options, cpu_kinds
from shardline.bench.gpu.floors import (
    FP16_TABLES_FROM,
    Floor,
    code_length,
    faiss_flat_ms,
    flat_floor,
    flat_plan,
    ivf_floor,
    ivf_plan,
)
from shardline.bench.gpu.part_findings import Findings, Work, time_search
from shardline.shards.core.errors import ConfigError

POOL = 4096  # different queries, so that repetitions do not ask the same again
QUANTISER_SAMPLE = 65_536  # rows that a product quantiser is trained on: 256 per centroid


def flat(work: Work, findings: Findings, *, number: int) -> None:
    """A flat index of float16 rows, exact but for their rounding; the floor is reading them all.

    ``number``: which of the two sizes.
    """
    sizes, card = work.sizes, work.card
    rows = sizes.flat_rows[number]
    plan = flat_plan(rows, sizes.dim, 2)
    work.need(plan)
    corpus = Corpus(card, rows, sizes.dim, sizes.block_rows)
    truth = Truth(corpus.queries(sizes.truth_queries), sizes.k)
    free = card.free_bytes()
    resources = card.resources()
    empty = card.faiss.IndexFlat(sizes.dim, card.faiss.METRIC_INNER_PRODUCT)
    index = card.put(empty, resources, useFloat16=True)
    _fill(work, index, corpus, truth.see)
    findings.use(f"flat fp16, {rows:,} rows", plan, free - card.free_bytes())
    ask = plain(index, sizes.k)
    queries = corpus.queries(POOL).cpu().numpy()
    found = _recall(ask, corpus, truth, sizes.truth_queries)
    findings.notes["ms_by_bytes_as_faiss_moves_them"] = {
        batch: faiss_flat_ms(rows, sizes.dim, batch, 2, work.rates) for batch in sizes.batches
    }

    def floor_of(batch: int) -> Floor:
        return flat_floor(rows, sizes.dim, batch, 2, work.rates)

    time_search(
        work,
        findings,
        ask,
        queries,
        what="flat fp16",
        rows=rows,
        recall=found,
        floor_of=floor_of,
    )


def kinds(work: Work, findings: Findings) -> None:
    """Every kind over the same rows, IVF kinds with the same centroids and lists visited."""
    sizes, card = work.sizes, work.card
    rows, lists, code = sizes.kinds_rows, sizes.kinds_lists, sizes.pq_code
    nprobe = sizes.nprobes[len(sizes.nprobes) // 2]
    corpus = Corpus(card, rows, sizes.dim, sizes.block_rows)
    truth = Truth(corpus.queries(sizes.truth_queries), sizes.k)
    for first, block in corpus.blocks():
        truth.see(first, block)
    quantizer = coarse_quantizer(work, corpus, lists)
    queries = corpus.queries(POOL).cpu().numpy()
    code_bytes = {"ivf": 4 * sizes.dim, "ivf fp16": 2 * sizes.dim, "ivf sq8": sizes.dim}
    for kind, index in cpu_kinds(card.faiss, quantizer, sizes.dim, lists, code).items():
        is_flat = kind.startswith("flat")
        value_bytes = 2 if kind == "flat fp16" else 4
        size = code_bytes.get(kind, code)
        plan = (
            flat_plan(rows, sizes.dim, value_bytes)
            if is_flat
            else ivf_plan(rows, sizes.dim, lists, size)
        )
        work.need(plan)
        index.train(corpus.sample(min(rows, QUANTISER_SAMPLE)).cpu().numpy())
        free = card.free_bytes()
        resources = card.resources()
        on_card = card.put(index, resources, **clone_options(kind, code))
        _fill(work, on_card, corpus)
        findings.use(f"{kind}, {rows:,} rows", plan, free - card.free_bytes())
        if not is_flat:
            on_card.nprobe = nprobe

        def floor_of(
            batch: int, is_flat: bool = is_flat, size: int = size, value_bytes: int = value_bytes
        ) -> Floor:
            if is_flat:
                return flat_floor(rows, sizes.dim, batch, value_bytes, work.rates)
            return ivf_floor(rows, sizes.dim, lists, nprobe, batch, size, work.rates)

        ask = plain(on_card, sizes.k)
        time_search(
            work,
            findings,
            ask,
            queries,
            what=kind if is_flat else f"{kind}, nprobe {nprobe}",
            rows=rows,
            recall=_recall(ask, corpus, truth, sizes.truth_queries),
            floor_of=floor_of,
        )
        del on_card, resources, ask


def pq_with_copies(work: Work, findings: Findings) -> None:
    """IVF-PQ whose candidates are scored again by float16 copies on the card: the cheapest of the
    settings that reach the target recall, timed."""
    sizes, card = work.sizes, work.card
    rows, lists, code = sizes.pq_rows, sizes.pq_lists, sizes.pq_code
    plan = ivf_plan(rows, sizes.dim, lists, code, centroid_bytes=2, copies=2 * sizes.dim)
    work.need(plan)
    corpus = Corpus(card, rows, sizes.dim, sizes.block_rows)
    truth = Truth(corpus.queries(sizes.truth_queries), sizes.k)
    empty = _trained(work, corpus, lists, code)
    free = card.free_bytes()
    copies = torch.empty((rows, sizes.dim), dtype=torch.float16, device=card.device)

    def keep(first: int, block: torch.Tensor) -> None:
        truth.see(first, block)
        copies[first : first + len(block)] = block.half()

    resources = card.resources()
    index = _put_pq(work, empty, resources, code, rows)
    _fill(work, index, corpus, keep)
    findings.use(f"ivfpq{code} and copies, {rows:,} rows", plan, free - card.free_bytes())
    queries = corpus.queries(POOL).cpu().numpy()

    def ask_of(factor: int) -> Ask:
        return plain(index, sizes.k) if factor == 1 else reranked(
            card, index, copies, sizes.k, factor
        )  # fmt: skip

    nprobe, factor, found = _cheapest(work, findings, index, corpus, truth, ask_of)

    def floor_of(batch: int) -> Floor:
        candidates = factor * sizes.k if factor > 1 else 0
        return ivf_floor(
            rows, sizes.dim, lists, nprobe, batch, code, work.rates, reranked=candidates
        )

    findings.check(
        f"recall@{sizes.k} of ivfpq with copies",
        found >= sizes.target_recall,
        expected=f">= {sizes.target_recall}",
        got=f"{found:.4f}",
    )
    time_search(
        work,
        findings,
        ask_of(factor),
        queries,
        what=f"ivfpq{code}, nprobe {nprobe}, re-rank {factor}",
        rows=rows,
        recall=found,
        floor_of=floor_of,
    )


def billion(work: Work, findings: Findings) -> None:
    """A billion rows as IVF-PQ, codes alone, as long as they fit; recall and time by nprobe.

    Raises:
        ConfigError: not all rows could be added in time; the figures are of those that were.
    """
    sizes, card = work.sizes, work.card
    wanted, lists = sizes.billion_rows, sizes.billion_lists
    rows = wanted
    code = code_length(rows, sizes.dim, lists, card.free_bytes(), wanted=sizes.billion_code)
    plan = ivf_plan(rows, sizes.dim, lists, code, centroid_bytes=2)
    corpus = Corpus(card, rows, sizes.dim, sizes.block_rows)
    truth = Truth(corpus.queries(sizes.truth_queries), sizes.k)
    empty = _trained(work, corpus, lists, code)
    free = card.free_bytes()
    resources = card.resources()
    index = _put_pq(work, empty, resources, code, rows)
    rows = _fill(work, index, corpus, truth.see, keep_seconds=sizes.billion_search_seconds)
    findings.use(f"ivfpq{code}, {rows:,} rows", plan, free - card.free_bytes())
    queries = corpus.queries(POOL).cpu().numpy()
    for nprobe in sizes.nprobes:
        index.nprobe = nprobe
        ask = plain(index, sizes.k)

        def floor_of(batch: int, nprobe: int = nprobe) -> Floor:
            return ivf_floor(rows, sizes.dim, lists, nprobe, batch, code, work.rates)

        time_search(
            work,
            findings,
            ask,
            queries,
            what=f"ivfpq{code}, nprobe {nprobe}",
            rows=rows,
            recall=_recall(ask, corpus, truth, sizes.truth_queries),
            floor_of=floor_of,
        )
    if rows < wanted:
        raise ConfigError(
            f"{rows:,} of {wanted:,} rows could be added in time, and the figures are of these; "
            "give it more --minutes"
        )


def _cheapest(
    work: Work,
    findings: Findings,
    index: Any,
    corpus: Corpus,
    truth: Truth,
    ask_of: Callable[[int], Ask],
) -> tuple[int, int, float]:
    """(nprobe, re-rank factor, recall) of the fastest setting that reaches the target, else of the
    best; every setting tried is noted with its recall and the time of one batch."""
    tried = []
    asked = corpus.queries(work.sizes.truth_queries).cpu().numpy()
    for nprobe in work.sizes.nprobes:
        index.nprobe = nprobe
        for factor in work.sizes.rerank_factors:
            ask = ask_of(factor)
            ask(asked)
            started = time.perf_counter()
            _, ids = ask(asked)
            taken = 1000 * (time.perf_counter() - started)
            tried.append((nprobe, factor, recall(ids, truth.ids), taken))
    findings.notes["tried"] = [
        {"nprobe": n, "rerank_factor": f, "recall": round(r, 4), "batch_ms": round(ms, 3)}
        for n, f, r, ms in tried
    ]
    enough = [each for each in tried if each[2] >= work.sizes.target_recall]
    best = min(enough, key=lambda each: each[3]) if enough else max(tried, key=lambda each: each[2])
    index.nprobe = best[0]
    return best[:3]


def _recall(ask: Ask, corpus: Corpus, truth: Truth, queries: int) -> float:
    _, ids = ask(corpus.queries(queries).cpu().numpy())
    return recall(ids, truth.ids)


def coarse_quantizer(work: Work, corpus: Corpus, lists: int) -> Any:
    """A trained coarse quantiser on the CPU, its centroids found on the card."""
    sample = corpus.sample(min(corpus.rows, lists * work.sizes.sample_per_list))
    quantizer = work.card.faiss.IndexFlatIP(corpus.dim)
    quantizer.add(centroids(sample, lists).cpu().numpy())
    return quantizer


def _trained(work: Work, corpus: Corpus, lists: int, code: int) -> Any:
    """An empty, trained IVF-PQ index on the CPU."""
    faiss = work.card.faiss
    quantizer = coarse_quantizer(work, corpus, lists)
    index = faiss.IndexIVFPQ(quantizer, corpus.dim, lists, code, 8, faiss.METRIC_INNER_PRODUCT)
    rows: FloatArray = corpus.sample(min(corpus.rows, QUANTISER_SAMPLE)).cpu().numpy()
    index.train(rows)
    return index


def _put_pq(work: Work, empty: Any, resources: Any, code: int, rows: int) -> Any:
    """The empty index on the card, with room for ``rows`` and a float16 coarse quantiser: rows are
    assigned to lists by the matrix units, and queries by the same rounding."""
    return work.card.put(
        empty,
        resources,
        useFloat16=code >= FP16_TABLES_FROM,
        useFloat16CoarseQuantizer=True,
        reserveVecs=rows,
    )


def _fill(
    work: Work,
    index: Any,
    corpus: Corpus,
    see: Callable[[int, torch.Tensor], None] = lambda first, block: None,
    *,
    keep_seconds: float | None = None,
) -> int:
    """Adds all rows; stops as soon as the time left is seen not to be enough. Returns how many.

    ``keep_seconds``: with it, adds as many as it can until only so much time is left.

    Raises:
        ConfigError: without ``keep_seconds``, it would not end in time.
    """
    started = time.monotonic()
    for first, block in corpus.blocks():
        see(first, block)
        work.card.add(index, block)
        done = first + len(block)
        if keep_seconds is not None and work.seconds_left() <= keep_seconds:
            return done
        if keep_seconds is None and first:  # the first block also pays for what happens once
            left = (time.monotonic() - started) * (corpus.rows - done) / done
            work.need_seconds(left, f"adding {corpus.rows - done:,} of {corpus.rows:,} rows")
    return corpus.rows
