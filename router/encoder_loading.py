"""Loads the encoders of a table, or gives what stands for one that does not load."""

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from shardline.router.fanout.snapshot import UnusableEncoder
from shardline.router.hanging import start
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.messages import Absence, RoutingTable

logger = logging.getLogger(__name__)

# How long a new table waits for its encoder, which is verified byte by byte: 25 GB take 20 s and
# more. After that it serves all but features, and the encoder once it is there.
ENCODER_WAIT_S = 60.0

Loaded = TypeVar("Loaded")


class EncoderLoader(Generic[Loaded]):
    """``load`` runs in a thread of its own; a load that hangs is not begun again.

    checksum: of the encoder that a table names. name: how logs call it.
    """

    def __init__(
        self,
        load: Callable[[RoutingTable], Loaded | None],
        checksum: Callable[[RoutingTable], str | None],
        name: str,
    ) -> None:
        self._load = load
        self._checksum = checksum
        self._name = name
        self._loading: tuple[str, asyncio.Future[Loaded | None]] | None = None
        # the encoder of the newest load that gave one, and the generation whose files it has
        self._newest: tuple[Loaded | None, str] | None = None

    async def loaded(self, table: RoutingTable) -> Loaded | UnusableEncoder | None:
        """The table's encoder, what stands for it, or None where the generation has none."""
        if self._loading is None or self._loading[0] != table.generation_dir:
            work = start(lambda: self._load(table), self._name)
            self._loading = table.generation_dir, work
        _, loading = self._loading
        await asyncio.wait([loading], timeout=ENCODER_WAIT_S)
        about = f"the {self._name} of generation {table.generation}"
        if not loading.done():
            reason = f"its files could not be read within {ENCODER_WAIT_S:g} s; it is awaited"
            logger.error("%s: %s", about, reason)
            return UnusableEncoder(Absence(Unavailable.code, reason))
        self._loading = None
        try:
            encoder = loading.result()
            self._newest = encoder, table.generation_dir
            return encoder
        except ShardlineError as error:
            logger.error("%s: %s", about, error)
            return UnusableEncoder(Absence(error.code, str(error)))
        except Exception as error:
            logger.exception("%s", about)
            return UnusableEncoder(Absence(Unavailable.code, repr(error)))

    async def of_next(
        self,
        before: RoutingTable | None,
        encoder: Loaded | UnusableEncoder | None,
        table: RoutingTable,
    ) -> Loaded | UnusableEncoder | None:
        """That of a table of another generation than ``before``, which has ``encoder``: the same
        one, if it is of the same model and files. Writes wait in every router until the table is in
        use, and would not wait for as long as loading can take."""
        checksum = self._checksum(table)
        is_same = (
            before is not None
            and checksum is not None
            and (before.model_version, self._checksum(before)) == (table.model_version, checksum)
        )
        if is_same and encoder is not None and not isinstance(encoder, UnusableEncoder):
            return encoder
        return await self.loaded(table)

    async def mended(
        self, encoder: Loaded | UnusableEncoder | None, table: RoutingTable
    ) -> Loaded | UnusableEncoder | None:
        """The encoder, loaded again if it is one that did not load; or if it has files of another
        generation mapped, which may be deleted: on NFS their rows would be gone with them."""
        if self.is_whole(encoder, table):
            return encoder
        found = await self.loaded(table)
        is_usable = encoder is not None and not isinstance(encoder, UnusableEncoder)
        return encoder if is_usable and isinstance(found, UnusableEncoder) else found

    def is_whole(self, encoder: Loaded | UnusableEncoder | None, table: RoutingTable) -> bool:
        """Whether there is nothing to mend: it was loaded, and from the table's generation."""
        if isinstance(encoder, UnusableEncoder) or self._newest is None:
            return False
        loaded, folder = self._newest
        return encoder is loaded and folder == table.generation_dir
