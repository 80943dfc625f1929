"""Random Arrow types, and random values of them."""

from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

KINDS = [
    pa.int8(), pa.uint64(), pa.int64(), pa.float16(), pa.float32(), pa.float64(), pa.string(),
    pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view(), pa.date32(), pa.date64(),
    pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.time64("us"),
    pa.duration("s"), pa.decimal128(20, 2), pa.null(), pa.bool_(), pa.binary(2),
]  # fmt: skip
WRAPPED = st.sampled_from(KINDS).flatmap(
    lambda kind: st.sampled_from(
        [
            kind,
            pa.list_(kind),
            pa.list_view(kind),
            pa.list_(kind, 2),
            pa.large_list(pa.list_(kind)),
            pa.struct({"a": kind}),
        ]
    )
)


def values_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Python values that Arrow takes for a type, None among them."""
    if pa.types.is_struct(kind):
        found: st.SearchStrategy[Any] = st.fixed_dictionaries({"a": values_of(kind.field(0).type)})
    elif pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        found = st.lists(values_of(kind.value_type), min_size=size, max_size=size)
    elif kind.num_fields:
        found = st.lists(values_of(kind.value_type), max_size=3)
    elif pa.types.is_integer(kind):
        bits, signed = kind.bit_width, pa.types.is_signed_integer(kind)
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        found = st.integers(low, high)
    elif pa.types.is_floating(kind):
        found = st.floats(width=kind.bit_width)
    else:
        found = next(values for known, values in PLAIN_VALUES if known(kind))
    return st.one_of(st.none(), found)


PLAIN_VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (pa.types.is_null, st.none()),
    (pa.types.is_boolean, st.booleans()),
    (pa.types.is_fixed_size_binary, st.binary(min_size=2, max_size=2)),
    (pa.types.is_decimal, st.decimals(-(10**9), 10**9, places=2)),
    (pa.types.is_date32, st.integers(-(2**31), 2**31 - 1)),
    (pa.types.is_date64, st.integers(-(10**5), 10**5).map(lambda days: days * 86_400_000)),
    (pa.types.is_time64, st.integers(0, 86_399_999_999)),
    (pa.types.is_temporal, st.integers(-(2**62), 2**62)),
    (lambda kind: "string" in str(kind), st.text(max_size=8)),
    (lambda kind: "binary" in str(kind), st.binary(max_size=8)),
]
