"""A router's memory does not grow with the catalogue: the rows of past items stay in their files.

``SHARDLINE_HISTORY_ROWS=5000000 pytest -s tests/unit/test_mapped_history.py`` measures five million
items (1.3 GB of disk) instead of 400,000. Only private memory counts: the mapped pages that a
process has touched are resident too, but they are the page cache's, shared and given up on demand.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shardline.router.encoder.history_rows import PastItems, StoredRows
from shardline.router.encoder.inputs import History
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.core.encoder_files import MappedArrays, write_encoder
from shardline.shards.core.errors import CorruptFile
from shardline.shards.core.schema import FloatArray, IdArray

SMALL, LARGE = 10_000, int(os.environ.get("SHARDLINE_HISTORY_ROWS", "400000"))
WIDTH, BLOCK = 64, 50_000
PRIVATE_BYTES = 10 << 20  # what the larger one may take more; its rows alone are ten times that
HISTORY = {"kind": "history", "column": "history", "max_length": 20, "pooling": "mean"}
# what a router replica does: load, prepare its memory, encode
REPLICA = """
import json, sys
from pathlib import Path
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.shards.process.memory import prepare_memory

encoder = QueryEncoder.load(Path(sys.argv[1]))
prepare_memory(huge_pages=True)
for query in json.loads(sys.argv[2]):
    vectors = encoder.encode([{"history": query}])
status = dict(line.split(":") for line in open("/proc/self/status"))
kib = {name: int(status[name].split()[0]) << 10 for name in ("RssAnon", "VmRSS")}
print(json.dumps(kib | {"last": vectors[0].tolist()}))
"""


def item_ids(rows: int) -> IdArray:
    return np.arange(rows, dtype=np.int64) * 3  # every third id is known


def encoder_of(folder: Path, rows: int) -> Path:
    """An encoder that adds up nothing but the mean of the past items."""
    folder.mkdir()
    rng = np.random.default_rng(rows)
    arrays, ids = MappedArrays(folder, rows), item_ids(rows)
    for start in range(0, rows, BLOCK):
        block = ids[start : start + BLOCK]
        values = rng.standard_normal((len(block), WIDTH), dtype=np.float32)
        arrays.write(start, {"history.item_ids": block, "history.rows": values})
    config = {"model_version": "m", "dim": WIDTH, "projection": "identity", "features": [HISTORY]}
    write_encoder(folder, config, {})
    return folder


def slow_vector(folder: Path, history: list[int]) -> FloatArray:
    """The mean of the newest 20 known rows, scaled to length one, read without the encoder."""
    rows = np.load(folder / "history.rows.npy", mmap_mode="r")
    known = [item // 3 for item in history if item % 3 == 0 and item // 3 < len(rows)]
    mean = np.mean([rows[row] for row in known[-20:]], axis=0)
    unit: FloatArray = mean / np.linalg.norm(mean)
    return unit


def measured(folder: Path, rows: int) -> dict[str, int]:
    """RssAnon and VmRSS in bytes of a process that encodes 200 histories spread over the rows."""
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 3 * rows + 100, (200, 30)).tolist()
    done = subprocess.run(
        [sys.executable, "-c", REPLICA, str(folder), json.dumps(queries)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    np.testing.assert_allclose(found.pop("last"), slow_vector(folder, queries[-1]), atol=1e-6)
    print(f"{rows} rows: {found['RssAnon'] >> 20} MiB private, {found['VmRSS'] >> 20} MiB resident")
    return found


def test_private_memory_does_not_grow_with_the_catalogue(tmp_path: Path) -> None:
    small, large = (
        measured(encoder_of(tmp_path / str(rows), rows), rows) for rows in (SMALL, LARGE)
    )
    assert large["RssAnon"] - small["RssAnon"] < PRIVATE_BYTES


@pytest.mark.parametrize("name", ["history.rows.npy", "history.item_ids.npy"])
def test_an_altered_or_missing_array_is_refused(tmp_path: Path, name: str) -> None:
    folder = encoder_of(tmp_path / "encoder", 100)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"{name}: missing or altered"):
        QueryEncoder.load(folder)
    (folder / name).unlink()
    with pytest.raises(CorruptFile, match=rf"{name}: missing or altered"):
        QueryEncoder.load(folder)


class DictionaryRows:
    """The slow, obvious ``HistoryRows``: one item after the other."""

    width = WIDTH

    def __init__(self, rows: dict[int, FloatArray]) -> None:
        self._rows = rows

    def newest(self, item_ids: IdArray, limit: int, new_items: object = None) -> PastItems:
        known = [self._rows[item] for item in item_ids.tolist() if item in self._rows][-limit:]
        return PastItems(np.array(known, np.float32).reshape(-1, self.width), None)


def test_stored_rows_equal_a_dictionary() -> None:
    rng = np.random.default_rng(3)
    ids = np.sort(rng.choice(500, 60, replace=False)).astype(np.int64)
    rows = rng.standard_normal((60, WIDTH), dtype=np.float32)
    slow = DictionaryRows(dict(zip(ids.tolist(), rows, strict=True)))
    stored = StoredRows({"history.item_ids": ids, "history.rows": rows})
    histories = [rng.integers(-5, 510, length).tolist() for length in (0, 1, 5, 40, 300) * 4]
    expected, found = (
        History(HISTORY, items, recency=None, extras=True).rows(histories)
        for items in (slow, stored)
    )
    assert (expected == found).all()
    assert expected[:, WIDTH].max() == 1 and expected[:, WIDTH + 1].max() == 1
