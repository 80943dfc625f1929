"""The recall budget of a generation: ``evaluate --budget`` measures and prints it here."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from shardline.cluster.commands.remote import ask_features
from shardline.cluster.commands.report import budget_rows
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.generation_stages import LocalGeneration
from shardline.cluster.serving.endpoint import Address
from shardline.cluster.serving.ray_session import cores
from shardline.cluster.store import Store
from shardline.router.client.sync_client import Client
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import InvalidInput, NotFound
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.index.stages import Stage
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.generation import verify_query_encoder
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.budget import (
    BudgetStage,
    ExactRanking,
    StageResult,
    recall_budget,
    waterfall,
)
from shardline.training.evaluation.user_queries import KNOWN_BEFORE, evaluation_task, query_features


def measure_budget(
    store: Store,
    dataset: Dataset,
    split: str,
    ks: tuple[int, ...],
    progress: StageProgress,
    *,
    generation: int | None,
    cluster: Address | None,
    max_users: int | None,
    without_own: bool = False,
) -> list[StageResult]:
    """Recall at each stage from the model's own vectors to the served answer, of one generation.

    Users are encoded by the generation's own encoder, and compared with the vectors of the
    embedding set it was built from.

    Raises:
        NotFound: no such generation, one without an encoder, or its embedding set is gone.
        InvalidInput: the cluster serves another generation.
    """
    number = generation if generation is not None else store.current()
    local = LocalGeneration(store.generation(number), threads=cores())
    encoder = QueryEncoder.load(verify_query_encoder(store.generation(number), local.manifest))
    version = local.manifest.model_version
    corpus = open_embedding_set(_embeddings_of(store, version), version=version)
    task = evaluation_task(dataset, split, ks=ks, max_users=max_users, without_own=without_own)
    kinds = {feature["name"]: feature["kind"] for feature in encoder.features}
    features = query_features(dataset, kinds, task.users, KNOWN_BEFORE[split])
    queries = encoder.encode(features)
    exact = ExactRanking(queries, corpus)
    stages = [
        BudgetStage(name="model", about="exact, unquantised vectors", ask=exact.ask),
        *(_index_stage(local, stage, queries) for stage in local.stages),
    ]
    item_ids = dataset.item_ids
    if cluster is None:
        return recall_budget(stages, task, item_ids, score=exact.score, progress=progress)
    with cluster.client() as client:
        _check_generation(client, number)
        stages.append(
            BudgetStage(
                name="cluster",
                about="over HTTP",
                ask=lambda places, k: ask_features(
                    client, [features[place] for place in places], k
                ),
            )
        )
        return recall_budget(stages, task, item_ids, score=exact.score, progress=progress)


def print_budget(
    dataset: Dataset, split: str, results: list[StageResult], *, as_json: bool
) -> None:
    """Prints a waterfall table per cut-off, or all of it as JSON."""
    ks = tuple(results[0].agreement)
    if as_json:
        report = {
            "users": results[0].metrics.users,
            "stages": [
                {"name": r.name, "about": r.about, **r.metrics.means}
                | {f"agreement@{k}": share for k, share in r.agreement.items()}
                for r in results
            ],
            "waterfall": {f"recall@{k}": [asdict(s) for s in waterfall(results, k)] for k in ks},
        }
        click.echo(json.dumps(report, indent=2))
        return
    for k in ks:
        title = f"recall budget at {k}: {dataset.path.name}, {split} split"
        header, rows = budget_rows(waterfall(results, k), k)
        print_table(f"{title}, {results[0].metrics.users:,} users", header, rows)


def _embeddings_of(store: Store, model_version: str) -> Path:
    folder = store.embeddings / model_version
    if not folder.is_dir():
        raise NotFound(
            f"{folder}: the embedding set that the generation was built from is gone",
            hint="export the model again, or measure with --url or --through-cluster",
        )
    return folder


def _index_stage(local: LocalGeneration, stage: Stage, queries: FloatArray) -> BudgetStage:
    def ask(places: IdArray, k: int) -> IdArray:
        return local.search(stage, queries[places], k)

    return BudgetStage(name=stage.value, about=local.describe(stage), ask=ask)


def _check_generation(client: Client, number: int) -> None:
    served = client.status()["generation"]
    if served != number:
        raise InvalidInput(
            "the cluster serves another generation",
            field="generation",
            expected=str(number),
            got=str(served),
        )
