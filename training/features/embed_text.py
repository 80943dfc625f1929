"""Vectors of texts by a transformer, computed once and kept as a vector column of a data set.

The model is a local folder or an installed package that carries one (``shards.text``); nothing is
fetched from anywhere and no code of the model's is run. Of items the column is a numeric feature of
the item tower, or what is built as it is; of users, who are queries in a product search, one of the
query tower, and a query may bring its text instead: routers run the same model
(docs/TEXT.md). Which model made a column stands in the manifest's parameters, ``text_encoders``.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from shardline.shards.core.errors import DataError
from shardline.shards.core.progress import Progress
from shardline.shards.text.text_encoder import TextEncoder
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import (
    ITEM_TO_ITEM,
    ITEMS,
    TEXT_ENCODERS,
    USERS,
    Dataset,
    vector_column,
)
from shardline.training.features.columns import column_of, strings
from shardline.training.features.torch_bert import TorchBert

Of = Literal["items", "users"]


def embed_texts(
    dataset: Dataset,
    target: Path,
    *,
    column: str,
    name: str,
    model: str,
    of: Of = "items",
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Writes the data set to ``target`` with a vector column ``name`` of the texts of its items, or
    of its users; of both where users are items. Of longer texts the model reads the beginning, and
    a null is an empty text.

    Raises:
        DataError: ``column`` is missing or no text, there is a column ``name`` already, or another
            model made columns of this data set.
        NotFound, ConfigError, CorruptFile: as ``TextEncoder.load``.
    """
    tables = {"items": (dataset.items, ITEMS), "users": (dataset.users, USERS)}
    read, where = tables[of]
    table = read()
    texts = strings(column_of(table, column, where), where, column)
    both = (table, dataset.users()) if dataset.item_to_item else (table,)
    if any(name in each.column_names for each in both):
        raise DataError(
            "column occurs twice", field=f"{where}: {name}", hint="--name gives it another name"
        )
    encoder = TextEncoder.load(model, partial(TorchBert, device=device))
    made = dataset.text_encoders
    others = {other for other in made.values() if other != encoder.model.id}
    if others:
        raise DataError(
            "another text encoder made vectors of this data set",
            field=", ".join(sorted(made)),
            expected=f"encoder {', '.join(sorted(others))}",
            got=f"{encoder.model.id} ({encoder.model.name})",
            hint="a router has one: use one for all texts",
        )
    given_texts = [text or "" for text in texts.to_pylist()]
    vectors = encoder.encode(given_texts, cut=True, progress=progress)
    embedded = pa.chunked_array([vector_column(vectors)])
    given = {"items": dataset.items(), "users": dataset.users()}
    for each in given if dataset.item_to_item else (of,):  # whose users are its items, row by row
        given[each] = given[each].append_column(name, embedded)
        made = made | {f"{each}.{name}": encoder.model.id}
    parameters: dict[str, Any] = {
        "text_column": column,
        "text_model": encoder.model.name,
        TEXT_ENCODERS: made,
    }
    if dataset.item_to_item:
        parameters[ITEM_TO_ITEM] = True
    return write_dataset(
        target,
        given["users"],
        given["items"],
        dataset.interactions(),
        name=dataset.name,
        ceilings=dataset.ceilings,
        parameters=parameters,
        cut=dataset.cut,
        overwrite=overwrite,
    )
