"""How other commands of the same user join the private Ray of a `shardline serve`: by a file in the
folder of its session, which nobody else may enter."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from shardline.cluster.preflight.folders import temporary_root
from shardline.cluster.serving.leftovers import SESSION_PREFIX
from shardline.shards.core.errors import CorruptFile, Unavailable
from shardline.shards.core.small_files import MAX_STATE_BYTES, read_json

NAME = "join.json"


@dataclass(frozen=True, slots=True)
class JoinNote:
    """address: HOST:PORT of Ray's head; token: what it asks for."""

    address: str
    token: str = field(repr=False)


def leave_join_note(session: Path, note: JoinNote) -> None:
    """Only this user may read it. Raises OSError: it cannot be written."""
    handle = os.open(session / NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump({"address": note.address, "token": note.token}, file)


def read_join_note(pid: int) -> JoinNote:
    """Of the session that the process owns.

    Raises:
        Unavailable: it has left none: it is of an older version, or another user's, or has another
            folder for temporary files.
    """
    for path in temporary_root().glob(f"{SESSION_PREFIX}{pid}-*/{NAME}"):
        try:
            found = read_json(path, MAX_STATE_BYTES)
            return JoinNote(str(found["address"]), str(found["token"]))
        except (CorruptFile, KeyError, TypeError) as error:
            raise Unavailable(f"{path}: damaged", hint="start `shardline serve` again") from error
    raise Unavailable(
        f"the cluster of process {pid} cannot be joined from here",
        expected=f"{NAME} in the folder of its session, below {temporary_root()}",
        hint="run the command as the user, and with the TMPDIR, of its `shardline serve`",
    )
