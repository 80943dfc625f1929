"""Shardline: sharded two-tower retrieval. ``from shardline import Client`` asks a cluster.

What is exported is imported at first use (PEP 562): a client loads no more than numpy and msgpack.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardline.router.client.answers import SearchAnswer as SearchAnswer
    from shardline.router.client.async_client import AsyncClient as AsyncClient
    from shardline.router.client.retries import Retry as Retry
    from shardline.router.client.seq import Seq as Seq
    from shardline.router.client.sync_client import Client as Client
    from shardline.router.contract import Coverage as Coverage
    from shardline.router.contract import Degraded as Degraded
    from shardline.router.contract import Forbidden as Forbidden
    from shardline.router.contract import ItemAnswer as ItemAnswer
    from shardline.router.contract import PayloadTooLarge as PayloadTooLarge
    from shardline.router.contract import Reason as Reason
    from shardline.router.contract import Unauthenticated as Unauthenticated
    from shardline.shards.core.errors import Behind as Behind
    from shardline.shards.core.errors import CardFailed as CardFailed
    from shardline.shards.core.errors import DeadlineExceeded as DeadlineExceeded
    from shardline.shards.core.errors import DeltaFull as DeltaFull
    from shardline.shards.core.errors import EncoderUnavailable as EncoderUnavailable
    from shardline.shards.core.errors import InvalidInput as InvalidInput
    from shardline.shards.core.errors import ListsUnavailable as ListsUnavailable
    from shardline.shards.core.errors import NotFound as NotFound
    from shardline.shards.core.errors import NotPrimary as NotPrimary
    from shardline.shards.core.errors import Overloaded as Overloaded
    from shardline.shards.core.errors import ProtocolError as ProtocolError
    from shardline.shards.core.errors import ReadOnly as ReadOnly
    from shardline.shards.core.errors import ShardlineError as ShardlineError
    from shardline.shards.core.errors import StoreFull as StoreFull
    from shardline.shards.core.errors import Unavailable as Unavailable
    from shardline.shards.core.errors import VersionMismatch as VersionMismatch
    from shardline.shards.core.messages import SearchParams as SearchParams
else:
    _HOMES = {
        "router.client.answers": ("SearchAnswer",),
        "router.client.async_client": ("AsyncClient",),
        "router.client.retries": ("Retry",),
        "router.client.seq": ("Seq",),
        "router.client.sync_client": ("Client",),
        "router.contract": (
            *("Coverage", "Degraded", "Forbidden", "ItemAnswer", "PayloadTooLarge", "Reason"),
            "Unauthenticated",
        ),
        "shards.core.errors": (
            *(
                "Behind",
                "CardFailed",
                "DeadlineExceeded",
                "DeltaFull",
                "EncoderUnavailable",
                "InvalidInput",
                "ListsUnavailable",
                "NotFound",
                "NotPrimary",
                "Overloaded",
                "ProtocolError",
                "ReadOnly",
            ),
            *("ShardlineError", "StoreFull", "Unavailable", "VersionMismatch"),
        ),
        "shards.core.messages": ("SearchParams",),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
    __all__ = sorted(_HOME_OF)

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
