"""What a router replica follows beside its table: no failure ends that, and ``stop`` is whole."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.worker import global_worker

from shardline.router.http.auth import AuthSettings
from shardline.router.router_config import RouterConfig
from shardline.router.serve import replica as module
from shardline.router.serve.replica import RouterReplica
from shardline.shards.core.messages import Absence, RouterNews, RouterSeen
from tests.fake_actor import HANG, Method
from tests.fake_shard import until

TROUBLE = Absence("data_error", "a full disk")
REPAIR = Absence("compact", "too much has changed")
NEWS = RouterNews()


class Controller:
    """Its secret and its troubles as planned, then nothing for ever."""

    def __init__(self, *troubles: Any) -> None:
        self.trouble_after, self.table_after, self.connection_secret = Method(), Method(), Method()
        self.router_lives = Method((REPAIR,))
        self.loads_from_here: list[bool] = []
        self.trouble_after.plan = [*troubles, HANG]
        self.table_after.plan = [HANG]
        self.connection_secret.plan = [b"s" * 32]


class Service:
    """Counts; ``mend_encoder`` gives or raises what is planned."""

    controller_trouble: Absence | None = None
    repairs: tuple[Absence, ...] = ()
    watch = SimpleNamespace(news=lambda: NEWS)
    recorder = refresh_metrics = None

    def __init__(self, *mended: Any) -> None:
        self.mended, self.calls, self.closed = list(mended), 0, False
        self.texts = self

    async def loaded(self) -> bool:  # the text encoder
        return False

    async def mend_encoder(self) -> bool:
        self.calls += 1
        outcome = self.mended.pop(0) if self.mended else True
        if isinstance(outcome, Exception):
            raise outcome
        return bool(outcome)

    async def close(self) -> None:
        self.closed = True


@contextlib.asynccontextmanager
async def following(
    monkeypatch: pytest.MonkeyPatch, controller: Controller, service: Service
) -> AsyncIterator[RouterReplica]:
    """A replica that has started, but for Serve and the process's memory."""
    for name in ("RETRY_S", "FIRST_MEND_S", "LAST_MEND_S"):
        monkeypatch.setattr(module, name, 0.01)
    node = SimpleNamespace(get_node_id=lambda: "na")
    ray = SimpleNamespace(
        get_actor=lambda *_, **__: controller,
        get_runtime_context=lambda: node,
        util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1"),
    )
    monkeypatch.setattr(module, "ray", ray)
    worker = SimpleNamespace(set_load_code_from_local=controller.loads_from_here.append)
    monkeypatch.setattr(module, "global_worker", worker)
    monkeypatch.setattr(module, "prepare_memory", lambda **_: None)
    exporter = SimpleNamespace(stop=lambda: None)
    monkeypatch.setattr(module, "RayExporter", lambda *_: exporter)
    plain = RouterReplica.__mro__[1]  # without Serve's wrapper
    ended: list[bool] = []
    replica = plain(
        config=RouterConfig(),
        controller="controller",
        namespace="shardline",
        auth=AuthSettings(keyring=None),
        huge_pages=False,
        end_process=lambda: ended.append(True),
    )
    replica._service = service
    replica._has_table.set()
    await replica.start()
    try:
        yield replica
        assert not ended
    finally:
        await replica.stop()
    assert ended, "a router that serves no more is not to be taken for one that does"


async def test_whatever_fails_is_tried_again(monkeypatch, caplog):
    controller = Controller(TypeError("a bug"), OSError("no thread"), None, TROUBLE)
    service = Service(OSError(24, "Too many open files"), ValueError("a bug"), False, True)
    async with following(monkeypatch, controller, service):
        await until(lambda: service.controller_trouble == TROUBLE)
        await until(lambda: service.calls > 4)
    assert "a bug" in caplog.text
    assert "Too many open files" in caplog.text
    assert service.closed


async def test_a_controller_that_never_answers_is_told_of(monkeypatch):
    """One that waits in its constructor: Ray keeps the calls until that is done."""
    monkeypatch.setattr(module, "POLL_TIMEOUT_S", 0.01)
    monkeypatch.setattr(module, "LATE_S", 0.04)
    controller, service = Controller(None, HANG, HANG, TROUBLE), Service()
    async with following(monkeypatch, controller, service):
        await until(lambda: service.controller_trouble is not None)
        assert service.controller_trouble == Absence(
            "unavailable", "the controller does not answer: nothing within 0.05 s"
        )
        await until(lambda: service.controller_trouble == TROUBLE)


async def test_it_announces_itself_also_while_it_loads_an_encoder(monkeypatch):
    """And again soon where the controller could not be told."""
    monkeypatch.setattr(module, "ANNOUNCE_S", 0.02)
    controller, service = Controller(), Service()
    loading = asyncio.Event()

    async def apply(table):
        loading.set()
        await asyncio.sleep(3600)

    service.apply = apply
    controller.table_after.plan = [SimpleNamespace(version=1), HANG]
    controller.router_lives.plan = [ConnectionError("away"), HANG, TypeError("a bug")]
    monkeypatch.setattr(module, "RayError", ConnectionError)
    async with following(monkeypatch, controller, service):
        await asyncio.wait_for(loading.wait(), 5)
        before = controller.router_lives.calls
        await until(lambda: controller.router_lives.calls > before + 4)
        assert controller.table_after.calls == 1
    announced = {arguments[0] for arguments in controller.router_lives.asked}
    assert announced == {RouterSeen(host="10.0.0.1", node_id="na", pid=os.getpid())}
    assert {arguments[1] for arguments in controller.router_lives.asked} == {NEWS}
    assert service.repairs == (REPAIR,), "as it was told last"


async def test_classes_of_handles_are_not_asked_of_ray_in_the_event_loop(monkeypatch):
    controller = Controller()
    async with following(monkeypatch, controller, Service()):
        assert controller.loads_from_here == [True]
    assert callable(global_worker.set_load_code_from_local)  # this Ray has the switch


async def test_stop_ends_everything_though_something_had_failed(monkeypatch, caplog):
    service = Service()
    async with following(monkeypatch, Controller(), service) as replica:

        async def fails() -> None:
            raise KeyError("a bug")

        replica._following.insert(0, asyncio.ensure_future(fails()))
        await asyncio.sleep(0)
        tasks = list(replica._following)
    assert service.closed
    assert all(task.done() for task in tasks)
    assert "a bug" in caplog.text
