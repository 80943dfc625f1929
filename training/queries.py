"""Users of a dataset as queries: the JSON that a router's ``features`` takes. No torch here."""

from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import NotFound
from shards.schema import IdArray
from training.batches import item_lists, newest_of
from training.features import FeatureSpace
from training.tables import Dataset


def feature_kinds(space: FeatureSpace) -> dict[str, str]:
    """Name and kind of each feature of the query tower, as a loaded encoder also lists them."""
    kinds: dict[str, str] = {v.column: v.kind for v in space.query.vocabularies}
    kinds |= {s.column: "numeric" for s in space.query.standardisers}
    return kinds | ({space.history.column: "history"} if space.history else {})


def query_features(
    dataset: Dataset, kinds: dict[str, str], users: IdArray, splits: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One query per user row. The history holds item ids of ``splits``, oldest first.

    kinds: name and kind of the features that the encoder wants.

    Raises:
        NotFound: a feature that is no column of the users table.
    """
    table = dataset.users().take(pa.array(users))
    columns: dict[str, list[Any]] = {}
    for name, kind in kinds.items():
        if kind == "history":
            columns[name] = _histories(dataset, users, splits)
        elif name in table.column_names:
            columns[name] = table[name].to_pylist()
        else:
            raise NotFound(
                f"{dataset.path}: users have no column {name!r}",
                expected=", ".join(table.column_names),
                hint="the model was trained on other data",
            )
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def query_features_of_user(
    dataset: Dataset,
    kinds: dict[str, str],
    user_id: int,
    splits: tuple[str, ...] = ("train", "val"),
) -> dict[str, Any]:
    """The query of one user; NotFound if the dataset does not know the id."""
    rows = np.flatnonzero(dataset.users()["user_id"].to_numpy() == user_id)
    if not len(rows):
        raise NotFound(f"{dataset.path}: no user {user_id}")
    return query_features(dataset, kinds, rows.astype(np.int64), splits)[0]


def _histories(dataset: Dataset, users: IdArray, splits: tuple[str, ...]) -> list[list[int]]:
    past = newest_of(item_lists(dataset, splits), users)
    ids = dataset.items()["item_id"].to_numpy()[past.items]
    return [part.tolist() for part in np.split(ids, past.indptr[1:-1])]
