"""Who finds the items nearest to a query vector: this process, exactly, or a running cluster.

Both are a ``Search``; what is done with the items found is ``training.mining``.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import Unavailable, VersionMismatch
from shardline.shards.core.schema import EMPTY_ID, MAX_K, FloatArray, IdArray, Ranked
from shardline.training.data.table_checks import rows_of
from shardline.training.evaluation.ranking import rank_exact

logger = logging.getLogger(__name__)

TIMEOUT_MS = 10_000.0  # the most a router grants by default: deep batches over a busy cluster
ATTEMPTS = 6  # of one request; with the waits below a shard has 15 s to come back
FIRST_WAIT_S = 0.5  # before the second attempt, doubled each time


class Search(Protocol):
    """Ranks the catalogue for query vectors. ``in_flight`` calls at once are good for it."""

    @property
    def in_flight(self) -> int: ...

    def __call__(self, queries: FloatArray, k: int) -> Ranked:
        """Item rows, (n, m), of queries (n, dim) float32.

        m is k, or less where there are fewer; -inf and -1 fill what a row does not have.
        """


@dataclass(frozen=True, slots=True)
class ExactSearch:
    """Every item's dot product with every query; items (m, dim) float32."""

    items: FloatArray
    in_flight: int = 1  # the matrix product has the cores already

    def __call__(self, queries: FloatArray, k: int) -> Ranked:
        return rank_exact(queries, self.items, k=min(k, len(self.items)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSearch:
    """Asks the cluster that serves ``generation`` over HTTP; use ``open_cluster`` to make one.

    Only complete answers count: what is unavailable is tried again, for some seconds. A list holds
    MAX_K items at most, known items included.
    """

    client: Client
    item_ids: IdArray  # of the dataset's items, ascending
    model_version: str
    generation: int
    in_flight: int = 4
    wait: Callable[[float], None] = time.sleep

    def __call__(self, queries: FloatArray, k: int) -> Ranked:
        """Raises VersionMismatch: another model or generation answers now. DataError: an item that
        the dataset does not have. Unavailable: still no complete answer after several attempts.
        """
        for attempt in range(1, ATTEMPTS):
            try:
                return self._ask(queries, k)
            except Unavailable as error:
                logger.info("attempt %d of %d: %s", attempt, ATTEMPTS, error)
                self.wait(FIRST_WAIT_S * 2 ** (attempt - 1))
        return self._ask(queries, k)

    def _ask(self, queries: FloatArray, k: int) -> Ranked:
        answer = self.client.search(
            vectors=queries,
            k=min(k, MAX_K, len(self.item_ids)),
            min_coverage=1.0,
            timeout_ms=TIMEOUT_MS,
        )
        if (answer.model_version, answer.generation) != (self.model_version, self.generation):
            raise VersionMismatch(
                "the cluster serves something else than when mining began",
                expected=f"model {self.model_version}, generation {self.generation}",
                got=f"model {answer.model_version}, generation {answer.generation}",
                hint="mine again",
            )
        filled = answer.ids != EMPTY_ID
        rows = np.full(answer.ids.shape, EMPTY_ID, dtype=np.int64)
        rows[filled] = rows_of(self.item_ids, answer.ids[filled], field="answer.ids")
        return Ranked(rows, answer.scores)


def open_cluster(client: Client, item_ids: IdArray, model_version: str) -> ClusterSearch:
    """The cluster as a ``Search``, if it serves the items of this very model.

    Raises:
        VersionMismatch: it serves another one. Unavailable: nothing answers.
    """
    status = client.status()
    if status["model_version"] != model_version:
        raise VersionMismatch(
            "the cluster serves another model than the run's",
            field="model_version",
            expected=model_version,
            got=str(status["model_version"]),
            hint="export the run, build and serve it; or name the run that is served",
        )
    return ClusterSearch(
        client=client,
        item_ids=item_ids,
        model_version=model_version,
        generation=int(status["generation"]),
    )
