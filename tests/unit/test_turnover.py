"""The benchmark of recall under replaced and deleted rows, on a small shard."""

from pathlib import Path

import pytest

from shardline.bench.index.turnover import Corpus, measure, synthetic
from shardline.shards.core.messages import SearchParams
from shardline.shards.index.spec import IndexSpec


@pytest.mark.parametrize("corpus", [Corpus.CLUSTERED, Corpus.MANIFOLD])
def test_recall_stays_that_of_a_fresh_index_until_the_distribution_is_another(
    tmp_path: Path, corpus: Corpus
) -> None:
    spec, params = IndexSpec(kind="ivfpq-fs", nlist=32), SearchParams(nprobe=8, rerank_factor=4)
    lines = measure(tmp_path, synthetic(corpus, 16, 3000), 3000, spec, params)
    built, changed, compacted, replaced, drifted = lines
    assert [line.rows for line in lines] == [3000, 2700, 2700, 2700, 2700]
    assert [line.in_delta for line in lines] == [0, 600, 0, 0, 0]
    assert built.recall == built.fresh > 0.9
    assert changed.recall > changed.fresh - 0.01, "what is written is found exactly"
    assert compacted.recall > compacted.fresh - 0.02
    assert replaced.recall > replaced.fresh - 0.02
    assert drifted.recall < replaced.recall
    assert drifted.fresh > 0.9
