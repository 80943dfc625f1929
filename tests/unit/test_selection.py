"""Which rows may come back, as bits: against sets, and without change of what was there before."""

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.messages import NO_PARAMS
from shardline.shards.core.schema import Metric
from shardline.shards.index.selection import Selection
from tests.engine import build_main


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64, 1001])
def test_excluding_more_and_more_equals_excluding_all_at_once(rows: int) -> None:
    order = np.random.default_rng(rows).permutation(rows)
    selection = Selection.without(order[:1], rows=rows)
    assert selection is not None
    grown = [(selection, {int(order[0])})]
    for part in np.array_split(order[1:], 5):
        selection = selection.excluding(part)
        grown.append((selection, grown[-1][1] | set(part.tolist())))
    for each, excluded in grown:
        live = np.array([row not in excluded for row in range(rows)])
        assert (each.rows, each.num_excluded) == (rows, len(excluded))
        np.testing.assert_array_equal(each.live, live)
        np.testing.assert_array_equal(each.are_live(np.arange(rows)), live)
        asked = np.random.default_rng(1).integers(0, rows, 20)
        np.testing.assert_array_equal(each.are_live(asked), live[asked])
        at_once = Selection.without(np.array(sorted(excluded)), rows=rows)
        assert at_once is not None
        np.testing.assert_array_equal(at_once.bits, each.bits)
    assert selection.live.sum() == 0


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "pq", "ivfpq-fs"])
def test_each_of_several_selections_hides_its_own_rows(kind: str) -> None:
    main = build_main(manifold(300, 8, 4, seed=1), metric=Metric.DOT, kind=kind)
    queries = manifold(3, 8, 4, seed=1, stream=1)
    selection = Selection.without(np.array([299]), rows=300)
    assert selection is not None
    steps = [selection]
    for _ in range(4):
        best = np.unique(main.search(queries, 5, NO_PARAMS, steps[-1]).ids)
        steps.append(steps[-1].excluding(best))
    hidden = [set(np.flatnonzero(~step.live).tolist()) for step in steps]
    for at in (0, 4, 1, 3, 0, 2):
        found = set(main.search(queries, 20, NO_PARAMS, steps[at]).ids.ravel().tolist())
        assert not found & hidden[at]
        if at < 4:  # what the next ones hide is found
            assert found & (hidden[at + 1] - hidden[at])


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 64, 1001])
def test_a_mask_and_hidden_rows_together(rows: int) -> None:
    rng = np.random.default_rng(rows)
    for share in (0, 0.3, 1):
        mask = rng.random(rows) < share
        matching = Selection.of(mask)
        assert (matching.rows, matching.num_selected) == (rows, mask.sum())
        np.testing.assert_array_equal(matching.live, mask)
        np.testing.assert_array_equal(matching.selected(), np.flatnonzero(mask))
        assert matching & None is matching
        hidden = np.flatnonzero(rng.random(rows) < 0.5)
        both = matching & Selection.without(hidden, rows=rows)
        kept = mask & ~np.isin(np.arange(rows), hidden)
        np.testing.assert_array_equal(both.live, kept)
        assert both.num_excluded == rows - kept.sum()
        assert both is matching or both.origin is matching
        assert (both & Selection.without(hidden[:1], rows=rows)) is both
