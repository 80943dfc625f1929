"""Which rows of a table a bound filter holds for, as one mask; by Arrow's kernels and numpy.

Columns are read chunk by chunk, where they lie: a mapped file is not copied. Lists are tested by
their elements, all of a chunk at once; dictionaries by their values, each once.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shardline.shards.core.schema import IdArray
from shardline.shards.filters.bound import AllTests, AnyTest, Bound, NotTest
from shardline.shards.filters.column_kinds import compared_type, decoded_type, is_list
from shardline.shards.filters.column_tests import (
    ColumnTest,
    Compared,
    Every,
    No,
    OneOf,
    Stored,
    Substring,
    Test,
)

# elements of lists tested at once: their masks and counts take ten bytes for each
BLOCK = 1 << 20
TEXTS = 1 << 16  # looked through at once: 6 ms of one core at 55 bytes each

Mask = NDArray[np.bool_]


def matches(
    bound: Bound, table: pa.Table, item_ids: IdArray, look: Callable[[], None] = lambda: None
) -> Mask:
    """(rows,) bool: whether the filter holds for each row of ``table``, whose schema it was bound
    to; item_ids (rows,) int64 are the rows' items. The mask is the caller's own.

    look: called before each condition, and every TEXTS texts; what it raises ends the evaluation.
    """
    if isinstance(bound, ColumnTest):
        return _tested_column(bound, table, item_ids, look)
    if isinstance(bound, NotTest):
        mask = matches(bound.part, table, item_ids, look)
        return np.logical_not(mask, out=mask)
    masks = (matches(part, table, item_ids, look) for part in bound.parts)
    if isinstance(bound, AllTests):
        return functools.reduce(_both, masks, np.ones(len(item_ids), np.bool_))
    assert isinstance(bound, AnyTest)
    return functools.reduce(_either, masks, np.zeros(len(item_ids), np.bool_))


def _both(first: Mask, second: Mask) -> Mask:
    return np.logical_and(first, second, out=first)


def _either(first: Mask, second: Mask) -> Mask:
    return np.logical_or(first, second, out=first)


def _tested_column(
    test: ColumnTest, table: pa.Table, item_ids: IdArray, look: Callable[[], None]
) -> Mask:
    chunks = [pa.array(item_ids)] if test.place is None else table.column(test.place).chunks
    masks: list[Mask] = []
    look()
    for rows in itertools.chain.from_iterable(_pieces(test, chunk) for chunk in chunks):
        if masks:
            look()
        masks.append(_tested_rows(test, rows))
    mask = masks[0] if len(masks) == 1 else np.concatenate([np.zeros(0, np.bool_), *masks])
    return np.logical_not(mask, out=mask) if test.negated else mask


def _pieces(test: ColumnTest, chunk: pa.Array) -> Iterator[pa.Array]:
    """A chunk, cut where it has many texts to look through; those of a dictionary are not."""
    is_cut = isinstance(test.test, Substring) and not pa.types.is_dictionary(chunk.type)
    if not is_cut or len(chunk) <= TEXTS:
        yield chunk
        return
    for start in range(0, len(chunk), TEXTS):
        yield chunk.slice(start, TEXTS)


def _tested_rows(test: ColumnTest, rows: pa.Array) -> Mask:
    if isinstance(test.test, Stored):
        return _present(rows)
    if is_list(decoded_type(rows.type)):
        return _tested_lists(test, _decoded(rows))
    return _tested_values(test, rows)


def _tested_values(test: ColumnTest, values: pa.Array) -> Mask:
    """(values,) bool: whether the test holds for each value of a chunk."""
    if pa.types.is_run_end_encoded(values.type):
        return _tested_values(test, _decoded(values))
    if pa.types.is_dictionary(values.type):
        each = np.append(_tested_values(test, values.dictionary), test.or_missing)
        return each[_codes(values)]
    mask = _satisfied(test.test, values)
    if test.or_missing and values.null_count:
        mask |= ~_present(values)
    return mask


def _tested_lists(test: ColumnTest, lists: pa.Array) -> Mask:
    """(lists,) bool: whether the test holds for an element of each list."""
    starts, ends = _bounds(lists)
    blocks = itertools.pairwise(_cuts(lists.type, ends))
    masks = [_tested_elements(test, lists.values, starts[a:b], ends[a:b]) for a, b in blocks]
    found = np.concatenate([np.zeros(0, np.bool_), *masks])
    present = _present(lists)
    return found | ~present if test.or_missing else found & present


def _tested_elements(test: ColumnTest, values: pa.Array, starts: IdArray, ends: IdArray) -> Mask:
    """(lists,) bool: whether the test holds for one of the values from start to end of each."""
    first, last = int(starts.min()), int(ends.max())
    elements = _tested_values(test, values[first:last])
    # how many satisfy it before each element: equal at both ends of a list without one
    before = np.zeros(len(elements) + 1, np.int64)
    np.cumsum(elements, out=before[1:])
    found: Mask = before[ends - first] > before[starts - first]
    return found


def _cuts(kind: pa.DataType, ends: IdArray) -> list[int]:
    """Where lists are cut so that blocks of them have BLOCK elements or so: lists, ascending."""
    if not len(ends):
        return []
    if _is_view(kind):  # they lie in any order
        return [0, len(ends)]
    cuts = np.searchsorted(ends, np.arange(int(ends[0]) + BLOCK, int(ends[-1]), BLOCK))
    return [int(cut) for cut in np.unique([0, *cuts, len(ends)])]


def _bounds(lists: pa.Array) -> tuple[IdArray, IdArray]:
    """(lists,) int64 each: where the elements of each begin and end in ``lists.values``; anywhere
    in there for a list that is missing."""
    kind = lists.type
    if pa.types.is_fixed_size_list(kind):
        starts = np.arange(lists.offset, lists.offset + len(lists), dtype=np.int64) * kind.list_size
        return starts, starts + kind.list_size
    offsets = lists.offsets.to_numpy().astype(np.int64)
    if not _is_view(kind):
        return offsets[:-1], offsets[1:]
    sizes = np.where(_present(lists), lists.sizes.to_numpy(), 0)
    # where a missing list lies is not defined
    starts = np.where(sizes > 0, offsets, 0)
    return starts, starts + sizes


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _satisfied(test: Test, values: pa.Array) -> Mask:
    """(values,) bool: whether a test holds for each value, false for missing ones."""
    if isinstance(test, No) or not len(values) or pa.types.is_null(values.type):
        return np.zeros(len(values), np.bool_)
    if isinstance(test, Every):
        return _present(values)
    compared = _as_compared(values)
    if isinstance(test, Compared):
        return _unpacked(pc.call_function(test.function, [compared, test.value]))
    if isinstance(test, OneOf):
        return _unpacked(pc.is_in(compared, value_set=test.values))
    assert isinstance(test, Substring)
    return _unpacked(pc.match_substring(compared, test.pattern))


def _as_compared(values: pa.Array) -> pa.Array:
    kind = compared_type(values.type)
    if kind == values.type:
        return values
    return values.view(kind) if pa.types.is_temporal(values.type) else values.cast(kind)


def _present(values: pa.Array) -> Mask:
    """(values,) bool: which are not missing."""
    if pa.types.is_dictionary(values.type):
        return np.append(_present(values.dictionary), False)[_codes(values)]
    if pa.types.is_run_end_encoded(values.type):
        values = _decoded(values)
    if not values.null_count and not pa.types.is_union(values.type):
        return np.ones(len(values), np.bool_)
    return _unpacked(values.is_valid())


def _codes(values: pa.Array) -> IdArray:
    """(values,) integers: the place of each in its dictionary, the next after the last for null."""
    codes = values.indices
    if codes.null_count:
        codes = pc.fill_null(codes.cast(pa.int64()), len(values.dictionary))
    numbers: IdArray = codes.to_numpy()
    return numbers


def _decoded(values: pa.Array) -> pa.Array:
    while decoded_type(values.type) != values.type:
        is_runs = pa.types.is_run_end_encoded(values.type)
        values = pc.run_end_decode(values) if is_runs else values.dictionary_decode()
    return values


def _unpacked(bits: pa.BooleanArray) -> Mask:
    """(bits,) bool, false where missing; a third of the time of Arrow's own way."""
    valid, values = (_bytes_of(buffer, bits) for buffer in bits.buffers())
    assert values is not None
    return values if valid is None or not bits.null_count else np.logical_and(values, valid)


def _bytes_of(buffer: pa.Buffer | None, bits: pa.BooleanArray) -> Mask | None:
    if buffer is None:
        return None
    packed = np.frombuffer(buffer, np.uint8)
    count = bits.offset + len(bits)
    unpacked = np.unpackbits(packed, count=count, bitorder="little")
    return unpacked[bits.offset :].view(np.bool_)
