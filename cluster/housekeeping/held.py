"""The generations of a store that may not be removed, and why."""

from dataclasses import dataclass

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.control.fleet_state import Role
from shardline.cluster.control.publish_note import beside_in, told_in
from shardline.cluster.serving.served import served_generation
from shardline.cluster.store import Store
from shardline.shards.core.errors import NotFound

LIVE, SERVED, BESIDE = "live", "being served", "kept for a rollback, or about to be published"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """live: what CURRENT names. served: by a cluster now. beside: what that has loaded besides;
    is_publishing: to make that live."""

    live: int | None
    served: int | None
    beside: int | None
    is_publishing: bool = False

    @property
    def reasons(self) -> dict[int, str]:
        """Number -> why it may not be removed."""
        found = {self.beside: BESIDE, self.served: SERVED, self.live: LIVE}
        return {number: why for number, why in found.items() if number is not None}


def held_generations(config: ShardlineConfig, *, verbose: bool = False) -> Held:
    """The generations of a store that are in use.

    Raises:
        CorruptFile: CURRENT or a note is damaged, so that nobody can tell.
        ConfigError, Unavailable: as ``served_generation``.
    """
    store = Store(config.store.resolve())
    beside = beside_in(store.root)
    served = served_generation(config, verbose=verbose)
    try:
        live = store.current()
    except NotFound:
        live = None
    told = told_in(store.root) or {}
    is_publishing = beside is not None and told.get("role") == Role.CANDIDATE
    return Held(live=live, served=served, beside=beside, is_publishing=is_publishing)
