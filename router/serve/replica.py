"""The Ray Serve edge: one router replica, following the controller's routing table.

Nothing of the request path is here: the ASGI app comes from ``router.http.api`` and runs in the
replica's one event loop, so nothing in it may block. A background task parks a long poll at the
controller; while the controller is away the replica serves on with the table it has.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private.worker import global_worker
from ray.exceptions import RayError

from shardline.router.http.api import REQUEST_ID_HEADER, create_app
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from shardline.router.serve.front import Front
from shardline.router.service import SearchService
from shardline.shards.core.errors import Unavailable, last_line
from shardline.shards.core.messages import Absence, RouterSeen
from shardline.shards.process.memory import prepare_memory
from shardline.shards.process.ray_metrics import RayExporter

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 30.0
ANNOUNCE_S = 5.0  # pause between two calls that announce this router
LATE_S = 5.0  # after the end of a poll: there will be no answer
RETRY_S = 0.5
SECRET_S = 30.0
FIRST_TABLE_S = 300.0  # above ENCODER_WAIT_S
TEXT_ENCODER_S = 60.0
# pauses between attempts to load an encoder that is damaged: its files may be large
FIRST_MEND_S, LAST_MEND_S = 5.0, 60.0
END_S = 5.0  # after the server's end, when Serve should have ended the process


class ServeApp:
    """The API as Ray Serve wants it: ``start`` and ``stop`` at the two ends of the server's life.

    Serve echoes X-Request-ID itself, so ours, which holds the same value, is taken off.
    """

    def __init__(
        self, app: Any, start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]
    ) -> None:
        self._app = app
        self._start = start
        self._stop = stop

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_one_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                message["headers"] = [each for each in headers if each[0] != REQUEST_ID_HEADER]
            await send(message)

        if scope["type"] != "lifespan":
            await self._app(scope, receive, send_one_id)
            return
        await receive()
        await self._start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})


@serve.ingress()
class RouterReplica:
    """Serves the HTTP API to who has a key of ``auth``.

    ``controller`` is the name of the actor that has the routing table, and the secret that proves
    this router to shards. end_process: called when it stops; for tests.
    """

    def __init__(
        self,
        *,
        config: RouterConfig,
        controller: str,
        namespace: str,
        auth: AuthSettings,
        huge_pages: bool,
        end_process: Callable[[], None] | None = None,
        events_folder: str | None = None,
    ) -> None:
        self._end_process = end_process or _end_process_soon
        self._config = config
        self._events_folder = None if events_folder is None else Path(events_folder)
        self._controller = (controller, namespace)
        self._huge_pages = huge_pages
        self._guard = Guard(auth)
        self._following: list[asyncio.Task[None]] = []
        self._has_table = asyncio.Event()
        self._exporter: RayExporter | None = None

    async def __serve_build_asgi_app__(self) -> ServeApp:
        """What Serve asks for, once, before ``start``.

        Raises:
            TimeoutError: the controller does not answer; Serve starts the replica again.
        """
        secret = await asyncio.wait_for(self._connection_secret(), SECRET_S)
        self._service = SearchService(self._config, secret, events_folder=self._events_folder)
        Front.ours = app = create_app(self._service, self._config, self._guard)
        return ServeApp(app, self.start, self.stop)

    async def start(self) -> None:
        """Begins to follow controller and key file; returns with the first table, so that Serve
        sends no query to a replica that could not answer it.

        Raises:
            TimeoutError: there is none; Serve starts the replica again.
        """
        _load_classes_from_here()
        await self._guard.begin()
        follow = (
            self._follow_controller(),
            self._announce(),
            self._follow_trouble(),
            self._guard.follow(),
            self._mend_encoder(),
        )
        self._following = [asyncio.ensure_future(each) for each in follow]
        await asyncio.wait_for(self._has_table.wait(), FIRST_TABLE_S)
        with suppress(TimeoutError):  # all but texts are answered without it
            async with asyncio.timeout(TEXT_ENCODER_S):
                await self._service.texts.loaded()
        self._exporter = RayExporter(self._service.recorder, self._service.refresh_metrics)
        prepare_memory(huge_pages=self._huge_pages)

    async def stop(self) -> None:
        """Stops following, closes the shard connections; then the process ends."""
        self._end_process()
        if self._exporter is not None:
            self._exporter.stop()
        for task in self._following:
            task.cancel()
        for ended in await asyncio.gather(*self._following, return_exceptions=True):
            if isinstance(ended, Exception):
                logger.error("the router had ceased to follow something", exc_info=ended)
        await self._service.close()

    async def _connection_secret(self) -> bytes:
        while True:
            try:
                controller = await asyncio.to_thread(self._find_controller)
                secret: bytes = await controller.connection_secret.remote()
                return secret
            except (RayError, ValueError) as error:
                logger.warning("no secret from the controller yet: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _follow_controller(self) -> None:
        """Applies every newer table, for as long as the replica lives."""
        version = 0
        controller: Any = None
        while True:
            try:
                if controller is None:  # blocks while Ray's head is away, so not in this loop
                    controller = await asyncio.to_thread(self._find_controller)
                table = await controller.table_after.remote(version, POLL_TIMEOUT_S)
                if table is not None:
                    await self._service.apply(table)
                    version = table.version
                    self._has_table.set()
            except (RayError, ValueError) as error:
                logger.warning("controller is away, serving on with table %d: %s", version, error)
                controller = None
                await asyncio.sleep(RETRY_S)
            except Exception:
                logger.exception("a table newer than %d could not be applied", version)
                await asyncio.sleep(RETRY_S)

    async def _announce(self) -> None:
        """Tells the controller every few seconds that this router lives, and what it has found;
        also while it loads an encoder for a new table. Hears which repairs are due."""
        router = _who_this_is()
        while True:
            try:
                controller = await asyncio.to_thread(self._find_controller)
                told = controller.router_lives.remote(router, self._service.watch.news())
                self._service.repairs = await _in_time(told, ANNOUNCE_S)
            except (RayError, ValueError, TimeoutError) as error:
                logger.warning("this router could not be announced: %s", last_line(error))
                await asyncio.sleep(RETRY_S)
                continue
            except Exception:
                logger.exception("this router could not be announced")
            await asyncio.sleep(ANNOUNCE_S)

    async def _follow_trouble(self) -> None:
        """Has `status` say why the controller publishes no newer table, while it cannot."""
        known: Absence | None = None
        while True:
            try:
                controller = await asyncio.to_thread(self._find_controller)
                while True:
                    # Ray keeps a call to an actor whose constructor is not done, and says nothing
                    asked = controller.trouble_after.remote(known, POLL_TIMEOUT_S)
                    known = await _in_time(asked, POLL_TIMEOUT_S + LATE_S)
                    self._service.controller_trouble = known
            except (RayError, ValueError, TimeoutError) as error:
                text = f"the controller does not answer: {last_line(error)}"
                known = self._service.controller_trouble = Absence(Unavailable.code, text)
                await asyncio.sleep(RETRY_S)
            except Exception:
                logger.exception("the controller was not asked for its troubles")
                await asyncio.sleep(RETRY_S)

    async def _mend_encoder(self) -> None:
        """Loads an encoder that was damaged, once its files have been restored."""
        pause = FIRST_MEND_S
        while True:
            await asyncio.sleep(pause)
            try:
                is_whole = await self._service.mend_encoder()
            except Exception:
                logger.exception("the query encoder was not looked at")
                is_whole = False
            pause = FIRST_MEND_S if is_whole else min(LAST_MEND_S, 2 * pause)

    def _find_controller(self) -> Any:
        name, namespace = self._controller
        return ray.get_actor(name, namespace=namespace)


def _end_process_soon() -> None:
    """Ends this process in END_S, unless Serve does before.

    Serve tells a replica to stop, and has Ray end its process then. While Ray's head is away that
    second step does nothing, and a controller of Serve's that starts afterwards takes the process
    for a replica that serves: its host would be without a router for good.
    """
    timer = threading.Timer(END_S, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _load_classes_from_here() -> None:
    """Has Ray import the classes of actors whose handles come here.

    Else it asks the GCS for them, in the event loop. Every proxy of Serve sends its own handle when
    it starts: after the loss of the head, when the GCS answers late, that held up all queries for
    seconds, until Serve took the routers for dead.
    """
    global_worker.set_load_code_from_local(True)


def _who_this_is() -> RouterSeen:
    return RouterSeen(
        host=ray.util.get_node_ip_address(),
        node_id=ray.get_runtime_context().get_node_id(),
        pid=os.getpid(),
    )


async def _in_time(answer: Awaitable[Any], seconds: float) -> Any:
    # not asyncio.wait_for: in Python 3.11 it swallows a cancellation that comes with the answer,
    # and ``stop`` would wait for ever
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError as error:
        raise TimeoutError(f"nothing within {seconds:g} s") from error
