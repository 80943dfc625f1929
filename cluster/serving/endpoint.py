"""Where the cluster that serves a store can be reached: a note beside the store, without Ray.

The serving process in the foreground writes the note; ``status``, ``query`` and ``down`` read it.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from shardline.cluster.serving.serving_keys import client_key
from shardline.cluster.store import Store
from shardline.router.client.sync_client import Client
from shardline.shards.core import files
from shardline.shards.core.errors import CorruptFile, NotFound, Unavailable

NOTE_NAME = "serving.json"


@dataclass(frozen=True, slots=True)
class Address:
    """A cluster and the API key for requests to it; None if it requires none."""

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The headers that authenticate a request."""
        return () if self.key is None else (("Authorization", f"Bearer {self.key}"),)

    def client(self) -> Client:
        return Client(self.url, key=self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a cluster answers, and the foreground process that serves it.

    ``started`` is that process's creation time in seconds: the pid may be reused by another later.
    ``key_file`` None: the cluster requires no key, or took its keys from the environment.
    """

    url: str
    generation: int
    pid: int
    started: float
    key_file: str | None = None

    @property
    def address(self) -> Address:
        """The cluster with a key of its file. Raises NotFound, ConfigError: no usable key file."""
        key = None if self.key_file is None else client_key(Path(self.key_file))
        return Address(self.url, key)

    @property
    def is_alive(self) -> bool:
        return is_alive(self.pid, self.started)


def is_alive(pid: int, started: float | None = None) -> bool:
    """Whether the process of the note still runs; a zombie counts as ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False


def leave_note(store: Store, endpoint: Endpoint) -> None:
    """Writes where the store is served from now on."""
    files.write_json(store.root / NOTE_NAME, asdict(endpoint))


def remove_note(store: Store, endpoint: Endpoint) -> None:
    """Removes this cluster's note; the note of another cluster stays."""
    if _read_note(store) == endpoint:
        (store.root / NOTE_NAME).unlink(missing_ok=True)


def remove_own_note(store: Store) -> None:
    """Removes the note if this process has left it."""
    note = _read_note(store)
    if note is not None and note.pid == os.getpid():
        remove_note(store, note)


def refuse_if_served(store: Store) -> None:
    """Raises Unavailable when a cluster of this machine serves the store now."""
    note = serving_now(store)
    if note is not None:
        raise Unavailable(
            f"{store.root}: served already, generation {note.generation} at {note.url}",
            hint="stop it with `shardline down`, or ask it with `shardline query`",
        )


def serving_now(store: Store) -> Endpoint | None:
    """The cluster that serves the store from this machine, if one does."""
    note = _read_note(store)
    return note if note is not None and note.is_alive else None


def find_endpoint(store: Store) -> Endpoint:
    """The cluster that serves this store from this machine.

    Raises:
        NotFound: none does, or the process that did is gone.
    """
    hint = "start one with `shardline serve`, or name one with --url"
    note = _read_note(store)
    if note is None:
        raise NotFound(f"{store.root}: no cluster is serving this store", hint=hint)
    if not note.is_alive:
        raise NotFound(f"the cluster at {note.url} is gone (pid {note.pid})", hint=hint)
    return note


def _read_note(store: Store) -> Endpoint | None:
    try:
        return Endpoint(**json.loads((store.root / NOTE_NAME).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CorruptFile(f"{store.root / NOTE_NAME}: not a note of ours; remove it") from error
