"""Checks before Ray is started: the store is not served yet, the port is free, files are whole.

If a generation is damaged, the error names another that can be served. ``serve`` runs these checks
first, because Ray takes seconds to start.
"""

from collections.abc import Iterator

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.serving.endpoint import refuse_if_served
from shardline.cluster.serving.ray_session import port_is_free
from shardline.cluster.store import Store
from shardline.shards.core.errors import (
    CorruptFile,
    NewerFormat,
    NotFound,
    ShardlineError,
    Unavailable,
)
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_generation,
    verify_generation,
    verify_query_encoder,
)

BUILD_ANEW = "make a new one with `shardline build`"


def check_serving(config: ShardlineConfig, generation: int | None) -> int:
    """The number of the generation to serve; generation None: the live one.

    Raises:
        Unavailable: the store is served already, or its port cannot be listened on.
        NotFound: there is no such generation.
        CorruptFile, NewerFormat: its manifest or its query encoder cannot be used; the hint says
            what can be done.
    """
    store = Store(config.store.resolve())
    refuse_if_served(store)
    check_http_port(config)
    return servable_generation(store, generation)


def check_http_port(config: ShardlineConfig) -> None:
    """Raises Unavailable when this machine's HTTP port is taken, or closed to this user."""
    port = config.cluster.http_port
    if config.cluster.address == "local" and port and not port_is_free(port):
        raise Unavailable(
            f"port {port} is taken by another program",
            hint="stop what listens there, or choose another with `shardline serve --port "
            f"{port + 1 if port < 65_535 else port - 1}`",
        )


def servable_generation(store: Store, generation: int | None) -> int:
    """As ``check_serving`` without store and port. Shards' files are checked as they are loaded."""
    number = store.current() if generation is None else generation
    complete = store.generation_numbers()
    if number not in complete:
        raise NotFound(
            f"{store.root}: no generation {number}",
            expected=f"one of {', '.join(map(str, complete))}" if complete else None,
            hint=_another(complete) if generation is None else BUILD_ANEW,
        )
    folder = store.generation(number)
    try:
        manifest = read_generation(folder)
        if manifest.query_encoder:  # routers load the encoder without its manifest
            verify_query_encoder(folder, manifest)
    except (CorruptFile, NewerFormat) as error:
        raise with_way_back(error, store, number) from error
    return number


def find_damage(store: Store, number: int) -> ShardlineError | None:
    """What is wrong with the first damaged file of a generation, and what to do; None: nothing.

    Reads every byte of it.
    """
    try:
        _verified(store, number)
    except (CorruptFile, NewerFormat, NotFound) as error:
        return with_way_back(error, store, number)
    return None


def with_way_back(error: ShardlineError, store: Store, number: int) -> ShardlineError:
    """The error of a damaged generation with what can be served instead added to its hint.

    Reads the other generations, newest first, until one is whole.
    """
    whole = next(_whole(store, number), None)
    way = _another([] if whole is None else [whole])
    return type(error)(
        error.message,
        field=error.field,
        expected=error.expected,
        got=error.got,
        hint=f"{error.hint}; {way}" if error.hint else way,
    )


def _whole(store: Store, damaged: int) -> Iterator[int]:
    """The other generations whose every file is as it was written, newest first."""
    for number in reversed(store.generation_numbers()):
        if number != damaged:
            try:
                _verified(store, number)
            except (CorruptFile, NewerFormat, NotFound):
                continue
            yield number


def _verified(store: Store, number: int) -> GenerationManifest:
    folder = store.generation(number)
    manifest = read_generation(folder)
    verify_generation(folder, manifest)
    return manifest


def _another(usable: list[int]) -> str:
    """What to do: serve the newest usable generation, or build a new one."""
    if not usable:
        return BUILD_ANEW
    return f"{BUILD_ANEW}, or serve another: `shardline serve --generation {usable[-1]}`"
