"""The folder of an encoder, a tower in plain arrays: training writes it, routers and tools read it.

    encoder.json             format_version, model_version, dim, projection, features in input
                             order, and the SHA-256 of every other file; written last. Of the item
                             tower also attributes, the catalogue's columns and their types.
                             tied: computed as in ``shards.core.exact_tower``. metric dot:
                             vectors keep their lengths; else they have length one
    weights.safetensors      the tower: embedding.<i>; hidden.<i>.*, norm.<i>.*, output.*,
                             skip.weight unless projection is identity

Where attention pools the history, weights.safetensors of the query tower has history.recency
(max_length,), newest first, and that of the item tower history.key.weight (32, p), history.key.bias
(32,) and history.query (32,): an item's score is tanh(key of its input row) . query.

Of the query tower with a history:

    history.item_ids.npy     (n,) int64, ascending: the items that a history may name
    history.rows.npy         (n, p) float32: their rows of the query tower's input
    history.item_scores.npy  (n,) float32, if attention pools the history

Of the item tower, where the id of an item is one of its features (which says mapped, and has no
values in encoder.json and no embedding.<i>):

    ids.values.npy           (m,) int64, ascending: the items that training has seen
    ids.rows.npy             (m + 1, d) float32: row 0 of the unknown, row i + 1 of ids.values[i]

Of the item tower, where popular items have longer vectors:

    popularity.item_ids.npy  (n,) int64, ascending
    popularity.lengths.npy   (n,) float32: how long their vectors are; others have length one

Of the item tower, where it reads the users of each item (encoder.json has audience then):

    audience.item_ids.npy    (n,) int64, ascending
    audience.rows.npy        (n, a) float32: their pooled users, the last part of the input row;
                             unless projection is identity, the last two numbers are the share of
                             the longest audience that is filled, and 1 where there is none

These arrays have a row per item of the catalogue. They are mapped, not loaded: all
processes of a host share them in its page cache, and read no more of them than they look up.
Formats 1 and 2 hold them in weights.safetensors and are read into memory.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, load_file, save_file

from shardline.shards.core.errors import CorruptFile, NewerFormat, NotFound
from shardline.shards.core.files import sha256_of, write_json
from shardline.shards.core.schema import Metric
from shardline.shards.core.small_files import MAX_VOCABULARY_BYTES, parse_json, read_small

FORMAT_VERSION = 5  # 1 had neither projection nor attention, and is read as without them
WITHOUT_KINDS = 4  # what a reader takes that makes all vectors of length one, in one way, and that
# knows of no item's users
WITHOUT_CYCLES = 3  # what a reader before cycles takes
# in an embedding set and in a generation
QUERY_ENCODER_FOLDER, ITEM_ENCODER_FOLDER = "query_encoder", "item_encoder"
TEXT_FEATURE = "text"  # of a query tower without weights
CONFIG, WEIGHTS = "encoder.json", "weights.safetensors"
MAPPED = ".npy"
# Weights up to this size are verified as the bytes that are then parsed. Larger ones are read
# twice, so that they are never in memory twice.
AT_ONCE_BYTES = 256 << 20

Weights = dict[str, NDArray[Any]]


class MappedArrays:
    """Writes arrays of ``rows`` rows, a block at a time, for readers to map."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._rows = folder, rows
        self._arrays: Weights = {}

    def write(self, start: int, blocks: Weights) -> None:
        """Rows ``start`` and on of each named array; its first block says shape and type."""
        for name, block in blocks.items():
            if name not in self._arrays:
                path = self._folder / f"{name}{MAPPED}"
                self._arrays[name] = array = np.lib.format.open_memmap(
                    path, mode="w+", dtype=block.dtype, shape=(self._rows, *block.shape[1:])
                )
                _reserve(path, array.nbytes)
            self._arrays[name][start : start + len(block)] = block


def _reserve(path: Path, array_bytes: int) -> None:
    """Takes the disk space of an array now: a mapped page without room would kill the process.

    Raises:
        OSError: there is not enough.
    """
    with path.open("r+b") as file:
        size = path.stat().st_size
        os.posix_fallocate(file.fileno(), size - array_bytes, array_bytes)


def write_encoder(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Writes the weights and then encoder.json; the mapped arrays must be in the folder already.

    Durable once the caller has fsynced the folder and its files.
    """
    save_file(weights, folder / WEIGHTS)
    names = sorted(path.name for path in folder.iterdir())
    checksums = {name: sha256_of(folder / name) for name in names}
    has_cycles = any(feature.get("cycles") for feature in config.get("features", ()))
    version = WITHOUT_KINDS if has_cycles else WITHOUT_CYCLES
    if "tied" in config or "metric" in config or config.get("audience"):
        version = FORMAT_VERSION
    write_json(folder / CONFIG, {"format_version": version, **config, "sha256": checksums})


def write_text_tower(folder: Path, *, version: str, encoder: str, dim: int, metric: Metric) -> None:
    """Makes the folder of a query tower that gives a text the vector of the text encoder.

    Its one feature, ``text``, is the vector as it is, or of length one under cosine.
    """
    feature = {
        "kind": "numeric",
        "column": TEXT_FEATURE,
        "log": False,
        "vector": True,
        "mean": [0.0] * dim,
        "deviation": [1.0] * dim,
        "missing": False,
        "text_encoder": encoder,
    }
    config = {
        "model_version": version,
        "dim": dim,
        "projection": "identity",
        "features": [feature],
        **({} if metric is Metric.COSINE else {"metric": "dot"}),  # dot keeps the lengths
    }
    folder.mkdir()
    write_encoder(folder, config, {})


def read_encoder(folder: Path, checksum: str | None = None) -> tuple[dict[str, Any], Weights]:
    """encoder.json and all arrays by name, each file verified as it is read; all are read-only.

    checksum: SHA-256 of encoder.json, which holds those of the other files; None where nobody who
    has listed the folder knows it.

    Raises:
        NotFound: no encoder here. CorruptFile: not JSON, or a file is missing or altered.
        NewerFormat: written by a newer version.
    """
    config, checksums = _read_config(folder / CONFIG, checksum)
    weights = _read_weights(folder / WEIGHTS, checksums.pop(WEIGHTS, None))
    for name, listed in checksums.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != listed:
            raise _altered(path)
    for name in checksums:
        if name.endswith(MAPPED):
            mapped = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            # as a plain array: indexing a memmap runs Python code for every result
            weights[name.removesuffix(MAPPED)] = np.asarray(mapped)
    return config, weights


def _altered(path: Path) -> CorruptFile:
    return CorruptFile(f"{path}: missing or altered", hint="export the model again")


def _read_weights(path: Path, checksum: str | None) -> Weights:
    """Raises CorruptFile: it is missing or altered."""
    if checksum is None or not path.is_file():
        raise _altered(path)
    is_large = path.stat().st_size > AT_ONCE_BYTES
    content = b"" if is_large else read_small(path, AT_ONCE_BYTES)
    found = sha256_of(path) if is_large else hashlib.sha256(content).hexdigest()
    if found != checksum:
        raise _altered(path)
    weights: Weights = load_file(path) if is_large else load(content)
    return weights


def _kind_of(config: Path) -> str:
    return "item encoder" if config.parent.name == ITEM_ENCODER_FOLDER else "query encoder"


def _not_an_encoder(config: Path, error: Exception) -> CorruptFile:
    article = "an" if config.parent.name == ITEM_ENCODER_FOLDER else "a"
    return CorruptFile(f"{config}: not {article} {_kind_of(config)}", got=str(error))


def _read_config(path: Path, checksum: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration, and the checksum of every other file by its name."""
    try:
        content = read_small(path, MAX_VOCABULARY_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no {_kind_of(path)} here") from error
    if checksum is not None and hashlib.sha256(content).hexdigest() != checksum:
        raise CorruptFile(
            f"{path}: wrong checksum",
            hint="it was altered after it was written; restore it or build again",
        )
    try:
        config = parse_json(content, path)
        version = int(config["format_version"])
        if version < 3:
            return config, {WEIGHTS: config["weights_sha256"]}
        if version <= FORMAT_VERSION:
            return config, dict(config["sha256"])
    except (ValueError, KeyError, TypeError, CorruptFile) as error:
        raise _not_an_encoder(path, error) from error
    raise NewerFormat(
        f"{path}: format is newer than this program",
        expected=f"format_version <= {FORMAT_VERSION}",
        got=str(version),
    )
