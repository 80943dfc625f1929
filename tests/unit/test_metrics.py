"""Metrics against definitions written as loops, an independent library, and brute force."""

import math

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, Success, nDCG

from shardline.shards.core.errors import InvalidInput
from shardline.training.data.csr import Csr
from shardline.training.evaluation.ranking import evaluate_vectors, rank_exact
from shardline.training.evaluation.ranking_metrics import MetricSums, hit_matrix, score_lists

KS = (1, 3, 10)


def csr(lists: list[list[int]]) -> Csr:
    flat = np.array([item for items in lists for item in items], dtype=np.int64)
    return Csr(np.cumsum([0, *map(len, lists)]).astype(np.int64), flat)


def random_task(seed: int, users: int = 60) -> tuple[np.ndarray, list[list[int]]]:
    """Lists with empty tails, users without relevant items, ids with holes up to 2^62."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(2**62, 40, replace=False)
    ranked = np.stack([rng.permutation(ids)[:12] for _ in range(users)])
    for row in ranked:
        row[rng.integers(5, 13) :] = -1
    relevant = [rng.choice(ids, rng.integers(0, 8), replace=False).tolist() for _ in range(users)]
    return ranked, relevant


def slow_metrics(ranked: list[int], relevant: list[int], k: int) -> dict[str, float]:
    hits = [item != -1 and item in relevant for item in ranked]
    first = hits.index(True) + 1 if any(hits) else None
    gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits[:k], 1) if hit)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))
    return {
        f"recall@{k}": sum(hits[:k]) / len(relevant),
        f"hit_rate@{k}": float(any(hits[:k])),
        f"ndcg@{k}": gain / best,
        "mrr": 1 / first if first else 0.0,
    }


@pytest.mark.parametrize("seed", range(5))
def test_every_user_as_the_definitions_say(seed: int) -> None:
    ranked, relevant = random_task(seed)
    got = score_lists(ranked, csr(relevant), KS)
    asked = [user for user, items in enumerate(relevant) if items]
    assert got.users.tolist() == asked
    assert got.skipped == len(relevant) - len(asked) > 0
    for place, user in enumerate(asked):
        for k in KS:
            for name, value in slow_metrics(ranked[user].tolist(), relevant[user], k).items():
                assert got.values[name][place] == pytest.approx(value, abs=1e-12), (user, name)


@pytest.mark.parametrize("seed", range(3))
def test_means_agree_with_ir_measures(seed: int) -> None:
    ranked, relevant = random_task(seed)
    sums = MetricSums()
    sums.add(score_lists(ranked, csr(relevant), KS))
    means = sums.result().means
    qrels = {str(u): {str(i): 1 for i in items} for u, items in enumerate(relevant) if items}
    # strictly falling scores, so that the referee has no ties to break its own way
    run = {
        user: {str(i): 100.0 - place for place, i in enumerate(ranked[int(user)]) if i != -1}
        for user in qrels
    }
    names = {R @ k: f"recall@{k}" for k in KS} | {nDCG @ k: f"ndcg@{k}" for k in KS}
    names |= {Success @ k: f"hit_rate@{k}" for k in KS} | {RR: "mrr"}
    expected = ir_measures.calc_aggregate(list(names), qrels, run)
    for measure, name in names.items():
        assert means[name] == pytest.approx(expected[measure], abs=1e-9), name


def test_sums_of_parts_equal_the_whole() -> None:
    ranked, relevant = random_task(7)
    whole, left, right = MetricSums(), MetricSums(), MetricSums()
    whole.add(score_lists(ranked, csr(relevant), KS))
    left.add(score_lists(ranked[:20], csr(relevant[:20]), KS))
    right.add(score_lists(ranked[20:], csr(relevant[20:]), KS))
    left.merge(right)
    assert left.result().means == pytest.approx(whole.result().means)
    assert (left.users, left.skipped) == (whole.users, whole.skipped)


def test_no_user_to_measure_is_an_error() -> None:
    sums = MetricSums()
    sums.add(score_lists(np.array([[1, 2]]), csr([[]]), (1,)))
    with pytest.raises(InvalidInput, match="nothing to measure"):
        sums.result()


def test_sums_of_other_metrics_are_refused() -> None:
    sums = MetricSums()
    sums.add(score_lists(np.array([[1, 2]]), csr([[1]]), (1,)))
    with pytest.raises(InvalidInput, match="different kinds"):
        sums.add(score_lists(np.array([[1, 2]]), csr([[1]]), (2,)))


@pytest.mark.parametrize("ks", [(), (0,), (1, 4)])
def test_a_k_outside_the_list_is_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="ks: k out of range"):
        score_lists(np.array([[1, 2, 3]]), csr([[1]]), ks)


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"relevant\[1\]"):
        hit_matrix(np.array([[1, 2], [1, 2]]), csr([[1], [5, 5]]))
    with pytest.raises(InvalidInput, match=r"ranked\[1\]"):
        hit_matrix(np.array([[1, 2], [3, 3]]), csr([[1], [3]]))


def test_one_list_per_user() -> None:
    with pytest.raises(InvalidInput, match="one ranked list per user"):
        hit_matrix(np.array([[1, 2]]), csr([[1], [2]]))


def test_csr_take_and_slice() -> None:
    lists = [[5, 6], [], [7], [8, 9, 10]]
    taken = csr(lists).take(np.array([3, 0, 1]))
    assert taken.indptr.tolist() == [0, 3, 5, 5]
    assert taken.items.tolist() == [8, 9, 10, 5, 6]
    part = csr(lists).slice(2, 4)
    assert (part.indptr.tolist(), part.items.tolist()) == ([0, 1, 4], [7, 8, 9, 10])
    assert part.owners.tolist() == [0, 1, 1, 1]


def slow_ranking(
    queries: np.ndarray, items: np.ndarray, k: int, exclude: list[list[int]]
) -> tuple[list[list[float]], list[list[int]]]:
    scores, rows = [], []
    for query, masked in zip(queries, exclude, strict=True):
        pairs = [(float(query @ v), row) for row, v in enumerate(items) if row not in masked]
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        pairs = (pairs + [(-math.inf, -1)] * k)[:k]
        scores.append([score for score, _ in pairs])
        rows.append([row for _, row in pairs])
    return scores, rows


@pytest.mark.parametrize(("m", "k"), [(50, 1), (50, 10), (50, 50), (50, 70), (1, 3)])
@pytest.mark.parametrize("block", [None, 1, 3])
def test_exact_ranking_with_ties_and_masks(m: int, k: int, block: int | None) -> None:
    rng = np.random.default_rng(m + k)
    queries = rng.integers(-2, 3, (7, 4)).astype(np.float32)  # small integers: many exact ties
    items = rng.integers(-2, 3, (m, 4)).astype(np.float32)
    exclude = [rng.choice(m, rng.integers(0, m + 1), replace=False).tolist() for _ in range(7)]
    rows, scores = rank_exact(queries, items, k=k, exclude=csr(exclude), block=block)
    slow_scores, slow_rows = slow_ranking(queries, items, k, exclude)
    assert rows.tolist() == slow_rows
    assert scores.tolist() == slow_scores
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("kind", ["spread", "tied", "sorted", "mostly-masked"])
@pytest.mark.parametrize("k", [5, 300])
def test_large_catalogue_takes_the_sampled_threshold(kind: str, k: int) -> None:
    """20,000 items: beyond the size where the threshold is guessed, including bad guesses."""
    rng = np.random.default_rng(k)
    m = 20_000
    items = {
        "spread": rng.standard_normal((m, 3)),
        "tied": rng.integers(0, 2, (m, 3)),
        "sorted": np.sort(rng.standard_normal((m, 3)), axis=0),
        "mostly-masked": rng.standard_normal((m, 3)),
    }[kind].astype(np.float32)
    queries = rng.standard_normal((4, 3)).astype(np.float32).round(1)
    masked = rng.permutation(m)[: m - 4 if kind == "mostly-masked" else 500]
    exclude = csr([masked.tolist(), [], masked[:9].tolist(), masked.tolist()])
    rows, scores = rank_exact(queries, items, k=k, exclude=exclude)
    full = queries @ items.T
    full[exclude.owners, exclude.items] = -np.inf
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(full, order, axis=1)
    assert np.array_equal(scores, expected)
    assert np.array_equal(rows, np.where(np.isneginf(expected), -1, order))


def test_evaluate_vectors_in_blocks_equals_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, items = rng.standard_normal((2, 30, 5)).astype(np.float32)
    lists = [rng.choice(30, 6, replace=False).tolist() for _ in range(30)]
    exclude, relevant = csr([x[:3] for x in lists]), csr([x[3:] for x in lists])
    rows, _ = rank_exact(queries, items, k=10, exclude=exclude)
    sums = MetricSums()
    sums.add(score_lists(rows, relevant, KS))
    monkeypatch.setattr("shardline.training.evaluation.ranking.BLOCK_SCORES", 30 * 7)
    steps: list[tuple[str, int, int]] = []
    got = evaluate_vectors(
        queries,
        items,
        relevant=relevant,
        exclude=exclude,
        ks=KS,
        progress=lambda *step: steps.append(step),
    )
    assert got.means == pytest.approx(sums.result().means)
    assert steps == [("evaluate", done, 30) for done in (7, 14, 21, 28, 30)]


def test_bad_vectors_are_refused() -> None:
    good = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(InvalidInput, match="wrong dimension"):
        rank_exact(good, np.ones((4, 2), dtype=np.float32), k=1)
    with pytest.raises(InvalidInput, match=r"items\[1\]: not finite"):
        rank_exact(good, np.array([[1, 1, 1], [1, np.nan, 1]], dtype=np.float32), k=1)
    with pytest.raises(InvalidInput, match="k: out of range"):
        rank_exact(good, good, k=0)
    with pytest.raises(InvalidInput, match="exclude: one list per query"):
        rank_exact(good, good, k=1, exclude=csr([[1]]))
