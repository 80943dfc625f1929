"""From the best checkpoint of a run to an embedding set with its query encoder.

``<store>/embeddings/<model_version>/``: every catalogue item's vector and attributes, sample
queries, and the query tower as plain arrays that ``router.encoder.query_encoder`` runs without
torch. The version is a
hash of weights, features, configuration and catalogue: the same export twice has the same name, and
a catalogue that changed gets a set, and a query encoder with its histories, of its own. It need not
be the one trained on, as long as it has the feature columns.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from shardline.shards.core.encoder_files import MappedArrays, Weights, write_encoder
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray
from shardline.shards.storage.embedding_set import (
    ENCODER_FOLDER,
    EmbeddingSet,
    EmbeddingWriter,
    embedding_writer,
    open_embedding_set,
)
from shardline.shards.storage.vector_files import MAX_SAMPLE_QUERIES
from shardline.training.data.csr import Csr
from shardline.training.data.tables import INTERACTIONS, ITEMS, USERS, Dataset, open_dataset
from shardline.training.evaluation.user_queries import KNOWN_BEFORE, SAMPLE_SEED, sample_users
from shardline.training.features.fitted import Block
from shardline.training.model.checkpoint import Run, load_best
from shardline.training.model.encoding import BLOCK_ROWS, encode_items, encode_queries
from shardline.training.model.popularity import lengths_of, metric_of
from shardline.training.model.towers import Inputs, TwoTower

VERSION_DIGITS = 12
CUT_OFF = "-unfinished"  # ends the version of a model whose training has not ended


def export(
    run_folder: Path,
    data_folder: Path,
    store: Path,
    *,
    created_at: str,
    unfinished: bool = False,
    progress: Progress | None = None,
) -> EmbeddingSet:
    """Writes the embedding set of the run's best model, or returns it if it is there already.

    created_at: ISO 8601 time, for the manifest. unfinished: also of a training that has not ended,
    which its version then says. Progress stage: ``export``.

    Raises:
        NotFound: no trained run, or no dataset. DataError: the training has not ended, or the
            items lack a feature column.
    """
    run, model = load_best(run_folder, unfinished=unfinished)
    dataset = open_dataset(data_folder, keep=True)
    version = model_version(run, model, dataset)
    target = store / "embeddings" / version
    if target.exists():
        return open_embedding_set(target, version=version)
    exponent = run.config.popularity_exponent
    with embedding_writer(
        target,
        model_version=version,
        dim=model.dim,
        metric=metric_of(exponent),
        created_at=created_at,
        cut=dataset.cut,
    ) as writer:
        encoder_folder = writer.folder / ENCODER_FOLDER
        encoder_folder.mkdir()
        _export_items(run, model, dataset, writer, progress)
        export_encoder(run, model, version, encoder_folder)
        queries = sample_queries(run, model, dataset)
        if len(queries):
            writer.queries(queries)
    return open_embedding_set(target, verify=False)


def model_version(run: Run, model: TwoTower, dataset: Dataset) -> str:
    """Twelve hex digits over weights, features, configuration and the items table.

    After them "-unfinished" where training has not ended: the name goes into the embedding set,
    the generation and every answer.
    """
    digest = hashlib.sha256()
    declared = {
        "config": run.config.identity(),
        "space": run.space.to_json(),
        "items": dataset.checksum(ITEMS),
    }
    if run.config.popularity_exponent:
        declared["interactions"] = dataset.checksum(INTERACTIONS)
    digest.update(json.dumps(declared, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()[:VERSION_DIGITS] + (CUT_OFF if run.cut_off else "")


def _export_items(
    run: Run, model: TwoTower, dataset: Dataset, writer: EmbeddingWriter, progress: Progress | None
) -> None:
    """Vector and attributes of every item and, for the encoder, its row of a history.

    A block at a time: what is computed is never in memory as a whole.
    """
    items = dataset.items()
    lengths = lengths_of(dataset, run.config.fitted_splits, run.config.popularity_exponent)
    history = MappedArrays(writer.folder / ENCODER_FOLDER, items.num_rows)
    for start in range(0, items.num_rows, BLOCK_ROWS):
        table = items.slice(start, BLOCK_ROWS).combine_chunks()
        ids, block = table["item_id"].to_numpy(), run.space.item.encode(table, ITEMS)
        vectors = encode_items(model, block) * lengths[start : start + len(block), None]
        attributes = table.drop_columns(["item_id"]).to_batches()
        writer.append(ids, vectors, attributes[0] if attributes else None)
        if run.space.history is not None:
            history.write(start, {"history.item_ids": ids, **_history_rows(model, block)})
        if progress is not None:
            progress("export", start + len(block), items.num_rows)


@torch.no_grad()
def sample_queries(run: Run, model: TwoTower, dataset: Dataset) -> FloatArray:
    """(n, dim) float32 outputs of the query tower for at most MAX_SAMPLE_QUERIES validation users.

    Their history is train, so test plays no part. The same users at every call; none where nobody
    has a validation item.
    """
    users = np.flatnonzero(dataset.positives("val").lengths)
    if not len(users):
        return np.empty((0, model.dim), np.float32)
    users = sample_users(users, MAX_SAMPLE_QUERIES, np.random.default_rng(SAMPLE_SEED))
    past = dataset.positives(*KNOWN_BEFORE["val"]).take(users, model.history_length)
    seen, places = np.unique(past.items, return_inverse=True)  # a small part of a large catalogue
    items = run.space.item.encode(dataset.items().take(pa.array(seen)).combine_chunks(), ITEMS)
    inputs = run.space.query.encode(dataset.users().take(pa.array(users)).combine_chunks(), USERS)
    return encode_queries(model, inputs, Csr(past.indptr, places.astype(np.int64)), items)


def export_encoder(run: Run, model: TwoTower, version: str, folder: Path) -> None:
    """Writes the tower into the folder, which has the rows of the history, if any, already."""
    weights = _tower_weights(model)
    columns = run.space.query
    features: list[dict[str, Any]] = [asdict(c) for c in (*columns.vocabularies, *columns.bags)]
    features += [{"kind": "numeric", **asdict(s)} for s in columns.standardisers]
    if run.space.history is not None:
        features.append(run.space.history.model_dump())
        if model.history.attends:
            weights["history.recency"] = model.history.recency.detach().cpu().numpy()
    config = {
        "model_version": version,
        "dim": model.dim,
        "projection": run.config.towers.query.projection,
        "features": features,
    }
    write_encoder(folder, config, weights)


def _tower_weights(model: TwoTower) -> Weights:
    weights = {
        name.replace("norms.", "norm."): tensor
        for name, tensor in model.query_tower.state_dict().items()
    }
    tables = (*model.query_rows.embeddings, *model.query_rows.bags)
    weights |= {f"embedding.{i}": table.weight.detach() for i, table in enumerate(tables)}
    return {name: tensor.cpu().numpy() for name, tensor in weights.items()}


@torch.no_grad()
def _history_rows(model: TwoTower, block: Block) -> Weights:
    """What the query tower takes of each of the items as past ones: (n, width), (n,) scores."""
    rows: Tensor = model.item_rows(Inputs.of(block, model.log_temperature.device))
    arrays = {"history.rows": rows.cpu().numpy()}
    if model.history.attends:
        arrays["history.item_scores"] = model.history.item_scores(rows).cpu().numpy()
    return arrays
