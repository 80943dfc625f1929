"""The checks of a command, in the order in which it needs what they look at."""

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.preflight.check import Check, failed
from shardline.cluster.preflight.folders import (
    check_shared_memory,
    check_temporary,
    check_writable,
    look_at,
    shared_memory,
    temporary_root,
)
from shardline.cluster.preflight.free_memory import check_memory, free_memory, needed_memory
from shardline.cluster.preflight.network import check_http
from shardline.cluster.preflight.open_files import (
    check_open_files,
    hard_limit,
    requests_in_flight,
)
from shardline.cluster.preflight.text_models import check_text_encoder
from shardline.cluster.preflight.thread_limits import check_processes, room_for_threads
from shardline.cluster.store import Store
from shardline.shards.core.errors import Unavailable
from shardline.shards.storage.generation import read_generation


def before_ray(in_flight: int | None) -> list[Check]:
    """For a private Ray. in_flight: requests that its routers are to work on at once, all together;
    None: it is to serve nothing."""
    shared = shared_memory()
    try:
        executes = in_flight is not None
        temporary = check_temporary(look_at(temporary_root()), shared, executes=executes)
    except Unavailable as error:
        temporary = failed("temporary folder", error)
    return [
        check_open_files(in_flight, hard_limit()),
        temporary,
        check_shared_memory(shared),
    ]


def before_serving(
    config: ShardlineConfig, number: int | None, own_url: str | None = None
) -> list[Check]:
    """For the cluster that serves a generation; None: of whatever is built later.

    own_url: where the store's own cluster answers now, if it uses this port.

    Raises:
        CorruptFile, NewerFormat: the generation's manifest cannot be read.
    """
    checks = before_start(config, own_url)
    if config.cluster.address != "local":
        return checks
    checks += before_ray(requests_in_flight(config))
    if number is not None:
        manifest = read_generation(Store(config.store.resolve()).generation(number))
        actors = len(manifest.shards) + config.cluster.routers_per_host
        checks.append(check_processes(room_for_threads(), actors))
        checks.append(check_memory(needed_memory(config, manifest), free_memory()))
    return checks


def before_start(config: ShardlineConfig, own_url: str | None = None) -> list[Check]:
    """Those of ``before_serving`` that Ray's own processes do not change: they hold while Ray runs,
    too."""
    checks = [check_store(Store(config.store.resolve()))]
    if config.router.text_encoder is not None:
        checks.append(check_text_encoder(config.router.text_encoder))
    if config.cluster.address == "local":
        checks.insert(0, check_http(config.cluster.http_host, config.cluster.http_port, own_url))
    return checks


def check_store(store: Store, needed_bytes: int = 0) -> Check:
    """needed_bytes: the size of what is about to be written into it, where that is known."""
    return check_writable("store", look_at(store.root), needed_bytes=needed_bytes)
