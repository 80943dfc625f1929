"""Who may ask what: the check that every request passes before anything else is done with it.

Reading and searching need the scope search, writing items and lists the scope write; whatever else
there is, or may be one day, needs admin, so a route that somebody forgets to list here is closed,
not open.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shardline.router.contract import Forbidden, Unauthenticated
from shardline.router.hanging import start
from shardline.router.http.api_keys import Keyring, Scope, read_keys
from shardline.shards.core.errors import NotFound, ShardlineError, Unavailable
from shardline.shards.core.messages import Absence

logger = logging.getLogger(__name__)

# probes and people without a key: neither says anything about the data
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
SEARCHES = frozenset({"/v1/search"})
LIST_WRITES = frozenset({"PUT", "POST", "DELETE"})
LIST_PREFIX = "/v1/lists/"
WRITES = frozenset({("PUT", "/v1/items"), ("DELETE", "/v1/items"), ("POST", "/v1/events")})
ADMIN_PREFIX = "/v1/admin"
# what a key of too small a scope is good for
MAY = {
    Scope.SEARCH: "search",
    Scope.WRITE: "search, and write items and lists",
    Scope.ADMIN: "do all",
}
HEADER = b"authorization"
SCHEME = b"bearer"
# how often a key file is looked at: the longest that a key taken out of it goes on working
RELOAD_S = 1.0
# How long one look may take before it counts as hanging, on a share that does not answer say. The
# look goes on; keys stay as they are until it ends, and none is good for a router that just starts.
KEY_FILE_TIMEOUT_S = 5.0
COMPLAIN_S = 60.0  # how often the log repeats that a look hangs


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthSettings:
    """What a router is started with: digests, never keys. ``keyring`` None asks for no key;
    ``key_file``, where there is one, is read again when it changes."""

    keyring: Keyring | None
    key_file: str | None = None


INSECURE = AuthSettings(keyring=None)


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the key file has found: ``seen`` identifies this state of the file."""

    seen: tuple[int, int, int]
    keyring: Keyring


def needed_scope(method: str, path: str) -> Scope | None:
    """The scope that a request needs; None for what is open to all."""
    if path in OPEN_PATHS:
        return None
    if path.startswith(ADMIN_PREFIX):
        return Scope.ADMIN
    if method in READING or (method == "POST" and path in SEARCHES):
        return Scope.SEARCH
    is_of_list = method in LIST_WRITES and path.startswith(LIST_PREFIX)
    return Scope.WRITE if is_of_list or (method, path) in WRITES else Scope.ADMIN


class Guard:
    """Lets requests in by their key. ``follow`` keeps its keys those of the file."""

    def __init__(self, settings: AuthSettings = INSECURE) -> None:
        self.keyring = settings.keyring
        self._path = None if settings.key_file is None else Path(settings.key_file)
        self._seen: tuple[int, int, int] | None = None
        self._complaint: ShardlineError | OSError | None = None
        self._looking: asyncio.Future[Look | ShardlineError | OSError | None] | None = None
        self._looking_since = self._complained_at = 0.0

    @property
    def warning(self) -> Absence | None:
        """Why the keys may not be those of their file; None: they are."""
        if self._looking is not None and (waited := self._waited()) > KEY_FILE_TIMEOUT_S:
            text = f"{self._path}: no answer for {waited:.0f} s; keys are as they were before"
            return Absence(Unavailable.code, text)
        if self._complaint is None:
            return None
        error = self._complaint
        code = error.code if isinstance(error, ShardlineError) else Unavailable.code
        return Absence(code, f"keys are as they were before: {error}")

    def check(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Returns for a request that may go on.

        Raises:
            Unauthenticated: it needs a key and has none, or none of ours.
            Forbidden: its key is not good for this.
        """
        if self.keyring is None:
            return
        needed = needed_scope(method, path)
        if needed is None:
            return
        scope = self.keyring.scope_of(_bearer_of(headers))
        if scope is None:
            raise Unauthenticated(
                "not one of this cluster's keys",
                field="Authorization",
                hint="see `shardline keys`, or ask who runs the cluster",
            )
        if not scope.covers(needed):
            raise Forbidden(
                f"this key may only {MAY[scope]}",
                scope=needed.value,
                field="Authorization",
                expected=f"a key of scope {needed.value}",
                got=f"scope {scope.value}",
            )

    async def begin(self) -> None:
        """Reads the key file before the first request, because a router that starts again later
        was given the digests of long ago. Where that fails, or takes longer than
        KEY_FILE_TIMEOUT_S, nobody gets in until it succeeds.
        """
        if self._path is None or self.keyring is None:
            return
        await self._look()
        if self._seen is None:
            logger.error("no key is good until the key file can be read")
            self.keyring = Keyring(())

    async def follow(self) -> None:
        """Looks at the key file for as long as the router lives; returns at once without one."""
        while self._path is not None and self.keyring is not None:
            await asyncio.sleep(RELOAD_S)
            try:
                await self._look()
            except Exception:  # or keys taken out of it would go on working for ever
                logger.exception("the key file was not looked at")

    def refresh(self) -> bool:
        """Takes over the file's keys if it has changed; whether it has.

        A file that is gone, is no file, that others may read or that does not parse leaves the keys
        as they were and is logged once; one without a key in it lets nobody in any more.
        """
        return self._take(self._read())

    async def _look(self) -> None:
        """``refresh`` in a thread; one at a time, because each that hangs would keep a thread."""
        loop = asyncio.get_running_loop()
        if self._looking is None:
            self._looking = start(self._read, "key file")
            self._looking_since = self._complained_at = loop.time()
        looking = self._looking
        await asyncio.wait([looking], timeout=KEY_FILE_TIMEOUT_S)
        if looking.done():
            self._looking = None
            self._take(looking.result())
        elif self._waited() > KEY_FILE_TIMEOUT_S and loop.time() >= self._complained_at:
            self._complained_at = loop.time() + COMPLAIN_S
            logger.error("%s", self.warning and self.warning.text)

    def _waited(self) -> float:
        """Seconds that the look under way has taken."""
        return asyncio.get_running_loop().time() - self._looking_since

    def _read(self) -> Look | ShardlineError | OSError | None:
        """What the file holds, or why it is of no use; None where it has not changed."""
        assert self._path is not None
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            if seen == self._seen:
                return None
            return Look(seen, Keyring.of(read_keys(self._path)))
        except FileNotFoundError:
            return NotFound(f"{self._path}: no such key file")
        except (ShardlineError, OSError) as error:
            return error

    def _take(self, found: Look | ShardlineError | OSError | None) -> bool:
        """In the event loop; whether the keys are those of a file that has changed."""
        if found is None:
            self._complaint = None
            return False
        if not isinstance(found, Look):
            if str(found) != str(self._complaint):
                logger.error("API keys stay as they were: %s", found)
            self._complaint = found
            return False
        self.keyring = found.keyring
        if self._seen is not None:
            logger.warning("API keys changed: %d are good now", len(self.keyring.digests))
        self._seen, self._complaint = found.seen, None
        return True


def _bearer_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key of an ``Authorization: Bearer <key>`` header.

    Raises:
        Unauthenticated: there is none, more than one, or of another scheme.
    """
    values = [value for name, value in headers if name == HEADER]
    if len(values) == 1:
        scheme, _, key = values[0].partition(b" ")
        if scheme.lower() == SCHEME and key.strip():
            return key.strip()
    raise Unauthenticated(
        "a key is needed",
        field="Authorization",
        expected="Bearer <key>",
        got="another scheme" if len(values) == 1 else f"{len(values) or 'no'} such headers",
        hint="see `shardline keys`, or ask who runs the cluster",
    )
