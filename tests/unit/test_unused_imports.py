"""What a shard's process does without."""

import subprocess
import sys

PROGRAM = """
import sys
from shardline.shards.core.unused_imports import forgo_pandas
forgo_pandas()
import pyarrow as pa
assert pa.scalar(0.5, pa.float64()).as_py() == 0.5
assert pa.array(["a", None]).to_pylist() == ["a", None]
assert pa.scalar(1_000, pa.timestamp("us", "UTC")).as_py().timestamp() == 0.001
assert "pandas" not in sys.modules
"""


def test_values_are_converted_without_pandas() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
