"""A shard server in a process of its own, whose memory a test can look at.

python -m tests.unread_server      prints the port, then serves until its input ends
"""

import sys

import numpy as np
import pyarrow as pa

from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.state import ShardState
from shardline.shards.server.shard import Shard
from shardline.shards.server.shard_server import ShardServer
from tests.engine import build_main

ROWS, DIM = 4096, 32
SECRET = b"a secret of tests"
TEXT_BYTES = 4000  # of the attribute of an item: 4096 of them are as much as one answer may hold


def main() -> None:
    vectors = np.random.default_rng(0).random((ROWS, DIM), np.float32)
    text = ItemAttributes(pa.table({"text": ["x" * TEXT_BYTES] * ROWS}))
    state = ShardState.of(build_main(vectors, kind="flat"), np.arange(ROWS), text)
    server = ShardServer(Shard(shard=0, generation=1, state=state), secret=SECRET)
    _, port = server.bind()
    server.start(epoch=1)
    print(port, flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
