"""Tables of ids that begin at the singular vectors of the interactions instead of at random.

Truncated SVD of D_u^-1/2 R D_i^-1/2, that of the baseline (``training.evaluation.baselines`` names
the sources), its singular values divided evenly between users and items. An id's vector begins with
the direction of its factors and the length of random vectors (``init_norm``): at the length of its
factors a rare id would begin near zero, where Adam turns a vector fastest. The unknown, ids without
factors, and the dimensions beyond the rank of the matrix begin at random.

Factorised once, into the run's cache before any rank starts: two machines may disagree about the
signs of singular vectors, and all ranks must begin with the same weights.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.files import atomic_path
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.config.tower_config import ITEM_KEY, USER_KEY, IdFeature, TowerConfig
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.tables import ITEMS, USERS, Dataset
from shardline.training.evaluation.baselines import Vectors, svd_vectors
from shardline.training.features.fitted import Columns, FeatureSpace
from shardline.training.features.prepared import train_lists
from shardline.training.model.towers import InputRows, TwoTower

SVD_START = "svd.safetensors"  # inside the cache


def check_svd_start(config: TrainingConfig) -> None:
    """Raises ConfigError where id_start is svd and, of the inferred features too, none is an id."""
    if config.id_start == "svd" and not config.has_id_tables():
        raise ConfigError(
            "no tower has vectors of ids, which could start at those of an SVD",
            field="id_start",
            expected="random",
            got="svd",
            hint=f"give the query tower {{kind: id, column: {USER_KEY}}}, or the item tower "
            f"{{kind: id, column: {ITEM_KEY}}}",
        )


def write_svd_start(
    config: TrainingConfig, dataset: Dataset, space: FeatureSpace, folder: Path
) -> None:
    """Writes where the tables of both ids begin, as far as the towers have them, into ``folder``.

    Nothing where ``id_start`` is random. The seed decides all of it, on one machine.

    Raises:
        ConfigError: no tower has such a table. DataError: too small to factorise.
    """
    if config.id_start != "svd":
        return
    check_svd_start(config)
    towers = config.towers
    features = {"users": _ids_of(towers.query, USER_KEY), "items": _ids_of(towers.item, ITEM_KEY)}
    rank = max(feature.dim for feature in features.values() if feature is not None)
    train = train_lists(dataset, config.fitted_splits)
    factors = balanced(svd_vectors(train, dataset.rows["items"], rank=rank, seed=config.seed))
    tables = {}
    if features["users"] is not None:
        rows = space.query.vocabularies[_place(space.query, USER_KEY)].encode(
            dataset.users(), USERS
        )
        tables["users"] = by_table_row(factors.users[:, : features["users"].dim], rows)
    if features["items"] is not None:
        rows = space.item.vocabularies[_place(space.item, ITEM_KEY)].encode(dataset.items(), ITEMS)
        tables["items"] = by_table_row(factors.items[:, : features["items"].dim], rows)
    with atomic_path(folder / SVD_START) as temporary:
        save_file(tables, temporary)


@torch.no_grad()
def start_at_svd(
    model: TwoTower, config: TrainingConfig, space: FeatureSpace, folder: Path
) -> None:
    """Gives the model the first values that ``write_svd_start`` left in ``folder``, if it did."""
    if config.id_start != "svd":
        return
    found, towers = load_file(folder / SVD_START), config.towers
    if "users" in found:
        _put(found["users"], model.query_rows, space.query, towers.query, USER_KEY)
    if "items" in found:
        _put(found["items"], model.item_rows, space.item, towers.item, ITEM_KEY)


def balanced(factors: Vectors) -> Vectors:
    """The same products, singular values divided evenly; users (n, d) come with all of them."""
    root = np.sqrt(np.linalg.norm(factors.users.astype(np.float64), axis=0))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return Vectors(
        (factors.users * inverse).astype(np.float32), (factors.items * root).astype(np.float32)
    )


def by_table_row(factors: FloatArray, table_rows: IdArray) -> FloatArray:
    """(rows of the table, d) float32: factors (n, d), scaled to length one, at table_rows (n,) > 0.

    Zeros where there are none; the table ends with the largest row.
    """
    lengths = np.linalg.norm(factors.astype(np.float64), axis=1, keepdims=True)
    unit = np.divide(factors, lengths, out=np.zeros(factors.shape), where=lengths > 0)
    table = np.zeros((int(table_rows.max(initial=0)) + 1, factors.shape[1]), np.float32)
    table[table_rows] = unit
    table[0] = 0  # the unknown
    return table


def _put(
    start: FloatArray, rows: InputRows, columns: Columns, tower: TowerConfig, column: str
) -> None:
    feature, table = _ids_of(tower, column), rows.embeddings[_place(columns, column)]
    assert feature is not None and isinstance(table, nn.Embedding)
    # of the length that so many of the dimensions have of a random vector
    scale = feature.init_norm * (start.shape[1] / table.embedding_dim) ** 0.5
    known = torch.from_numpy(np.flatnonzero(start.any(axis=1)))
    values = (torch.from_numpy(start) * scale).to(table.weight.device)
    table.weight[known, : start.shape[1]] = values[known]


def _ids_of(tower: TowerConfig, column: str) -> IdFeature | None:
    given = (f for f in tower.features or () if isinstance(f, IdFeature) and f.column == column)
    return next(given, None)


def _place(columns: Columns, column: str) -> int:
    return [(each.kind, each.column) for each in columns.vocabularies].index(("id", column))
