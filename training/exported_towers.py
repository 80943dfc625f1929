"""The towers as plain arrays, in the form of ``shards.core.encoder_files``.

``router.encoder.query_encoder`` and ``router.encoder.item_encoder`` run them without torch.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardline.shards.core.encoder_files import MappedArrays, Weights, write_encoder
from shardline.shards.core.exact_tower import ExactTower, mean_row
from shardline.shards.core.schema import FloatArray, normalise
from shardline.training.features.fitted import Block, Columns
from shardline.training.model.checkpoint import Run
from shardline.training.model.towers import InputRows, Inputs, TwoTower

ITEM_ID = "item_id"


def export_query_encoder(
    run: Run, model: TwoTower, version: str, folder: Path, text_encoders: Mapping[str, str]
) -> None:
    """Writes the query tower into the folder, which has the rows of the history, if any.

    text_encoders: as ``Dataset.text_encoders``; features of these columns of users take texts.
    """
    if model.tied:
        weights = _tower_weights(model.item_tower, model.item_rows)
    else:
        weights = _tower_weights(model.query_tower, model.query_rows)
    features = _features(run.space.query)
    for feature in features:
        made_by = text_encoders.get(f"users.{feature['column']}")
        if made_by is not None and feature["kind"] == "numeric":
            feature["text_encoder"] = made_by
    if run.space.history is not None:
        features.append(run.space.history.model_dump())
        if model.history.attends:
            weights["history.recency"] = model.history.recency.detach().cpu().numpy()
    config = {
        "model_version": version,
        "dim": model.dim,
        "projection": run.config.towers.query.projection,
        "features": features,
        **_kind(model),
    }
    write_encoder(folder, config, weights)


def export_item_encoder(
    run: Run, model: TwoTower, version: str, columns: pa.Schema, folder: Path
) -> None:
    """Writes the item tower into the folder, which has the lengths of popular items, and what the
    tower reads of the users of each item, if any.

    columns: the catalogue's, without the id.
    """
    weights = _tower_weights(model.item_tower, model.item_rows)
    features = _features(run.space.item)
    for place, feature in enumerate(features):
        is_vocabulary = feature["kind"] in ("id", "categorical") and feature["values"]
        if feature["column"] == ITEM_ID and is_vocabulary:
            _map_ids(folder, feature, weights.pop(f"embedding.{place}"))
    if model.history.attends:
        arrays = {"key.weight": model.history.key.weight, "key.bias": model.history.key.bias}
        for name, tensor in (arrays | {"query": model.history.query}).items():
            weights[f"history.{name}"] = tensor.detach().cpu().numpy()
    config = {
        "model_version": version,
        "dim": model.dim,
        "projection": run.config.towers.item.projection,
        "features": features,
        "attributes": {column.name: str(column.type) for column in columns},
        **_kind(model),
    }
    if run.space.audience is not None:
        config["audience"] = run.space.audience.model_dump()
    write_encoder(folder, config, weights)


class TiedTower:
    """The item tower of a tied model, as the exported encoders compute it bit for bit."""

    def __init__(self, model: TwoTower) -> None:
        self._summed = model.item_rows.summed
        weights = _tower_weights(model.item_tower, model.item_rows)
        self._tables = [weights[name] for name in weights if name.startswith("embedding.")]
        self._unit = model.unit
        self._tower = ExactTower(None if self._summed else weights, unit=self._unit)

    def __call__(self, block: Block) -> FloatArray:
        """(n, dim) float32 of unit length under cosine, as the router makes a query's."""
        columns, bags = block.categorical.T, block.bags
        parts: list[FloatArray] = [
            table[rows] for table, rows in zip(self._tables, columns, strict=False)
        ]
        for table, bag in zip(self._tables[len(columns) :], bags, strict=True):
            lists = np.split(bag.items, bag.indptr[1:-1])
            parts.append(np.stack([mean_row(table, places.tolist()) for places in lists]))
        if self._summed:
            vectors = self._tower(sum(parts[1:], start=parts[0]))
        else:
            vectors = self._tower(np.concatenate([*parts, block.numeric], axis=1))
        return normalise(vectors) if self._unit else vectors


@torch.no_grad()
def history_rows(model: TwoTower, block: Block) -> Weights:
    """What the query tower takes of each of the items as past ones: (n, width), (n,) scores."""
    rows: Tensor = model.item_rows(Inputs.of(block.alone(), model.log_temperature.device))
    arrays = {"history.rows": rows.cpu().numpy()}
    if model.history.attends:
        arrays["history.item_scores"] = model.history.item_scores(rows).cpu().numpy()
    return arrays


@torch.no_grad()
def audience_rows(model: TwoTower, block: Block) -> Weights:
    """What the item tower takes of the users of each of the items: (n, width)."""
    rows = model.audience_rows(Inputs.of(block, model.log_temperature.device))
    return {"audience.rows": rows.cpu().numpy()}


def _map_ids(folder: Path, feature: dict[str, Any], table: NDArray[Any]) -> None:
    """Puts the vocabulary of item ids and its rows into files that readers map: there may be as
    many as items."""
    ids = np.array(feature["values"], dtype=np.int64)
    MappedArrays(folder, len(ids)).write(0, {"ids.values": ids})
    MappedArrays(folder, len(table)).write(0, {"ids.rows": table})
    feature |= {"values": [], "mapped": True}


def _kind(model: TwoTower) -> dict[str, bool | str]:
    """What sets the encoders apart from those of two towers and cosine."""
    tied = {"tied": True} if model.tied else {}
    return tied | ({} if model.unit else {"metric": "dot"})


def _features(columns: Columns) -> list[dict[str, Any]]:
    features: list[dict[str, Any]] = [asdict(c) for c in (*columns.vocabularies, *columns.bags)]
    return features + [{"kind": "numeric", **asdict(s)} for s in columns.standardisers]


def _tower_weights(tower: nn.Module, rows: InputRows) -> Weights:
    weights = {
        name.replace("norms.", "norm."): tensor for name, tensor in tower.state_dict().items()
    }
    tables = (*rows.embeddings, *rows.bags)
    weights |= {f"embedding.{i}": table.weight.detach() for i, table in enumerate(tables)}
    return {name: tensor.cpu().numpy() for name, tensor in weights.items()}
