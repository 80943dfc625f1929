"""Which generation of a store a cluster serves now, whether it runs on this machine or on hosts."""

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.serving.endpoint import find_endpoint
from shardline.cluster.store import Store
from shardline.shards.core.errors import NotFound


def served_generation(config: ShardlineConfig, *, verbose: bool = False) -> int | None:
    """Its number; None: no cluster of the configuration serves its store.

    Raises:
        CorruptFile: the note of a cluster on this machine is damaged.
        ConfigError, Unavailable: as ``attached_ray``, or the cluster's controller does not answer.
    """
    try:
        return find_endpoint(Store(config.store.resolve())).generation
    except NotFound:
        address = config.cluster.address
    if address == "local":
        return None
    # takes a second, for Ray
    from shardline.cluster.serving.launched import ask_controller, is_served
    from shardline.cluster.serving.ray_session import attached_ray

    with attached_ray(address, verbose=verbose):
        return int(ask_controller().report["generation"]) if is_served() else None
