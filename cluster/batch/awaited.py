"""What a pipeline gives, awaited in another thread, so that its end can be noticed though it waits.

Ray Data waits for ever for a host that has room for a stage which it has lost.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from shardline.shards.core.errors import Unavailable

Item = TypeVar("Item")

LOOK_S = 1.0
IN_VAIN_S = 60.0  # a host that restarts has joined again by then


@dataclass(frozen=True, slots=True)
class _Next(Generic[Item]):
    item: Item


@dataclass(frozen=True, slots=True)
class _End:
    """error: None at the end of the items."""

    error: BaseException | None = None


def awaited(
    items: Iterable[Item],
    trouble: Callable[[], Unavailable | None],
    *,
    look_s: float = LOOK_S,
    in_vain_s: float = IN_VAIN_S,
) -> Iterator[Item]:
    """The items in their order. While none comes, ``trouble`` is asked after each ``look_s``, in
    the caller's thread.

    The thread that waits for the items is left behind when this ends before them; it ends with
    what it waits for, or with the process.

    Raises:
        Unavailable: ``trouble`` has named one at all looks of ``in_vain_s``. Besides what the items
            raise.
    """
    found: queue.SimpleQueue[_Next[Item] | _End] = queue.SimpleQueue()

    def take() -> None:
        try:
            for item in items:
                found.put(_Next(item))
        except BaseException as error:  # noqa: BLE001  raised in the caller's thread
            found.put(_End(error))
        else:
            found.put(_End())

    threading.Thread(target=take, name="awaited", daemon=True).start()
    troubled_s = 0.0
    while True:
        try:
            came = found.get(timeout=look_s)
        except queue.Empty:
            error = trouble()
            troubled_s = 0.0 if error is None else troubled_s + look_s
            if error is not None and troubled_s >= in_vain_s:
                raise error from None
            continue
        if isinstance(came, _End):
            if came.error is not None:
                raise came.error
            return
        yield came.item
