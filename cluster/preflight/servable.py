"""Whether a generation can be served: it exists, and its files are as they were written.

If it is damaged, the error names another that can be served.
"""

from collections.abc import Iterator

from shardline.cluster.store import Store
from shardline.shards.core.errors import (
    CorruptFile,
    NewerFormat,
    NotFound,
    ShardlineError,
)
from shardline.shards.storage.generation import (
    GenerationManifest,
    read_generation,
    verify_generation,
    verify_item_encoder,
    verify_query_encoder,
)

BUILD_ANEW = "make a new one with `shardline build`"


def servable_generation(store: Store, generation: int | None) -> int:
    """The number of the generation to serve; generation None: the live one.

    Shards' files are checked as they are loaded.

    Raises:
        NotFound: there is no such generation.
        CorruptFile, NewerFormat: its manifest or an encoder cannot be used; the hint says
            what can be done.
    """
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
        # routers load encoders without the manifest
        if manifest.query_encoder:
            verify_query_encoder(folder, manifest)
        if manifest.item_encoder:
            verify_item_encoder(folder, manifest)
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
