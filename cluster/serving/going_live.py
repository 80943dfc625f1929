"""A generation that a command has just made goes live, where that takes nothing from anybody."""

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.rollover.left_behind import check_none_left_behind
from shardline.cluster.serving.served import served_generation
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, GateFailed, NotFound, Unavailable
from shardline.shards.live.went_live import NAME, WentLive, write_went_live


def made_live(config: ShardlineConfig, number: int, *, verbose: bool = False) -> str | None:
    """Makes a complete generation the live one, for the next cluster; or why it is not, with what
    to do.

    A cluster that serves the store goes on with what it has: its controller, started again, would
    take what is live without a gate. And no write that the live generation has is left behind.

    Raises:
        OSError: the store does not take it.
    """
    reason = cluster_there(config, number, verbose=verbose)
    if reason is None:
        store = Store(config.store.resolve())
        try:
            check_none_left_behind(store, number)
        except GateFailed as error:
            return str(error)
        make_live(store, number)
    return reason


def make_live(store: Store, number: int) -> None:
    """Where no cluster serves the store: what an earlier switch to the generation noted of the
    writes that it had holds no longer, because the one before may have been written since.

    Raises: as ``Store.set_current``.
    """
    try:
        is_live = store.current() == number
    except (NotFound, CorruptFile):
        is_live = False
    if not is_live and (store.writes(number) / NAME).exists():
        write_went_live(store.writes(number), WentLive())
    store.set_current(number)


def cluster_there(config: ShardlineConfig, number: int, *, verbose: bool = False) -> str | None:
    """That a cluster serves the store, or that nobody can tell; with how generation ``number`` goes
    live then. None: none does."""
    hint = f"`shardline publish {number}` to change over"
    try:
        served = served_generation(config, verbose=verbose)
    except (CorruptFile, Unavailable) as error:
        if not _has_live(Store(config.store.resolve())):
            return None
        return f"not live: whether a cluster serves the store is not known ({error}); {hint}"
    return None if served is None else f"the cluster goes on with generation {served}; {hint}"


def _has_live(store: Store) -> bool:
    try:
        store.current()
    except NotFound:
        return False
    except CorruptFile:
        return True
    return True
