"""A generation's files as what ``mine`` and ``evaluate`` ask: the engine of batch jobs, no cluster.

All shards are in memory; every caller's thread searches them with one core.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardline.cluster.batch.batch_job import Wanted
from shardline.cluster.batch.loaded_shards import LoadedShards, cores, groups_of, loaded_bytes
from shardline.cluster.preflight.free_memory import free_memory
from shardline.cluster.preflight.servable import servable_generation
from shardline.cluster.store import Store
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.errors import Unavailable, VersionMismatch
from shardline.shards.core.schema import (
    EMPTY_ID,
    MAX_K,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
    normalise,
)
from shardline.shards.index.main_index import set_search_threads
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_generation,
    verify_query_encoder,
)
from shardline.training.data.table_checks import rows_of


@dataclass(frozen=True, slots=True, eq=False)
class OfflineGeneration:
    """A generation in this process."""

    folder: Path
    manifest: GenerationManifest
    loaded: LoadedShards

    @classmethod
    def open(cls, store: Store, number: int) -> "OfflineGeneration":
        """Verifies and loads it.

        Raises:
            NotFound, CorruptFile, NewerFormat: as ``servable_generation``. Unavailable: it does not
                fit into memory.
        """
        folder = store.generation(servable_generation(store, number))
        manifest = read_generation(folder)
        sizes = loaded_bytes(manifest)
        if len(groups_of(sizes, free_memory().available_bytes, 0)) > 1:
            raise Unavailable(
                "the generation does not fit into memory",
                expected=f"{sum(sizes) / 2**20:,.0f} MiB for {len(sizes)} shards",
                hint="free memory, or ask a running cluster",
            )
        return cls(folder, manifest, LoadedShards.load(folder, range(len(sizes))))

    def search(self, vectors: FloatArray, k: int) -> Ranked:
        """Item ids (n, k) of vectors (n, dim) float32 of any length; -1 where there are fewer."""
        set_search_threads(1)  # callers have threads of their own
        queries = normalise(vectors) if self.manifest.metric is Metric.COSINE else vectors
        return self.loaded.search(queries, Wanted(k=k))

    def encoder(self) -> QueryEncoder:
        """Its query encoder. Raises NotFound: it has none. CorruptFile: it is altered."""
        return QueryEncoder.load(verify_query_encoder(self.folder, self.manifest))


@dataclass(frozen=True, slots=True)
class GenerationSearch:
    """A generation as a ``training.evaluation.searchers.Search``; use ``open_search``."""

    generation: OfflineGeneration
    item_ids: IdArray  # of the dataset's items, ascending
    in_flight: int

    def __call__(self, queries: FloatArray, k: int) -> Ranked:
        """Raises DataError: an item that the dataset does not have."""
        found = self.generation.search(queries, min(k, MAX_K, len(self.item_ids)))
        filled = found.ids != EMPTY_ID
        rows = np.full(found.ids.shape, EMPTY_ID, dtype=np.int64)
        rows[filled] = rows_of(self.item_ids, found.ids[filled], field="generation")
        return Ranked(rows, found.scores)


def open_search(
    store: Store, number: int, item_ids: IdArray, model_version: str
) -> GenerationSearch:
    """The generation as a ``Search``, if it holds the items of this very model.

    Raises:
        VersionMismatch: it is another model's. Others as ``OfflineGeneration.open``.
    """
    generation = OfflineGeneration.open(store, number)
    if generation.manifest.model_version != model_version:
        raise VersionMismatch(
            f"generation {number} is of another model than the run's",
            field="model_version",
            expected=model_version,
            got=generation.manifest.model_version,
            hint="export the run and build it; or name the run that was built",
        )
    return GenerationSearch(generation, item_ids, cores())


def encoded_search(generation: OfflineGeneration) -> "EncodedSearch":
    """The generation as ``evaluate_through`` asks: by features. Raises as ``encoder``."""
    return EncodedSearch(generation, generation.encoder())


@dataclass(frozen=True, slots=True)
class EncodedSearch:
    """Features to item ids (n, k) int64."""

    generation: OfflineGeneration
    encoder: QueryEncoder

    @property
    def kinds(self) -> dict[str, str]:
        """Name and kind of the features that are needed."""
        return {feature["name"]: feature["kind"] for feature in self.encoder.features}

    def __call__(self, features: list[dict[str, Any]], k: int) -> IdArray:
        return self.generation.search(self.encoder.encode(features), k).ids
