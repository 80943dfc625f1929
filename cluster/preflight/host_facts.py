"""What one host of a launched cluster says of itself, found by a task that runs there."""

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import shardline
from shardline.cluster.preflight.folders import Folder, look_at
from shardline.cluster.preflight.free_memory import FreeMemory, free_memory
from shardline.cluster.preflight.network import port_is_free
from shardline.cluster.preflight.open_files import hard_limit
from shardline.cluster.store import Store
from shardline.shards.core.errors import ShardlineError
from shardline.shards.storage.generation import read_generation

MANIFEST_NAME = "_manifest.json"
DIGEST_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a host is asked. probe: a file that whoever asks has just written into the store, None
    where it could not be written.

    generation None: there is none yet. port None: it is known to be in use, and by whom.
    """

    store: str
    generation: int | None
    probe: str | None
    http_host: str
    port: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """One host. address: by which Ray knows it; clock_s: its wall clock, seconds since 1970.

    ray, shardline: versions, None where they are not installed; code: a digest of our sources.
    sees_probe: whether its store is the one of who asked, None where there was nothing to see;
    store_error: why it cannot tell. manifest: the SHA-256 of the generation's; manifest_error: why
    it cannot be read there. port_error: why it cannot listen.
    """

    address: str
    name: str
    python: str
    ray: str | None
    shardline: str | None
    code: str | None
    cores: int
    memory: FreeMemory
    open_files: int
    store: Folder
    sees_probe: bool | None
    store_error: str | None
    manifest: str | None
    manifest_error: str | None
    port_error: str | None
    clock_s: float


def host_facts(address: str, question: Question) -> HostFacts:
    """Of the host that this runs on. Reads the store and writes a small file into it."""
    store = Store(Path(question.store))
    manifest, manifest_error = _manifest(store, question.generation)
    sees_probe, store_error = _probe(store.root, question.probe)
    return HostFacts(
        address=address,
        name=socket.gethostname(),
        python=platform.python_version(),
        ray=version_of("ray"),
        shardline=version_of("shardline"),
        code=code_digest(),
        cores=len(os.sched_getaffinity(0)),
        memory=free_memory(),
        open_files=hard_limit(),
        store=look_at(store.root),
        sees_probe=sees_probe,
        store_error=store_error,
        manifest=manifest,
        manifest_error=manifest_error,
        port_error=_port_error(question),
        clock_s=time.time(),
    )


def version_of(package: str) -> str | None:
    """None: it is not installed as a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """Of all our modules: versions say nothing about a checkout that was changed."""
    digest = hashlib.sha256()
    root = Path(shardline.__file__).parent
    for folder in sorted(each for each in root.iterdir() if each.is_dir()):
        for path in sorted(folder.resolve().rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:DIGEST_DIGITS]


def _probe(root: Path, name: str | None) -> tuple[bool | None, str | None]:
    if name is None:
        return None, None
    try:
        return (root / name).exists(), None
    except OSError as error:  # a stale mount, or one that this user may not read
        return None, str(error)


def _manifest(store: Store, generation: int | None) -> tuple[str | None, str | None]:
    if generation is None:
        return None, None
    folder = store.generation(generation)
    try:
        read_generation(folder)  # compares it with its own checksum
        return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest(), None
    except (ShardlineError, OSError) as error:
        return None, str(error)


def _port_error(question: Question) -> str | None:
    if question.port is None:
        return None
    try:
        is_free = port_is_free(question.port, question.http_host)
    except ShardlineError as error:
        return str(error)
    return None if is_free else f"port {question.port} is taken by another program"
