"""The exact ranking: every query against every item by dot product, and its metrics.

Lists are best first, equal scores by lower row, -1 and -inf in empty slots. Pure numpy.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    Metric,
    Ranked,
    check_vectors,
)
from shardline.training.data.csr import Csr
from shardline.training.evaluation.ranking_metrics import (
    DEFAULT_KS,
    MetricResult,
    MetricSums,
    score_lists,
)

BLOCK_SCORES = 1 << 23  # float32 scores in memory at a time, 32 MiB
SAMPLE = 4096  # columns looked at to guess the k-th score of a row


def rank_exact(
    queries: FloatArray,
    items: FloatArray,
    *,
    k: int,
    exclude: Csr | None = None,
    block: int | None = None,
) -> Ranked:
    """The k item rows of highest dot product, by brute force.

    queries (n, d), items (m, d) float32. The items of ``exclude`` (item rows of each query) never
    appear. Equal scores are ordered by lower row; slots beyond the catalogue hold -inf and -1.
    ``block`` queries are scored at a time (default: what fits 32 MiB); it changes no answer beyond
    the rounding of the matrix product.
    """
    parts = [part for _, part in ranked_blocks(queries, items, exclude, k, block)]
    return Ranked(*map(np.concatenate, zip(*parts, strict=True)))


def evaluate_vectors(
    queries: FloatArray,
    items: FloatArray,
    *,
    relevant: Csr,
    exclude: Csr | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    progress: Progress | None = None,
    stage: str = "evaluate",
) -> MetricResult:
    """Mean metrics of ranking all items by dot product: the exact, full-corpus evaluation.

    One query per user of ``relevant`` and ``exclude``; lists are as long as the largest k.
    """
    sums, done = MetricSums(), 0
    for start, (rows, _) in ranked_blocks(queries, items, exclude, max(ks)):
        done = start + len(rows)
        sums.add(score_lists(rows, relevant.slice(start, done), ks))
        if progress:
            progress(stage, done, len(queries))
    return sums.result()


def ranked_blocks(
    queries: FloatArray,
    items: FloatArray,
    exclude: Csr | None,
    k: int,
    block: int | None = None,
) -> Iterator[tuple[int, Ranked]]:
    """(first query, its block's answers) of consecutive blocks of queries; see ``rank_exact``."""
    if k < 1:
        raise InvalidInput("out of range", field="k", expected=">= 1", got=str(k))
    items = check_vectors(items, dim=items.shape[-1], metric=Metric.DOT, field="items")
    queries = check_vectors(queries, dim=items.shape[1], metric=Metric.DOT, field="queries")
    if exclude is not None and len(exclude.indptr) != len(queries) + 1:
        raise InvalidInput(
            "one list per query",
            field="exclude",
            expected=str(len(queries)),
            got=str(len(exclude.indptr) - 1),
        )
    step = block or max(1, BLOCK_SCORES // len(items))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ items.T
        if exclude is not None:
            masked = exclude.slice(start, start + len(scores))
            scores[masked.owners, masked.items] = EMPTY_SCORE
        yield start, _top(scores, k)


def _top(scores: FloatArray, k: int) -> Ranked:
    """The k best of each row, ties by lower column, padded with -inf and -1.

    A full partial sort of each row would dominate the evaluation. Instead a strided sample of the
    columns guesses a score that a little more than k entries reach; what reaches it is collected
    and sorted. A guess that turns out too high, or far too low, is replaced by the k-th score.
    """
    threshold = _guess(scores, k)
    reached = scores >= threshold[:, None]
    counts = np.count_nonzero(reached, axis=1)
    wrong = np.flatnonzero((counts < k) | (counts > 8 * k + SAMPLE))
    if len(wrong):
        kth = _kth_best(scores[wrong], k)
        reached[wrong] = (scores[wrong] >= kth[:, None]) & (scores[wrong] > EMPTY_SCORE)
        counts[wrong] = np.count_nonzero(reached[wrong], axis=1)
    flat = np.flatnonzero(reached)
    rows, columns = np.divmod(flat, scores.shape[1])
    slots = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = max(k, int(counts.max(initial=0)))
    found = np.full((len(scores), width), -EMPTY_SCORE, dtype=np.float32)  # negated: sorts upward
    ids = np.full((len(scores), width), EMPTY_ID, dtype=np.int64)
    found[rows, slots] = -scores.ravel()[flat]
    ids[rows, slots] = columns
    order = np.argsort(found, axis=1, kind="stable")[:, :k]  # slots are in column order: ties hold
    return Ranked(np.take_along_axis(ids, order, axis=1), -np.take_along_axis(found, order, axis=1))


def _guess(scores: FloatArray, k: int) -> FloatArray:
    """(n,) float32: a score that the k best of each row probably reach; +inf for no guess."""
    columns = scores.shape[1]
    sample = scores[:, :: max(1, columns // SAMPLE)]
    expected = k * sample.shape[1] / columns
    place = int(expected + 4.0 * np.sqrt(expected) + 4.0)  # four standard deviations of a sample
    if columns < 4 * SAMPLE or place >= SAMPLE // 2:
        return np.full(len(scores), np.inf, dtype=np.float32)
    guess = _kth_best(np.ascontiguousarray(sample), place)
    # -inf would collect excluded items; such a row is nearly empty and takes the exact way
    return np.where(np.isneginf(guess), np.float32(np.inf), guess)


def _kth_best(scores: FloatArray, k: int) -> FloatArray:
    """(n,) float32: the k-th largest of each row, or -inf where there are fewer."""
    if k > scores.shape[1]:
        return np.full(len(scores), EMPTY_SCORE, dtype=np.float32)
    place = scores.shape[1] - k
    return np.partition(scores, place, axis=1)[:, place]
