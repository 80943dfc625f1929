"""A note in the store of what is loaded beside the live generation, and of the newest publish.

A restarted controller goes on from it; ``gc`` and ``generations delete`` leave alone what it names.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardline.cluster.control.fleet_state import Role
from shardline.cluster.control.publish_state import Noted, PublishProgress
from shardline.cluster.store import Store, unguarded
from shardline.shards.core import files
from shardline.shards.core.errors import CorruptFile, ShardlineError
from shardline.shards.core.small_files import MAX_STATE_BYTES, read_json

logger = logging.getLogger(__name__)

NAME = "publish.json"
FORMAT = 1


class PublishNote:
    """Of one cluster; what another has left there is of no meaning to it."""

    def __init__(self, root: Path, cluster_id: str, guard: Callable[[], None] = unguarded) -> None:
        """guard: as of ``Store.raise_counter``."""
        self._store = Store(root)
        self._path = root / NAME
        self._guard = guard
        self._cluster_id = cluster_id
        self.is_outdated = False  # there is one that says nothing of this cluster

    def read(self) -> Noted | None:
        """None: there is none of this cluster. One that cannot be read is logged, and counts as
        none: what is beside the live generation is ended then."""
        try:
            found = read_json(self._path, MAX_STATE_BYTES)
            if found["cluster_id"] == self._cluster_id:
                return _noted(found)
        except FileNotFoundError:
            return None
        except (ShardlineError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            logger.error("nothing is known of a publish: %s: %s", self._path, error)
        self.is_outdated = True
        return None

    def keep(self, noted: Noted) -> None:
        """Writes it. Raises OSError: it cannot be written. Superseded: as of the guard."""
        publish = None if noted.publish is None else noted.publish.as_json()
        said = asdict(noted) | {"publish": publish}
        with self._store.lock():
            self._guard()
            files.write_json(self._path, {"format": FORMAT, "cluster_id": self._cluster_id} | said)


@dataclass(frozen=True, slots=True, kw_only=True)
class InUse:
    """What a cluster of the store has loaded, or had when it ended: ``beside`` the generation
    ``live``, both None where it has one alone. coming: what is being published."""

    live: int | None = None
    beside: int | None = None
    coming: int | None = None


def in_use_in(root: Path) -> InUse:
    """As the note of the newest cluster of this store says; empty where there is none.

    ``live`` may not be what CURRENT names: a switch changes that first, then the note.

    Raises:
        CorruptFile: there is a note that cannot be read. OSError: as of any file.
    """
    path = root / NAME
    try:
        found = read_json(path, MAX_STATE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return InUse()
    try:
        beside, publish = found["beside"], found.get("publish")
        is_under_way = publish is not None and not publish["is_over"]
        in_use = InUse(
            live=None if beside is None else found["live"],
            beside=beside,
            coming=publish["generation"] if is_under_way else None,
        )
        for number in (in_use.live, in_use.beside, in_use.coming):
            if number is not None and type(number) is not int:
                raise TypeError(f"{number!r} instead of a generation")
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            f"{path}: not a note of ours",
            got=str(error),
            hint="remove it if no cluster serves this store",
        ) from error
    return in_use


def told_in(root: Path) -> dict[str, Any] | None:
    """``Noted`` as JSON, as the newest cluster of this store has left it, for people to read; None:
    there is none, or it cannot be read."""
    try:
        found = read_json(root / NAME, MAX_STATE_BYTES)
    except (OSError, ShardlineError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _noted(found: dict[str, Any]) -> Noted:
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']!r} instead of {FORMAT}")
    beside, publish, before = found["beside"], found["publish"], found["before"]
    return Noted(
        live=int(found["live"]),
        beside=None if beside is None else int(beside),
        role=Role(found["role"]),
        is_mirrored=found["is_mirrored"] is True,
        since_s=float(found["since_s"]),
        publish=None if publish is None else PublishProgress.from_json(publish),
        before=None if before is None else int(before),
    )
