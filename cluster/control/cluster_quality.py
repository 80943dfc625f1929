"""What routers and shards have told the controller of answers and indexes, and what follows."""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from shardline.cluster.control.quality_config import QualityConfig
from shardline.cluster.control.repairs import repairs_due, together
from shardline.shards.core.messages import (
    MAX_SERVED_AT_ONCE,
    Absence,
    Quality,
    ReplicaKey,
    RouterNews,
    ShardHealth,
)
from shardline.shards.core.schema import FloatArray

EXPIRE_S = 15.0  # three announcements of a router
MAX_SERVED = 512  # vectors of served queries that are kept, of all routers: 256 KB at 128-d

RouterId = tuple[str, int]  # its host's node id, and its process


class ClusterQuality:
    """Times are seconds of the controller's clock."""

    def __init__(self, config: QualityConfig) -> None:
        self._config = config
        self._told: dict[RouterId, tuple[float, Quality]] = {}
        self._served: deque[FloatArray] = deque(maxlen=MAX_SERVED)
        self._model_version = ""

    def heard(self, router: RouterId, news: RouterNews, now_s: float) -> None:
        """What a router has announced."""
        self._told = {each: told for each, told in self._told.items() if now_s - told[0] < EXPIRE_S}
        if news.quality is not None:
            self._told[router] = now_s, news.quality
        served = news.served
        if served is None:
            return
        if served.model_version != self._model_version:
            self._served.clear()
            self._model_version = served.model_version
        self._served.extend(row.copy() for row in served.vectors[:MAX_SERVED_AT_ONCE])

    def served(self, model_version: str) -> FloatArray | None:
        """The newest vectors (n, dim) that queries of that model were served with; None: none."""
        if model_version != self._model_version or not self._served:
            return None
        return np.stack(self._served)

    def quality(self, generation: int, now_s: float) -> Quality | None:
        """Of the generation, as routers have found it lately."""
        return together(
            quality
            for at_s, quality in self._told.values()
            if now_s - at_s < EXPIRE_S and quality.generation == generation
        )

    def repairs(
        self, generation: int, replicas: Mapping[ReplicaKey, ShardHealth], now_s: float
    ) -> tuple[Absence, ...]:
        """As ``repairs_due``; replicas: what is known of them, of whatever generation."""
        shards = _worst_of(generation, replicas)
        return repairs_due(self._config, self.quality(generation, now_s), shards)

    def report(
        self, generation: int, replicas: Mapping[ReplicaKey, ShardHealth], now_s: float
    ) -> dict[str, Any]:
        """{"quality": as ``Quality`` or None, "health": [{"shard", and as ``ShardHealth``}],
        "repairs": [{"code", "text"}]}, ready for JSON."""
        quality = self.quality(generation, now_s)
        shards = sorted(_worst_of(generation, replicas).items())
        return {
            "quality": None if quality is None else asdict(quality),
            "health": [{"shard": number, **asdict(health)} for number, health in shards],
            "repairs": [asdict(each) for each in self.repairs(generation, replicas, now_s)],
        }


def _worst_of(
    generation: int, replicas: Mapping[ReplicaKey, ShardHealth]
) -> dict[int, ShardHealth]:
    """By shard: of its replicas one whose compaction failed, or that with most changes."""
    worst: dict[int, ShardHealth] = {}
    for key, health in replicas.items():
        if key.generation == generation and (
            key.shard not in worst or _badness(health) > _badness(worst[key.shard])
        ):
            worst[key.shard] = health
    return worst


def _badness(health: ShardHealth) -> tuple[bool, int]:
    return health.trouble is not None, health.changed
