"""A router over fake shards behind a real HTTP server, in a thread with a loop of its own."""

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from shardline.router.http.api import create_app
from shardline.router.http.auth import Guard
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from tests.fake_encoder import FakeEncoder, small_item_encoder
from tests.fake_shard import SECRET, FakeShard, make_rows, make_table, running_shards

NUM_ROWS = 60
NUM_SHARDS = 4
DIM = 8


@dataclass
class LiveRouter:
    """Where it answers, and what it is made of; the latter belongs to its loop's thread."""

    url: str
    service: SearchService
    shards: list[FakeShard]
    loop: asyncio.AbstractEventLoop
    store: Path

    def switch(self, generation: int, **changes: object) -> None:
        """Has the same rows go live as another generation, whose shards have counted no writes."""
        for shard in self.shards:
            shard.generation, shard.seq = generation, 0
        version = self.service._fanout.snapshot.table.version + 1
        place = {"generation_dir": str(self.store / "generations" / "000001")}
        given = {"generation": generation, "version": version, **place, **changes}
        table = make_table(self.shards, DIM, **given)
        asyncio.run_coroutine_threadsafe(self.service.apply(table), self.loop).result(10)


def health_checked(app: ASGIApp) -> ASGIApp:
    """With what Serve answers in front of it: HAProxy asks for this path."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        healthy = scope["type"] == "http" and scope["path"] == "/-/healthz"
        await (PlainTextResponse("success") if healthy else app)(scope, receive, send)

    return answer


@contextlib.contextmanager
def running_router(
    config: RouterConfig,
    guard: Guard | None = None,
    store: Path | None = None,
    events_folder: Path | None = None,
) -> Iterator[LiveRouter]:
    """NUM_ROWS rows of ``make_rows`` in NUM_SHARDS shards, and a store for lists: one of its own,
    removed at the end, or the one given."""
    if store is not None:
        with _running(config, guard, store, events_folder) as router:
            yield router
        return
    with tempfile.TemporaryDirectory(prefix="live-router-") as folder:
        (Path(folder) / "generations" / "000001").mkdir(parents=True)
        with _running(config, guard, Path(folder), events_folder) as router:
            yield router


@contextlib.contextmanager
def _running(
    config: RouterConfig, guard: Guard | None, store: Path, events_folder: Path | None
) -> Iterator[LiveRouter]:
    listening = socket.create_server(("127.0.0.1", 0))
    ready, stop = threading.Event(), threading.Event()
    state: dict[str, LiveRouter] = {}

    async def run() -> None:
        ids, vectors = make_rows(NUM_ROWS, DIM)
        async with running_shards(ids, vectors, NUM_SHARDS) as shards:
            service = SearchService(
                config,
                SECRET,
                load_encoder=lambda _table: FakeEncoder(DIM, "m1"),
                load_items=lambda _table: small_item_encoder(DIM, "m1"),
                events_folder=events_folder,
            )
            place = str(store / "generations" / "000001")
            await service.apply(make_table(shards, DIM, generation_dir=place))
            app = health_checked(create_app(service, config, guard))
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            state["router"] = LiveRouter(url, service, shards, asyncio.get_running_loop(), store)
            # both threads start here, and none within a test, where it would look left behind
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
            stopped = asyncio.create_task(asyncio.to_thread(stop.wait))
            await asyncio.sleep(0)
            await asyncio.to_thread(int)
            ready.set()
            await stopped
            server.should_exit = True
            await serving
            await service.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield state["router"]
    finally:
        stop.set()
        thread.join(10)
        listening.close()
    assert not thread.is_alive()
