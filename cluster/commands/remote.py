"""A running cluster asked over HTTP by the users of a data set, for ``evaluate`` and ``demo``."""

from typing import Any

from shardline.cluster.commands.encoder_kinds import encoder_kinds
from shardline.cluster.console import StageProgress
from shardline.router.client.sync_client import Client
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import IdArray
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.evaluate import evaluate_through
from shardline.training.evaluation.ranking_metrics import MetricResult

EVALUATION_TIMEOUT_MS = 10_000.0  # generous: a batch with k = 1,000 over a flat index is slow


def evaluate_cluster(
    client: Client,
    dataset: Dataset,
    split: str,
    ks: tuple[int, ...],
    progress: StageProgress,
    *,
    max_users: int | None = None,
    params: SearchParams | None = None,
    with_segments: bool = False,
    without_own: bool = False,
    graded: bool = False,
) -> MetricResult:
    """The metrics of a running cluster's answers to the users' features, over HTTP."""
    return evaluate_through(
        lambda features, k: ask_features(client, features, k, params),
        dataset,
        kinds=encoder_kinds(client),
        split=split,
        ks=ks,
        max_users=max_users,
        with_segments=with_segments,
        without_own=without_own,
        graded=graded,
        progress=progress,
    )


def ask_features(
    client: Client, features: list[dict[str, Any]], k: int, params: SearchParams | None = None
) -> IdArray:
    """(n, k) int64 item ids of a complete answer; Unavailable where a shard is missing."""
    answer = client.search(
        features=features,
        k=k,
        params=params,
        min_coverage=1.0,
        timeout_ms=EVALUATION_TIMEOUT_MS,
    )
    return answer.ids
