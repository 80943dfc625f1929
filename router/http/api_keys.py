"""API keys: what a key file holds, and the digests of it that a router compares with.

A line a key, ``scope:key``; blank lines and lines that begin with ``#`` are comments. Several keys
of a scope are all good at the same time, so that one can be replaced without a gap. Keys are long
and random, which is why a plain SHA-256 hides them and no salt or slow hash is needed. Nothing in
an error or a log repeats any part of a key.
"""

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from shardline.router.contract import KEY, MAX_KEY_CHARS, MIN_KEY_CHARS
from shardline.shards.core.errors import ConfigError, CorruptFile, DataError, NotFound
from shardline.shards.core.small_files import MAX_TEXT_BYTES, open_regular, read_open

FINGERPRINT_CHARS = 12
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Scope(StrEnum):
    """What a key is good for, each for all that those before it are: to search and read, to write
    items, to control."""

    SEARCH = "search"
    WRITE = "write"
    ADMIN = "admin"

    def covers(self, needed: "Scope") -> bool:
        """Whether a key of this scope is good for what needs the other."""
        scopes = list(Scope)
        return scopes.index(self) >= scopes.index(needed)


@dataclass(frozen=True, slots=True)
class Key:
    """A key as its holder knows it; ``secret`` shows in no repr."""

    scope: Scope
    secret: str = field(repr=False)

    @property
    def digest(self) -> bytes:
        return digest_of(self.secret.encode())

    @property
    def fingerprint(self) -> str:
        """A name for the key that gives nothing of it away: the beginning of its digest."""
        return self.digest.hex()[:FINGERPRINT_CHARS]


@dataclass(frozen=True, slots=True)
class Keyring:
    """(scope, SHA-256) of every key that is good now: all that leaves the process with the keys."""

    digests: tuple[tuple[Scope, bytes], ...]

    @classmethod
    def of(cls, keys: Iterable[Key]) -> "Keyring":
        return cls(tuple((key.scope, key.digest) for key in keys))

    def scope_of(self, secret: bytes) -> Scope | None:
        """The scope of the key presented; None for one that is not among ours.

        Every digest is compared, each in constant time, whether or not one has matched already.
        """
        presented = digest_of(secret)
        found: Scope | None = None
        for scope, digest in self.digests:
            if hmac.compare_digest(digest, presented):
                found = scope
        return found


def digest_of(secret: bytes) -> bytes:
    """SHA-256, 32 bytes."""
    return hashlib.sha256(secret).digest()


def parse_keys(lines: Sequence[str], source: str) -> list[Key]:
    """The keys of a file's lines, possibly none; ``source`` names it in errors.

    Raises:
        ConfigError: a line is not ``scope:key``, a key is too short or of other characters than a
            Bearer token has, or one comes twice. Says which line, and nothing of what is in it.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        scope, colon, secret = (part.strip() for part in text.partition(":"))
        if not colon or scope not in {each.value for each in Scope}:
            raise ConfigError(
                f"{source}: line {number} is not a key",
                expected=" or ".join(f"{each.value}:<key>" for each in Scope),
            )
        if not KEY.fullmatch(secret):
            raise ConfigError(
                f"{source}: the key in line {number} will not do",
                expected=f"{MIN_KEY_CHARS} to {MAX_KEY_CHARS} letters, digits or ._~+/-",
                got=f"{len(secret)} characters",
                hint="`shardline keys add` makes one",
            )
        if secret in keys:
            raise ConfigError(f"{source}: the key in line {number} is there already")
        keys[secret] = Key(Scope(scope), secret)
    return list(keys.values())


def read_keys(path: Path) -> list[Key]:
    """The keys of a file that nobody but its owner may read.

    Raises:
        NotFound: there is no such file. DataError: this user may not read it, or the disk cannot.
        ConfigError: it is no regular file or a large one, others may read or write it, it is not
            text, or as ``parse_keys``.
    """
    try:
        with open_regular(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & OTHERS:
                raise ConfigError(
                    f"{path}: others than its owner may use it",
                    expected="mode 600",
                    got=f"mode {mode:o}",
                    hint=f"chmod 600 {path}; if others have read it, replace the keys too",
                )
            text = read_open(file, path, MAX_TEXT_BYTES).decode("ascii")
    except CorruptFile as error:
        raise ConfigError(
            error.message, expected=error.expected or "a key file", got=error.got
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no such key file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a key file", expected="ASCII text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read", got=error.strerror) from error
    return parse_keys(text.splitlines(), str(path))
