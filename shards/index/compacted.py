"""An index of rows that another index has already, and of new ones: codes are copied, not remade.

What is copied is what each layer stores of a row: its code in the base index, in the list where it
lies, and the copy that re-ranks it. Encoding a row takes 11 us, copying it half of one (128
dimensions, ivfpq-fs), and a vector that is only known by its code keeps that code. Both indexes are
the same template plus rows, and rows lie in ascending order in each list. So the outcome is, byte
for byte, what ``build_shard_index`` makes of the vectors that all these rows were first made of.

HNSW links, and codes of FastScan without lists, are not copied: such an index is made anew from
the vectors that the old one gives back.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.schema import FloatArray, IdArray
from shardline.shards.index.layers import Layers, codes_of
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.template import (
    ADD_BLOCK_ROWS,
    build_shard_index,
    filled,
    in_blocks,
    write_index,
)

NEW = -1  # in place of a row of the old index
Codes = NDArray[np.uint8]


def build_compacted_index(
    template: Path, old: MainIndex, source: IdArray, new: FloatArray, out: Path, *, threads: int
) -> None:
    """Writes an index of len(source) rows: of each, source (n,) int64 names the row of ``old``, or
    NEW for the next of ``new`` (m, dim) float32. Rows of ``old`` ascend.

    The new vectors are checked already, and of unit length under cosine. Holds the old index and
    the one that is written in memory.

    Raises:
        CorruptFile: the template cannot be read.
        InvalidInput: a new vector overflows fp16 copies.
    """
    assert np.count_nonzero(source == NEW) == len(new)
    if not _is_copied(old.layers):
        build_shard_index(template, _vectors(old, source, new), out, threads=threads)
        return
    made = filled(template, in_blocks(new), threads=threads)
    _merge(made, old.layers, source)
    write_index(made.whole, out)


def _is_copied(layers: Layers) -> bool:
    return isinstance(layers.base, faiss.IndexIVF | faiss.IndexFlatCodes)


def _vectors(old: MainIndex, source: IdArray, new: FloatArray) -> Iterator[FloatArray]:
    """All rows in order, (n, dim) float32, in blocks."""
    taken = 0
    for start in range(0, len(source), ADD_BLOCK_ROWS):
        rows = source[start : start + ADD_BLOCK_ROWS]
        is_new = rows == NEW
        block = np.empty((len(rows), old.dim), np.float32)
        block[~is_new] = old.reconstruct(rows[~is_new])
        count = int(is_new.sum())
        block[is_new] = new[taken : taken + count]
        taken += count
        yield block


def _merge(made: Layers, old: Layers, source: IdArray) -> None:
    """Adds rows of ``old`` to ``made``, which has the new ones: all then lie as in ``source``."""
    if made.is_ivf:
        _merge_lists(made.base, old.base, source)
    else:
        _merge_codes(made.base, old.base, source)
    if made.refine is not None and old.refine is not None:
        copies, old_copies = made.refine.refine_index, old.refine.refine_index
        _merge_codes(faiss.downcast_index(copies), faiss.downcast_index(old_copies), source)
    for layer in (made.base, made.transform, made.refine):
        if layer is not None:
            layer.ntotal = len(source)


def _merge_codes(made: Any, old: Any, source: IdArray) -> None:
    """Of an index that stores its codes row by row."""
    own, theirs = codes_of(made).copy(), codes_of(old)
    made.codes.resize(len(source) * made.code_size)
    made.ntotal = len(source)
    codes, is_new = codes_of(made), source == NEW
    codes[is_new] = own
    kept = np.flatnonzero(~is_new)
    for start in range(0, len(kept), ADD_BLOCK_ROWS):  # a second copy of some at a time
        some = kept[start : start + ADD_BLOCK_ROWS]
        codes[some] = theirs[source[some]]


def _view(pointer: Any, size: int) -> Any:
    """(size,) of what faiss points to, without a copy; an empty array may have no memory."""
    return faiss.rev_swig_ptr(pointer, size) if size else np.empty(0, np.uint8)


def _merge_lists(made: Any, old: Any, source: IdArray) -> None:
    """Of an index with inverted lists, whose ids are rows."""
    to = np.full(old.ntotal, NEW, np.int64)  # the row that each old one becomes
    is_new = source == NEW
    to[source[~is_new]] = np.flatnonzero(~is_new)
    new_to = np.flatnonzero(is_new)
    lists, old_lists = (faiss.downcast_InvertedLists(each.invlists) for each in (made, old))
    store: _Rows | _Blocks = _Rows(made.code_size)
    if isinstance(lists, faiss.BlockInvertedLists):
        store = _Blocks(lists.packer)
    for number in range(lists.nlist):
        theirs, own = to[_ids_of(old_lists, number)], new_to[_ids_of(lists, number)]
        kept = theirs != NEW
        rows = np.concatenate((theirs[kept], own))
        order = np.argsort(rows, kind="stable")
        codes = np.concatenate((store.read(old_lists, number)[kept], store.read(lists, number)))
        lists.resize(number, len(rows))
        _ids_of(lists, number)[:] = rows[order]
        store.write(lists, number, codes[order])


def _ids_of(lists: Any, number: int) -> IdArray:
    """(m,) int64 of a list, its own memory."""
    size = lists.list_size(number)
    return faiss.rev_swig_ptr(lists.get_ids(number), size) if size else np.empty(0, np.int64)


class _Rows:
    """Lists whose codes follow each other."""

    def __init__(self, code_size: int) -> None:
        self._code_size = code_size

    def read(self, lists: Any, number: int) -> Codes:
        """(m, code_size), its own memory."""
        size = lists.list_size(number) * self._code_size
        codes: Codes = _view(lists.get_codes(number), size).reshape(-1, self._code_size)
        return codes

    def write(self, lists: Any, number: int, codes: Codes) -> None:
        self.read(lists, number)[:] = codes


class _Blocks:
    """Lists of FastScan: codes lie in blocks, interleaved in an order that only faiss knows."""

    def __init__(self, packer: Any) -> None:
        self._packer = packer
        self._rows, self._code_size = int(packer.nvec), int(packer.code_size)

    def read(self, lists: Any, number: int) -> Codes:
        """(m, code_size), a copy."""
        rows, blocks = lists.list_size(number), self._blocks(lists, number)
        codes = np.empty((len(blocks), self._rows, self._code_size), np.uint8)
        for block, unpacked in zip(blocks, codes, strict=True):
            self._packer.unpack_all(faiss.swig_ptr(block), faiss.swig_ptr(unpacked))
        return codes.reshape(-1, self._code_size)[:rows]

    def write(self, lists: Any, number: int, codes: Codes) -> None:
        """The last block is filled up with zeros, as faiss does."""
        blocks = self._blocks(lists, number)
        padded = np.zeros((len(blocks), self._rows, self._code_size), np.uint8)
        padded.reshape(-1, self._code_size)[: len(codes)] = codes
        for unpacked, block in zip(padded, blocks, strict=True):
            self._packer.pack_all(faiss.swig_ptr(unpacked), faiss.swig_ptr(block))

    def _blocks(self, lists: Any, number: int) -> Codes:
        """(blocks, bytes) of a list, its own memory."""
        size = -(-lists.list_size(number) // self._rows) * self._packer.block_size
        blocks: Codes = _view(lists.get_codes(number), size).reshape(-1, self._packer.block_size)
        return blocks
