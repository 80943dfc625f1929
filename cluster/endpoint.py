"""Where the cluster that serves a store can be reached: a note beside the store, without Ray.

The process that serves in the foreground leaves it; ``status``, ``query`` and ``down`` read it.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from cluster.store import Store
from shards import files
from shards.errors import NotFound

NOTE_NAME = "serving.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a cluster answers, and the process in whose foreground it runs (0: detached)."""

    url: str
    generation: int
    pid: int


def leave_note(store: Store, endpoint: Endpoint) -> None:
    """Says where the store is being served from now on."""
    files.write_json(store.root / NOTE_NAME, asdict(endpoint))


def remove_note(store: Store) -> None:
    """Nobody serves the store any more."""
    (store.root / NOTE_NAME).unlink(missing_ok=True)


def find_endpoint(store: Store) -> Endpoint:
    """The cluster that serves this store from this machine.

    Raises:
        NotFound: none does, or the process that did is gone.
    """
    path = store.root / NOTE_NAME
    hint = "start one with `shardline serve`, or name one with --url"
    if not path.is_file():
        raise NotFound(f"{store.root}: no cluster is serving this store", hint=hint)
    note: dict[str, Any] = json.loads(path.read_bytes())
    endpoint = Endpoint(**note)
    if endpoint.pid and not psutil.pid_exists(endpoint.pid):
        raise NotFound(f"the cluster at {endpoint.url} is gone (pid {endpoint.pid})", hint=hint)
    return endpoint
