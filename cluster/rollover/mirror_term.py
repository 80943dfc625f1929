"""Which mirror may write to a generation, or be followed from it: the one that was opened last.

Ray may start a mirror again while its process only pauses. That one may still send the round that
it has noted, which its successor sends again as it was; but it must note no other, for that would
bring older versions over newer ones. So each opening leaves a name of its own beside the notes of
both generations, and a note is written under the store's lock, by the mirror whose name is there.

    <store>/live/<generation>/mirror.json    {"format": 1, "newest": name}
"""

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shardline.cluster.rollover.replayed_note import Replayed, write_note
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.small_files import MAX_STATE_BYTES, read_json

logger = logging.getLogger(__name__)

NAME = "mirror.json"
FORMAT = 1


class MirrorReplaced(Unavailable):
    """This mirror sends nothing any more: another one was opened after it."""

    code = "replaced"


class MirrorTerm:
    """Of one opening of a mirror between two generations, in either direction."""

    def __init__(self, store: Store, generations: Sequence[int]) -> None:
        """Ends that of every mirror that was opened on one of the generations before.

        Raises:
            OSError: the store takes no file.
        """
        self._store = store
        self._name = secrets.token_hex(8)
        with store.lock():
            for generation in generations:
                live = store.writes(generation)
                live.mkdir(parents=True, exist_ok=True)
                files.write_json(live / NAME, {"format": FORMAT, "newest": self._name})

    def write_note(self, live: Path, replayed: Replayed) -> None:
        """As ``replayed_note.write_note``, in the folder of one of the generations.

        Raises:
            MirrorReplaced: another mirror was opened on it later. OSError.
        """
        with self._checked(live):
            write_note(live, replayed)

    @contextmanager
    def _checked(self, live: Path) -> Iterator[None]:
        with self._store.lock():
            if _newest_in(live / NAME) not in (None, self._name):
                raise MirrorReplaced(
                    "this mirror brings nothing over any more",
                    got="another one was opened in its place",
                )
            yield


def _newest_in(path: Path) -> str | None:
    """None where nobody's name can be read: the next mirror writes the file anew."""
    try:
        return str(read_json(path, MAX_STATE_BYTES)["newest"])
    except FileNotFoundError:
        return None
    except (ShardlineError, KeyError, TypeError) as error:
        logger.error("%s does not say which mirror is the newest: %s", path, error)
        return None
