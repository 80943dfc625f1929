"""Attributes of replayed items, where the target has a column of the same name and another type.

A value that the target's type takes is written; an item with one that it does not take cannot be
replayed, as its primary would refuse the whole request. Pure.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from shardline.cluster.rollover.mirror_plan import Joined, Rows
from shardline.shards.core.schema import IdArray
from shardline.shards.live.attribute_values import Unfit, is_encoded
from shardline.shards.live.attributes import as_answered


def retyped(source: pa.Schema, target: pa.Schema) -> pa.Schema:
    """The columns of the target that the source has with another type."""
    known = {field.name: _plain(field.type) for field in source}
    return pa.schema(
        [
            field
            for field in target
            if known.get(field.name, _plain(field.type)) != _plain(field.type)
        ]
    )


def fitting(changes: Joined, checked: pa.Schema) -> tuple[Joined, IdArray]:
    """What the target takes, and the ids of the items that it does not. checked: the columns whose
    values it may refuse."""
    by_vector, refused = _fitting(changes.by_vector, checked)
    featured, others = _fitting(changes.featured, checked)
    return replace(changes, by_vector=by_vector, featured=featured), np.concatenate(
        (refused, others)
    )


def _fitting(rows: Rows, checked: pa.Schema) -> tuple[Rows, IdArray]:
    is_fit = np.ones(len(rows.item_ids), np.bool_)
    for column in checked:
        values = rows.attributes.get(column.name, [])
        if values and not _takes(values, column.type):
            is_fit &= [_takes([value], column.type) for value in values]
    if is_fit.all():
        return rows, rows.item_ids[:0]
    return rows.part(np.flatnonzero(is_fit)), rows.item_ids[~is_fit]


def _takes(values: list[object], kind: pa.DataType) -> bool:
    try:
        as_answered(values, kind)
    except Unfit:
        return False
    return True


def _plain(kind: pa.DataType) -> pa.DataType:
    """Without what does not change the values: how a column is stored, and how wide its offsets."""
    while is_encoded(kind):
        kind = kind.value_type
    wide = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}
    return wide.get(kind, kind)
