"""The generations of a store that may not be removed, and why."""

from dataclasses import dataclass, replace

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.control.publish_note import InUse, in_use_in
from shardline.cluster.serving.endpoint import noted_generation
from shardline.cluster.serving.served import served_generation
from shardline.cluster.store import Store
from shardline.shards.core.errors import NotFound

LIVE, SERVED, BESIDE = "live", "being served", "kept for a rollback, or about to be published"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """live: what CURRENT names. served: by a cluster now, as far as that was asked. noted: what
    that has loaded besides, and what is being published."""

    live: int | None
    noted: InUse
    served: int | None = None

    @property
    def reasons(self) -> dict[int, str]:
        """Number -> why it may not be removed."""
        noted = dict.fromkeys((self.noted.live, self.noted.beside, self.noted.coming), BESIDE)
        found = noted | {self.served: SERVED, self.live: LIVE}
        return {number: why for number, why in found.items() if number is not None}


def held_on_record(store: Store) -> Held:
    """As the store's files say, without asking a cluster: of those that serve, one on this machine
    has left a note there.

    Raises:
        CorruptFile: CURRENT or a note is damaged, so that nobody can tell.
    """
    noted = in_use_in(store.root)  # before CURRENT, which a switch changes first
    try:
        live = store.current()
    except NotFound:
        live = None
    return Held(live=live, noted=noted, served=noted_generation(store))


def held_generations(config: ShardlineConfig, *, verbose: bool = False) -> Held:
    """The generations of a store that are in use.

    Raises:
        CorruptFile: as ``held_on_record``. ConfigError, Unavailable: as ``served_generation``.
    """
    served = served_generation(config, verbose=verbose)
    return replace(held_on_record(Store(config.store.resolve())), served=served)
