"""Keeps apart the start of a cluster and the removal of what nothing serves: a lock in the store.

A cluster that starts is not on record yet, and may be loading a generation that is neither live nor
served. So whoever starts one holds the lock with others that do, until the cluster can be found;
whoever removes generations, or the log of shards that nobody has loaded, holds it alone.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from shardline.cluster.store import Store
from shardline.shards.core.errors import Unavailable

logger = logging.getLogger(__name__)

LOCK = "gc.lock"


@contextmanager
def removing(store: Store) -> Iterator[None]:
    """Raises Unavailable: a cluster of the store is starting, or somebody else removes. OSError: of
    the lock's file."""
    handle = _opened(store)
    try:
        if not _taken(handle, fcntl.LOCK_EX):
            if _taken(handle, fcntl.LOCK_SH):
                raise Unavailable(
                    f"{store.root}: a cluster is starting", hint="wait until it serves"
                )
            raise _at_work(store)
        yield
    finally:
        os.close(handle)


@contextmanager
def starting(store: Store) -> Iterator[None]:
    """Raises Unavailable: somebody removes what may be about to be loaded.

    On a store that has no locks, or takes no file, nothing is kept apart.
    """
    try:
        handle = _opened(store)
    except OSError as error:
        logger.debug("a gc will not see that a cluster starts: %s", error)
        yield
        return
    try:
        try:
            is_taken = _taken(handle, fcntl.LOCK_SH)
        except OSError as error:
            logger.warning("a gc will not see that a cluster starts: %s", error)
            is_taken = True
        if not is_taken:
            raise _at_work(store)
        yield
    finally:
        os.close(handle)


def _opened(store: Store) -> int:
    return os.open(store.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _at_work(store: Store) -> Unavailable:
    return Unavailable(
        f"{store.root}: `shardline gc` or `shardline generations delete` is at work",
        hint="wait for its end",
    )
