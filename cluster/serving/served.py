"""Which generation of a store a cluster serves now, whether it runs on this machine or on hosts."""

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.serving.endpoint import noted_generation, refuse_elsewhere
from shardline.cluster.store import Store


def served_generation(config: ShardlineConfig, *, verbose: bool = False) -> int | None:
    """Its number; None: no cluster of the configuration serves its store.

    Raises:
        CorruptFile: the note of a cluster on this machine is damaged.
        ConfigError, Unavailable: as ``attached_ray``, or the cluster's controller does not answer;
            or a cluster on another host has left a note.
    """
    store, address = Store(config.store.resolve()), config.cluster.address
    served = noted_generation(store)
    if served is None and address != "local":
        # takes a second, for Ray
        from shardline.cluster.serving.launched import ask_controller, is_served
        from shardline.cluster.serving.ray_session import attached_ray

        with attached_ray(address, verbose=verbose):
            served = int(ask_controller().report["generation"]) if is_served() else None
    if served is None:
        refuse_elsewhere(store)
    return served
