"""What a query costs in the router's part of the fan-out, counted in Python calls.

Calls do not depend on what else the machine does. 76 were made with four shards of one replica
before shards could have several, and 116 with two.
"""

import asyncio
import random
import sys
from types import FrameType
from typing import Any

import pytest

from shardline.router.fanout.coalesce import LaneKey
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.hedging import REFRESH
from shardline.router.router_config import RouterConfig
from tests.fake_shard import SECRET, make_rows, make_table, replicated, running_replicas

DIM, SHARDS, QUERIES = 8, 4, 50


class CallCount:
    """Calls of Python functions of the router while the context is open."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> "CallCount":
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/router/" in frame.f_code.co_filename:
            self.calls += 1


@pytest.mark.parametrize(("copies", "most"), [(1, 76), (2, 96)])
async def test_calls_per_query(copies: int, most: int) -> None:
    ids, vectors = make_rows(60, DIM)
    async with running_replicas(ids, vectors, SHARDS, copies) as shards:
        # without hedges: on a busy machine there would be some
        fanout = Fanout(SECRET, RouterConfig(hedge_share=0.0), random.Random(0))
        assert await fanout.apply(make_table(list(map(replicated, shards)), DIM), None)

        async def ask() -> None:
            deadline = asyncio.get_running_loop().time() + 20.0
            with fanout.pin() as snapshot:
                key = LaneKey(snapshot=snapshot, k=5, min_coverage=0.0)
                answer = await fanout.search(vectors[:1], key, deadline=deadline)
            assert answer.coverage.share == 1.0

        for _ in range(REFRESH):  # then it is known how long a frame takes
            await ask()
        with CallCount() as count:
            for _ in range(QUERIES):
                await ask()
        await fanout.close()
    assert 0 < count.calls // QUERIES <= most  # a few more look at the clock now and then
