"""``batch --live``: the queries of a job answered by a running cluster."""

from pathlib import Path

import pyarrow as pa

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.batch_report import BatchReport, timed_job
from shardline.cluster.batch.generation_items import GenerationItems
from shardline.cluster.batch.live_batch import (
    LiveCluster,
    LiveSearch,
    live_job,
    run_live,
)
from shardline.cluster.batch.live_columns import refuse_unknown
from shardline.cluster.batch.part_files import ClaimedFolder
from shardline.cluster.batch.queries import QuerySource
from shardline.cluster.batch.result_columns import ORIGINAL_IDS
from shardline.cluster.batch.spans import default_block_rows
from shardline.cluster.commands.batch_progress import NotedProgress
from shardline.cluster.commands.batch_sources import Asked, Encoder, open_source
from shardline.cluster.commands.encoder_kinds import encoder_kinds
from shardline.cluster.serving.endpoint import Address
from shardline.cluster.store import Store
from shardline.shards.core.errors import NotFound
from shardline.shards.core.schema import ORIGINAL_ID
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_attributes,
    read_generation,
)

# A live job is slow on purpose: small blocks lose little when it is interrupted.
LIVE_BLOCK_ROWS = 4096


def answer_live(
    asked: Asked,
    wanted: Wanted,
    claimed: ClaimedFolder,
    address: Address,
    store: Store,
    progress: NotedProgress,
    *,
    block_rows: int | None,
) -> BatchReport:
    """The job through the cluster at an address, from checks to the manifest of its result.

    Raises:
        InvalidInput, DataError: as offline, or the cluster refuses a query. Unavailable: it does
        not answer. VersionMismatch: it went over to another generation.
    """
    with address.client() as client:
        cluster = LiveCluster.of(client.status())
        local = _local_generation(store, cluster)
        source = open_source(
            asked,
            dim=cluster.dim,
            metric=cluster.metric,
            items=lambda: _items(local, store, cluster),
            encoder=lambda: Encoder(kinds=encoder_kinds(client), folder=None),
            work=claimed.work,
            note=progress.note,
        )
        search = LiveSearch(
            client=client,
            cluster=cluster,
            wanted=wanted,
            types=_types(local, wanted, store),
            note=progress.note,
        )
        search.check(source)
        rows = block_rows or min(LIVE_BLOCK_ROWS, default_block_rows(wanted.k))
        job = live_job(source, cluster, wanted, rows)
        with timed_job(job, claimed, progress, way="live") as run:
            run_live(source, search, run.output, run.todo, run.parts)
    return run.report


Local = tuple[Path, GenerationManifest]


def _local_generation(store: Store, cluster: LiveCluster) -> Local | None:
    """The folder of what the cluster serves, if this store has it."""
    folder = store.generation(cluster.generation)
    try:
        manifest = read_generation(folder)
    except NotFound:
        return None
    return (folder, manifest) if manifest.model_version == cluster.model_version else None


def _needed(local: Local | None, store: Store, what: str) -> Local:
    if local is None:
        raise NotFound(
            f"{store.root}: not the generation that the cluster serves, which {what} needs",
            hint="name its store with --store",
        )
    return local


def _items(local: Local | None, store: Store, cluster: LiveCluster) -> QuerySource:
    folder, manifest = _needed(local, store, "--items")
    return GenerationItems(folder, manifest, None)


def _types(local: Local | None, wanted: Wanted, store: Store) -> dict[str, pa.DataType]:
    """The types of the columns that are wanted: over HTTP values have those of JSON."""
    if not wanted.attributes and not wanted.original_ids:
        return {}
    folder, manifest = _needed(local, store, "--return and --original-ids")
    table = read_attributes(folder, manifest, 0)
    types = {} if table is None else {each.name: each.type for each in table.schema}
    refuse_unknown(wanted.attributes, types)
    return types | {ORIGINAL_IDS: types.get(ORIGINAL_ID, pa.int64())}
