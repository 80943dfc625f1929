"""An index with its approximations removed one by one, to measure the recall each of them costs.

    codes       every code is scored: all inverted lists probed, a graph replaced by a scan of its
                vectors; no re-ranking. Recall lost here is lost by the quantiser.
    re-ranked   the same with the stored copies that re-rank; only where the index has them
    configured  the index as it is searched: recall lost since the stage before is lost in the
                lists, or the parts of the graph, that a query does not visit

For measurements only: the variants share the index's memory, and a scan of all codes is slow.
"""

from enum import StrEnum
from typing import Any

import faiss

from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric
from shardline.shards.index.layers import layers_of
from shardline.shards.index.main_index import MainIndex


class Stage(StrEnum):
    CODES = "codes"
    RERANKED = "re-ranked"
    CONFIGURED = "configured"


def stages_of(index: Any, metric: Metric, defaults: SearchParams) -> dict[Stage, MainIndex]:
    """What to search at each stage, in order; ``index`` is a whole faiss index on the CPU.

    The results are views of ``index``: the caller must keep it alive while it uses them.
    """
    layers = layers_of(index)
    every_list = layers.base.nlist if layers.is_ivf else None
    exhaustive = SearchParams(nprobe=every_list, rerank_factor=defaults.rerank_factor)
    codes = without_graph(without_rerank(index))
    found = {Stage.CODES: MainIndex(codes, metric=metric, defaults=exhaustive)}
    if layers.refine is not None:
        scanned = without_graph(index)
        found[Stage.RERANKED] = MainIndex(scanned, metric=metric, defaults=exhaustive)
    found[Stage.CONFIGURED] = MainIndex(index, metric=metric, defaults=defaults)
    return found


def without_rerank(index: Any) -> Any:
    """The index below the re-ranking layer, a view of ``index``; itself where there is none."""
    layers = layers_of(index)
    return faiss.downcast_index(layers.refine.base_index) if layers.refine is not None else index


def without_graph(index: Any) -> Any:
    """The same codes in the same layers, without a graph; ``index`` itself if it has none."""
    layers = layers_of(index)
    if not layers.is_hnsw:
        return index
    bare = faiss.downcast_index(layers.base.storage)
    if layers.transform is not None:
        chain = layers.transform.chain
        bare = faiss.IndexPreTransform(bare)
        for place in reversed(range(chain.size())):
            bare.prepend_transform(chain.at(place))
        bare.ntotal = layers.base.ntotal  # the constructor assumes an empty storage
    if layers.refine is not None:
        bare = faiss.IndexRefine(bare, layers.refine.refine_index)
    return bare
