"""Reaches the controller of the cluster that serves a store, private or launched, for a command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.serving.endpoint import leave_note, serving_now
from shardline.cluster.serving.join_note import read_join_note
from shardline.cluster.serving.joining import TOKEN_VARIABLE
from shardline.cluster.serving.launched import Report, ask_controller, is_served
from shardline.cluster.serving.ray_session import attached_ray
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput


@contextmanager
def reached(config: ShardlineConfig, *, verbose: bool = False) -> Iterator[Report | None]:
    """The controller's report, while this process is part of the cluster's Ray; None: no cluster
    serves the store.

    Raises:
        ConfigError, Unavailable: as ``attached_ray``; the controller does not answer.
        InvalidInput: the cluster there serves another store.
    """
    store, address = Store(config.store.resolve()), config.cluster.address
    if address == "local":
        endpoint = serving_now(store)
        if endpoint is None:
            yield None
            return
        note = read_join_note(endpoint.pid)
        os.environ[TOKEN_VARIABLE] = note.token
        address = note.address
    with attached_ray(address, verbose=verbose):
        if not is_served():
            yield None
            return
        report = ask_controller().report
        if report["store"] != str(store.root):
            raise InvalidInput(
                "the cluster there serves another store",
                expected=str(store.root),
                got=report["store"],
            )
        yield report


def note_served(store: Store, generation: int) -> None:
    """Has the note beside the store name what the private cluster serves now; nothing for a
    launched one."""
    endpoint = serving_now(store)
    if endpoint is not None:
        leave_note(store, replace(endpoint, generation=generation))
