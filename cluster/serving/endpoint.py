"""Where the cluster that serves a store can be reached: a note beside the store, without Ray.

The serving process in the foreground writes the note; ``status``, ``query`` and ``down`` read it.
"""

import logging
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from shardline.cluster.serving.serving_keys import client_key
from shardline.cluster.store import Store
from shardline.router.client.calls import DEFAULT_TIMEOUT_S
from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Scope
from shardline.shards.core import files
from shardline.shards.core.errors import CorruptFile, NotFound, Unavailable
from shardline.shards.core.small_files import MAX_STATE_BYTES, read_json

logger = logging.getLogger(__name__)

NOTE_NAME = "serving.json"
MAX_PID = 1 << 22  # Linux's own limit


@dataclass(frozen=True, slots=True)
class Address:
    """A cluster and the API key for requests to it; None if it requires none."""

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The headers that authenticate a request."""
        return () if self.key is None else (("Authorization", f"Bearer {self.key}"),)

    def client(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> Client:
        """timeout_s: of a call, its retries included."""
        return Client(self.url, key=self.key, timeout=timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a cluster answers, and the foreground process that serves it.

    ``started`` is that process's creation time in seconds: the pid may be reused by another later.
    ``key_file`` None: the cluster requires no key, or took its keys from the environment. ``host``:
    the name of the process's host, or container; "": not known, of a version that did not note it.
    """

    url: str
    generation: int
    pid: int
    started: float
    key_file: str | None = None
    host: str = ""

    @property
    def address(self) -> Address:
        """As ``address_for`` searches."""
        return self.address_for(Scope.SEARCH)

    def address_for(self, scope: Scope) -> Address:
        """The cluster with a key of its file. Raises NotFound, ConfigError: no usable key file."""
        key = None if self.key_file is None else client_key(Path(self.key_file), scope=scope)
        return Address(self.url, key)

    @property
    def is_elsewhere(self) -> bool:
        """Whether its process is on another host, so that nobody here can tell if it runs."""
        return self.host not in ("", platform.node())

    @property
    def is_alive(self) -> bool:
        return not self.is_elsewhere and is_alive(self.pid, self.started)


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
    """Removes this cluster's note, or a damaged one; the note of another cluster stays."""
    try:
        note = _read_note(store)
        # a publish may have changed the generation in it
        is_ours = note is not None and replace(note, generation=endpoint.generation) == endpoint
    except CorruptFile as error:
        logger.error("%s", error)
        is_ours = not (store.root / NOTE_NAME).is_dir()
    if is_ours:
        (store.root / NOTE_NAME).unlink(missing_ok=True)


def remove_own_note(store: Store) -> None:
    """Removes the note if this process has left it."""
    note = _read_note(store)
    if note is not None and note.pid == os.getpid():
        remove_note(store, note)


def refuse_if_served(store: Store) -> None:
    """Raises Unavailable when a cluster of this machine serves the store now.

    A damaged note does not keep anybody from serving; the port still does where it is taken.

    Raises:
        CorruptFile: a folder lies where the note is to be written.
    """
    note = serving_now(store)
    if note is not None:
        raise Unavailable(
            f"{store.root}: served already, generation {note.generation} at {note.url}",
            hint="stop it with `shardline down`, or ask it with `shardline query`",
        )
    path = store.root / NOTE_NAME
    if path.is_dir():
        raise CorruptFile(f"{path}: a folder, where a note is to be written", hint="remove it")


def serving_now(store: Store) -> Endpoint | None:
    """The cluster that serves the store from this machine, if one does; None for a damaged note,
    which is logged."""
    try:
        note = _read_note(store)
    except CorruptFile as error:
        logger.error("%s", error)
        return None
    return note if note is not None and note.is_alive else None


def find_endpoint(store: Store) -> Endpoint:
    """The cluster that serves this store from this machine.

    Raises:
        NotFound: none does, or the process that did is gone.
        CorruptFile: the note is damaged; the hint says how the cluster is found without it.
    """
    hint = (
        "start one with `shardline serve`, or name one with --url; one on a launched Ray is found "
        "with its configuration, -c"
    )
    note = _read_note(store)
    if note is None:
        raise NotFound(f"{store.root}: no cluster is serving this store", hint=hint)
    if note.is_elsewhere:
        raise NotFound(
            f"{store.root}: no cluster on this host is serving this store; one on host {note.host} "
            "was",
            hint=hint,
        )
    if not note.is_alive:
        raise NotFound(f"the cluster at {note.url} is gone (pid {note.pid})", hint=hint)
    return note


def noted_generation(store: Store) -> int | None:
    """What the cluster that serves this store from this machine serves; None: none does.

    Raises:
        CorruptFile: the note is damaged.
    """
    try:
        return find_endpoint(store).generation
    except NotFound:
        return None


def refuse_elsewhere(store: Store) -> None:
    """Raises Unavailable: a cluster on another host serves the store, or did when it was killed.
    CorruptFile: the note is damaged."""
    note = _read_note(store)
    if note is not None and note.is_elsewhere:
        raise Unavailable(
            f"{store.root}: whether the cluster on host {note.host} still serves this store cannot "
            "be seen from here",
            hint=f"do it on that host; if that cluster has ended, remove {store.root / NOTE_NAME}",
        )


def _read_note(store: Store) -> Endpoint | None:
    """None: there is no note. Raises CorruptFile: it is none of ours."""
    path = store.root / NOTE_NAME
    try:
        return _endpoint_of(read_json(path, MAX_STATE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, CorruptFile) as error:
        raise CorruptFile(
            f"{path}: not a note of ours",
            got=str(error),
            hint="`shardline serve` writes it anew; a cluster that runs is asked with --url and "
            "stopped by Ctrl-C or SIGTERM to its `shardline serve`",
        ) from error


def _endpoint_of(content: Any) -> Endpoint:
    """Raises TypeError, ValueError: not what ``leave_note`` writes."""
    if not isinstance(content, dict):
        raise TypeError(type(content).__name__)
    endpoint = Endpoint(**content)
    key_file = endpoint.key_file
    types = {
        "url": isinstance(endpoint.url, str),
        "generation": type(endpoint.generation) is int,
        "pid": type(endpoint.pid) is int and 0 < endpoint.pid <= MAX_PID,
        "started": type(endpoint.started) in (int, float),
        "key_file": key_file is None or (isinstance(key_file, str) and "\0" not in key_file),
        "host": isinstance(endpoint.host, str),
    }
    wrong = [name for name, is_right in types.items() if not is_right]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} of another type")
    parts = urlsplit(endpoint.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port:
        raise ValueError("url is none")
    return endpoint
