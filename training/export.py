"""From the best checkpoint of a run to an embedding set with its query encoder.

``<store>/embeddings/<model_version>/``: every catalogue item's vector and attributes, and the query
tower as plain arrays that ``router.encoder.query_encoder`` runs without torch. The version is a
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
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from shardline.shards.core.files import sha256_of, write_json
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray
from shardline.shards.storage.embedding_set import (
    ENCODER_FOLDER,
    EmbeddingSet,
    embedding_writer,
    open_embedding_set,
)
from shardline.training.data.tables import INTERACTIONS, ITEMS, Dataset, open_dataset
from shardline.training.model.checkpoint import Run, load_best
from shardline.training.model.encoding import BLOCK_ROWS, encode_items
from shardline.training.model.popularity import lengths_of, metric_of
from shardline.training.model.towers import Inputs, TwoTower

ENCODER_FORMAT_VERSION = 2  # of encoder.json; router.encoder.query_encoder reads it
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
    dataset = open_dataset(data_folder)
    version = model_version(run, model, dataset)
    target = store / "embeddings" / version
    if target.exists():
        return open_embedding_set(target)
    items, exponent = dataset.items(), run.config.popularity_exponent
    lengths = lengths_of(dataset, run.config.fitted_splits, exponent)
    with embedding_writer(
        target,
        model_version=version,
        dim=model.dim,
        metric=metric_of(exponent),
        normalised=exponent == 0,
        created_at=created_at,
    ) as writer:
        for start in range(0, items.num_rows, BLOCK_ROWS):
            table = items.slice(start, BLOCK_ROWS).combine_chunks()
            vectors = encode_items(model, run.space.item.encode(table, ITEMS))
            vectors *= lengths[start : start + table.num_rows, None]
            attributes = table.drop_columns(["item_id"]).to_batches()
            writer.append(
                table["item_id"].to_numpy(), vectors, attributes[0] if attributes else None
            )
            if progress is not None:
                progress("export", start + table.num_rows, items.num_rows)
        export_encoder(run, model, dataset, version, writer.folder / ENCODER_FOLDER)
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


def export_encoder(run: Run, model: TwoTower, dataset: Dataset, version: str, folder: Path) -> None:
    """Writes encoder.json and weights.safetensors, as ``router.encoder`` reads them."""
    folder.mkdir(parents=True)
    weights = _tower_weights(model)
    columns = run.space.query
    features: list[dict[str, Any]] = [asdict(c) for c in (*columns.vocabularies, *columns.bags)]
    features += [{"kind": "numeric", **asdict(s)} for s in columns.standardisers]
    if run.space.history is not None:
        features.append(run.space.history.model_dump())
        weights |= _history_table(run, model, dataset)
    save_file(weights, folder / "weights.safetensors")
    write_json(
        folder / "encoder.json",
        {
            "format_version": ENCODER_FORMAT_VERSION,
            "model_version": version,
            "dim": model.dim,
            "projection": run.config.towers.query.projection,
            "features": features,
            "weights_sha256": sha256_of(folder / "weights.safetensors"),
        },
    )


def _tower_weights(model: TwoTower) -> dict[str, NDArray[Any]]:
    weights = {
        name.replace("norms.", "norm."): tensor
        for name, tensor in model.query_tower.state_dict().items()
    }
    tables = (*model.query_rows.embeddings, *model.query_rows.bags)
    weights |= {f"embedding.{i}": table.weight.detach() for i, table in enumerate(tables)}
    return {name: tensor.cpu().numpy() for name, tensor in weights.items()}


@torch.no_grad()
def _history_table(run: Run, model: TwoTower, dataset: Dataset) -> dict[str, NDArray[Any]]:
    """Item ids, ascending, the input row of each, and what attention needs to pool them."""
    items, device = dataset.items(), model.log_temperature.device
    parts: list[FloatArray] = [np.empty((0, model.item_rows.width), np.float32)]
    scores: list[FloatArray] = [np.empty(0, np.float32)]
    for start in range(0, items.num_rows, BLOCK_ROWS):
        block = run.space.item.encode(items.slice(start, BLOCK_ROWS).combine_chunks(), ITEMS)
        rows: Tensor = model.item_rows(Inputs.of(block, device))
        parts.append(rows.cpu().numpy())
        if model.history.attends:
            scores.append(model.history.item_scores(rows).cpu().numpy())
    table = {
        "history.item_ids": items["item_id"].to_numpy().copy(),
        "history.rows": np.concatenate(parts),
    }
    if model.history.attends:
        table["history.item_scores"] = np.concatenate(scores)
        table["history.recency"] = model.history.recency.cpu().numpy()
    return table
