"""What may be in the three tables of a dataset: columns, types, finite values, ids, nulls.

A null is a missing value of a feature; ids, times and splits have none.

Every refusal is a DataError with file and column, expected and got. Tables come back in the form
they are stored in: features sorted by id, interactions in the exact schema.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardline.shards.core.errors import DataError
from shardline.shards.core.schema import IdArray

SPLITS = ("train", "val", "test")

INTERACTION_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("split", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    ]
)
WEIGHT = "weight"  # of an interaction; the table may lack it, and a null is one that is not known
WEIGHTED_SCHEMA = INTERACTION_SCHEMA.append(pa.field(WEIGHT, pa.float32()))


def split_code(name: str) -> int:
    """The split's position in SPLITS; DataError for another name."""
    if name not in SPLITS:
        raise DataError("unknown split", expected=" | ".join(SPLITS), got=repr(name))
    return SPLITS.index(name)


def rows_of(table_ids: IdArray, ids: IdArray, *, field: str) -> IdArray:
    """Row of each id in an ascending id column.

    Raises:
        DataError: an id that the table does not have.
    """
    rows = np.minimum(np.searchsorted(table_ids, ids), max(len(table_ids) - 1, 0))
    unknown = np.flatnonzero(table_ids[rows] != ids) if len(table_ids) else np.arange(len(ids))
    if len(unknown):
        raise DataError(
            f"{len(unknown)} unknown ids",
            field=f"{field}[{unknown[0]}]",
            expected=f"one of {len(table_ids)} known ids",
            got=str(ids[unknown[0]]),
        )
    return rows.astype(np.int64, copy=False)


def check_references(ids: IdArray, table: pa.Table, column: str, where: str, file: str) -> None:
    try:
        rows_of(ids, table[column].to_numpy(), field=f"{where}: {column}")
    except DataError as error:
        error.hint = f"every {column} must be listed in {file}"
        raise


def interaction_table(table: pa.Table, where: str) -> pa.Table:
    """The table in the exact schema, with weights where it has them; DataError naming the column
    that does not fit."""
    columns = []
    for field in INTERACTION_SCHEMA:
        if field.name not in table.column_names:
            raise DataError(
                "missing column",
                field=f"{where}: {field.name}",
                expected=", ".join(INTERACTION_SCHEMA.names),
                got=", ".join(table.column_names),
            )
        column = table[field.name]
        is_text = field.name == "split" and _is_text(column.type)
        if column.type != field.type and not is_text:
            raise _wrong_type(where, field.name, str(field.type), str(column.type))
        _refuse_nulls(column, where, field.name)
        columns.append(column.cast(field.type))
    known = pc.is_in(columns[-1].cast(pa.string()), pa.array(SPLITS))
    if not pc.all(known, min_count=0).as_py():
        bad = columns[-1][pc.index(known, False).as_py()].as_py()
        raise DataError(
            "unknown split", field=f"{where}: split", expected=" | ".join(SPLITS), got=repr(bad)
        )
    if WEIGHT not in table.column_names:
        return pa.Table.from_arrays(columns, schema=INTERACTION_SCHEMA)
    columns.append(_weights(table[WEIGHT], where))
    return pa.Table.from_arrays(columns, schema=WEIGHTED_SCHEMA)


def _weights(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if column.type != pa.float32():
        raise _wrong_type(where, WEIGHT, "float", str(column.type))
    values = column.drop_null().to_numpy()
    bad = values[~(np.isfinite(values) & (values >= 0))]
    if len(bad):
        raise DataError(
            "weights of interactions are finite and not negative",
            field=f"{where}: {WEIGHT}",
            expected="numbers >= 0, or null where one is not known",
            got=str(bad[0]),
        )
    return column


def feature_table(table: pa.Table, key: str, where: str) -> pa.Table:
    """The table sorted by its key column, every column of an acceptable type."""
    if key not in table.column_names:
        raise DataError(
            "missing column",
            field=f"{where}: {key}",
            expected="an int64 id column",
            got=", ".join(table.column_names),
        )
    if table.schema.field(key).type != pa.int64():
        raise _wrong_type(where, key, "int64", str(table.schema.field(key).type))
    _refuse_nulls(table[key], where, key)
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise DataError("column occurs twice", field=f"{where}: {name}")
        _check_feature(table[name], where, name)
    ids = table[key].to_numpy()
    if len(ids) and ids.min() < 0:
        raise DataError("negative id", field=f"{where}: {key}", expected=">= 0", got=str(ids.min()))
    if (np.diff(ids) > 0).all():
        return table
    order = np.argsort(ids, kind="stable")
    repeated = ids[order][1:][np.diff(ids[order]) == 0]
    if len(repeated):
        raise DataError(
            "ids occur twice",
            field=f"{where}: {key}",
            expected="unique ids",
            got=f"{len(np.unique(repeated))} repeated, the first is {repeated[0]}",
        )
    return table.take(pa.array(order))


def _check_feature(column: pa.ChunkedArray, where: str, name: str) -> None:
    kind = column.type
    is_vector = pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()
    is_scalar = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    is_time = pa.types.is_timestamp(kind)
    if not (is_vector or is_scalar or is_time or _is_text(kind) or _is_list_of_values(kind)):
        expected = (
            "bool, integer, float, string, timestamp, list of strings or integers, "
            "or vector of float32"
        )
        raise _wrong_type(where, name, expected, str(kind))
    if not (is_vector or pa.types.is_floating(kind)):
        return
    present = np.flatnonzero(column.is_valid().to_numpy())
    flat = column.drop_null().combine_chunks()
    values = (flat.flatten() if is_vector else flat).to_numpy(zero_copy_only=False)
    width = kind.list_size if is_vector else 1
    bad = np.flatnonzero(~np.isfinite(values.astype(np.float64)))
    if len(bad):
        raise DataError(
            "not finite",
            field=f"{where}: {name}[{present[bad[0] // width]}]",
            expected="finite numbers",
            got="NaN or infinity",
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list_of_values(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and bool(pa.types.is_integer(kind.value_type) or _is_text(kind.value_type))


def _refuse_nulls(column: pa.ChunkedArray, where: str, name: str) -> None:
    nulls = column.null_count
    if nulls:
        raise DataError(
            "missing values",
            field=f"{where}: {name}",
            expected="no nulls",
            got=f"{nulls} nulls",
        )


def _wrong_type(where: str, column: str, expected: str, got: str) -> DataError:
    return DataError("wrong type", field=f"{where}: {column}", expected=expected, got=got)
