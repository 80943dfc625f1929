"""The two clients behind one blocking interface, so that one suite of tests runs on both."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self

from shardline.router.client.async_client import AsyncClient
from shardline.router.client.sync_client import Client


class BlockingTwin:
    """An AsyncClient in an event loop of its own; each verb runs until it is answered."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.client = AsyncClient(*args, **options)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._runner.close()

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        asked: Callable[..., Awaitable[Any]] = getattr(self.client, verb)

        async def call(*args: Any, **fields: Any) -> Any:
            return await asked(*args, **fields)

        return lambda *args, **fields: self._runner.run(call(*args, **fields))


def slept_into(client: Any, pauses: list[float]) -> None:
    """The client notes its pauses in ``pauses`` instead of sleeping."""
    if isinstance(client, BlockingTwin):

        async def note(seconds: float) -> None:
            pauses.append(seconds)

        client.client._sleep = note  # type: ignore[method-assign, assignment]
    else:
        client._sleep = pauses.append


KINDS = (Client, BlockingTwin)
