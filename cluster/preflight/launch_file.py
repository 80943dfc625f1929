"""What a launcher file for `ray up` says of the hosts: where they are, and how they are reached."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shardline.shards.core.errors import ConfigError, CorruptFile, NotFound
from shardline.shards.core.small_files import MAX_TEXT_BYTES, read_small

RAY_PORT = 6379
TOKEN_PLACE = ".ray/auth_token"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFile:
    """hosts: addresses, the head first. key: of ssh, None for its own choice. ray_port: the head's.
    brings_token: whether `ray up` copies Ray's token to the hosts."""

    path: Path
    hosts: tuple[str, ...]
    user: str
    key: Path | None
    ray_port: int
    brings_token: bool

    @property
    def head(self) -> str:
        return self.hosts[0]


def read_launch_file(path: Path) -> LaunchFile:
    """
    Raises:
        NotFound: there is no such file.
        ConfigError: it is not a launcher file with hosts of one's own.
    """
    content = _mapping(_load(path), path, "the file")
    provider = _mapping(content.get("provider"), path, "provider")
    kind = provider.get("type")
    if kind != "local":
        raise ConfigError(
            f"{path}: its hosts do not exist before `ray up`, so there is nothing to check",
            field="provider.type",
            expected='"local", with head_ip and worker_ips',
            got=repr(kind),
        )
    auth = _mapping(content.get("auth"), path, "auth")
    workers = provider.get("worker_ips", [])
    hosts = [provider.get("head_ip"), *(workers if isinstance(workers, list) else [workers])]
    for host in hosts:
        if not isinstance(host, str) or not host or host.startswith("-"):
            raise ConfigError(f"{path}: not an address of a host", field="provider", got=repr(host))
    if twice := {host for host in hosts if hosts.count(host) > 1}:
        raise ConfigError(f"{path}: a host twice", field="provider", got=", ".join(sorted(twice)))
    key = auth.get("ssh_private_key")
    return LaunchFile(
        path=path,
        hosts=tuple(hosts),
        user=_text(auth.get("ssh_user"), path, "auth.ssh_user"),
        key=None if key is None else Path(_text(key, path, "auth.ssh_private_key")).expanduser(),
        ray_port=_ray_port(content),
        brings_token=any(TOKEN_PLACE in str(place) for place in content.get("file_mounts") or ()),
    )


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(read_small(path, MAX_TEXT_BYTES).decode())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no such launcher file") from error
    except CorruptFile as error:
        raise ConfigError(error.message, expected=error.expected, got=error.got) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML", got=" ".join(str(error).split())) from error


def _mapping(value: Any, path: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: not a launcher file: {name} is no mapping", got=type(value).__name__
        )
    return value


def _text(value: Any, path: Path, name: str) -> str:
    if not isinstance(value, str) or not value or value.startswith("-"):
        raise ConfigError(f"{path}: missing or not text", field=name, got=repr(value))
    return value


def _ray_port(content: dict[str, Any]) -> int:
    """The port that the head's `ray start` is given."""
    lines = " ".join(map(str, content.get("head_start_ray_commands") or ()))
    found = re.search(r"--port[= ](\d+)", lines)
    return int(found[1]) if found else RAY_PORT
