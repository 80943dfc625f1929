"""Where API keys come from: a file beside the store, made when there is none, or the environment.

The serving process reads the keys; routers get only their digests and the name of the file.
Commands on this machine find the file through the note in the store.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.http_address import host_and_port
from shardline.router.http.api_keys import Key, Keyring, Scope, parse_keys, read_keys
from shardline.router.http.auth import INSECURE, AuthSettings
from shardline.shards.core.errors import ConfigError, NotFound
from shardline.shards.core.files import fsync_folder
from shardline.shards.core.small_files import MAX_TEXT_BYTES, read_small

KEY_FILE_NAME = "keys"
SERVER_VARIABLE = "SHARDLINE_KEYS"
CLIENT_VARIABLE = "SHARDLINE_API_KEY"
KEY_VARIABLES = (SERVER_VARIABLE, CLIENT_VARIABLE)
KEY_BYTES = 32
HEAD = """\
# The API keys of this store's cluster, one per line: scope:key. Nobody else may read this file.
# search: may search and read. write: may also write items. admin: may do all. Changes apply within
# seconds.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingKeys:
    """The keys a cluster is started with; ``own`` is the key for requests of the serving process,
    ``note`` a line that says where the keys are."""

    auth: AuthSettings
    own: str | None = field(repr=False)
    note: str


def key_file_of(config: ShardlineConfig) -> Path:
    """The key file of a cluster that takes its keys from a file, existing or to come."""
    return (config.cluster.key_file or config.store / KEY_FILE_NAME).resolve()


def serving_keys(
    config: ShardlineConfig, environ: MutableMapping[str, str] = os.environ
) -> ServingKeys:
    """The keys to serve with. Makes the store's key file if there are no others.

    Keys are taken out of the environment, so that no process started from here inherits them.

    Raises:
        ConfigError: keys from two places, a file that others may read, a line that is no key, or
            no key at all.
        NotFound: the key file of the configuration does not exist.
    """
    listed = environ.pop(SERVER_VARIABLE, None)
    configured = config.cluster.key_file
    given = {
        "cluster.insecure": config.cluster.insecure,
        "cluster.key_file": configured is not None,
        SERVER_VARIABLE: listed is not None,
    }
    sources = [name for name, is_given in given.items() if is_given]
    if len(sources) > 1:
        raise ConfigError("API keys from one place only", got=" and ".join(sources))
    if config.cluster.insecure:
        where = host_and_port(config.cluster.http_host, config.cluster.http_port)
        note = f"INSECURE: no API key is asked for; whoever reaches {where} may search"
        return ServingKeys(auth=INSECURE, own=None, note=note)
    if listed is not None:
        keys = parse_keys(re.split(r"[,\s]+", listed), SERVER_VARIABLE)
        return _serve_with(keys, SERVER_VARIABLE, None, f"API keys: {len(keys)} of the environment")
    path = key_file_of(config)
    note = f"API keys: {path}"
    if configured is None and not path.exists():
        make_key_file(path)
        note = f"API keys: made {path}, mode 600; `shardline keys show` prints one"
    return _serve_with(read_keys(path), str(path), path, note)


def _serve_with(keys: list[Key], source: str, path: Path | None, note: str) -> ServingKeys:
    if not keys:
        raise ConfigError(
            f"{source}: no key in it",
            hint="`shardline keys add` makes one; --insecure serves without",
        )
    key_file = None if path is None else str(path)
    auth = AuthSettings(keyring=Keyring.of(keys), key_file=key_file)
    return ServingKeys(auth=auth, own=key_for(keys), note=note)


def key_for(keys: list[Key], scope: Scope = Scope.SEARCH) -> str | None:
    """The first of those keys that are good for the scope and the least beyond it; else of all."""
    scopes = list(Scope)
    chosen = sorted(keys, key=lambda k: (not k.scope.covers(scope), scopes.index(k.scope)))
    return chosen[0].secret if chosen else None


def client_key(
    key_file: Path | None,
    environ: Mapping[str, str] = os.environ,
    *,
    scope: Scope = Scope.SEARCH,
) -> str | None:
    """The key that the user of a command named, for ``scope``: from a file, else from the
    environment.

    Raises:
        NotFound, ConfigError: the file is not there, is not safe, or has no key.
    """
    if key_file is None:
        return environ.get(CLIENT_VARIABLE, "").strip() or None
    key = key_for(read_keys(key_file), scope)
    if key is None:
        raise ConfigError(f"{key_file}: no key in it")
    return key


def new_key(scope: Scope) -> Key:
    return Key(scope, secrets.token_urlsafe(KEY_BYTES))


def make_key_file(path: Path) -> None:
    """A file with a key of each scope, mode 600."""
    _write(path, HEAD + "".join(f"{scope.value}:{new_key(scope).secret}\n" for scope in Scope))


def add_key(path: Path, scope: Scope) -> Key:
    """A new key in the file, which is made if it is not there. Raises as ``read_keys``."""
    key = new_key(scope)
    text = HEAD
    if path.exists():
        read_keys(path)
        text = read_small(path, MAX_TEXT_BYTES).decode("ascii")
    _write(path, f"{text.rstrip()}\n{key.scope.value}:{key.secret}\n")
    return key


def remove_key(path: Path, fingerprint: str) -> None:
    """Removes the one key whose fingerprint starts with the text; other lines stay as they are.

    Raises:
        NotFound: no key has that fingerprint, or several have. As ``read_keys``.
    """
    chosen = [key for key in read_keys(path) if key.fingerprint.startswith(fingerprint)]
    if len(chosen) != 1 or not fingerprint:
        raise NotFound(
            "not the fingerprint of one key",
            got=f"{len(chosen)} keys" if fingerprint else "nothing",
            hint="`shardline keys list` prints them",
        )
    lines = read_small(path, MAX_TEXT_BYTES).decode("ascii").splitlines()
    kept = [line for line in lines if chosen[0] not in parse_keys([line], str(path))]
    _write(path, "".join(f"{line}\n" for line in kept))


def _write(path: Path, text: str) -> None:
    """Replaces the file atomically; other users can read it at no moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
