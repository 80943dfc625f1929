"""Attributes of replayed items for columns of another type."""

import numpy as np
import pyarrow as pa

from shardline.cluster.rollover.fitting import fitting, retyped
from shardline.cluster.rollover.mirror_plan import Joined, Rows


def rows(first: int, **attributes: list) -> Rows:
    count = len(next(iter(attributes.values()))) if attributes else 2
    ids = np.arange(first, first + count)
    return Rows(item_ids=ids, vectors=np.eye(count, 4, dtype=np.float32), attributes=attributes)


def test_which_columns_have_another_type() -> None:
    source = pa.schema(
        [
            ("a", pa.string()),
            ("b", pa.int32()),
            ("c", pa.dictionary(pa.int8(), pa.string())),
            ("d", pa.int64()),
        ]
    )
    target = pa.schema(
        [("a", pa.large_string()), ("b", pa.int8()), ("c", pa.string()), ("e", pa.bool_())]
    )
    assert retyped(source, target).names == ["b"]
    assert retyped(source, source).names == []


def test_items_with_a_value_that_does_not_fit_are_left_out_of_both_kinds() -> None:
    checked = pa.schema([("b", pa.int8()), ("t", pa.bool_())])
    changes = Joined(
        by_vector=rows(0, b=[1, 300, None, 4], t=[True, True, None, "x"], other=[1, 2, 3, "z"]),
        featured=rows(10, b=["7", 7]),
        deleted=np.array([50]),
    )
    taken, refused = fitting(changes, checked)
    assert refused.tolist() == [1, 3, 10]
    assert taken.by_vector.item_ids.tolist() == [0, 2]
    assert taken.by_vector.attributes == {"b": [1, None], "t": [True, None], "other": [1, 3]}
    assert taken.by_vector.vectors.tolist() == np.eye(4)[[0, 2]].tolist()
    assert taken.featured.item_ids.tolist() == [11]
    assert taken.deleted is changes.deleted


def test_nothing_is_copied_where_all_fit() -> None:
    changes = Joined(by_vector=rows(0, b=[1, 2]), featured=rows(5), deleted=np.array([50]))
    taken, refused = fitting(changes, pa.schema([("b", pa.int16())]))
    assert taken.by_vector is changes.by_vector and taken.featured is changes.featured
    assert refused.tolist() == []
