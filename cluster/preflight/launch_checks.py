"""Judges what the hosts of a launcher file have, before `ray up`: pure checks of their answers."""

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from shardline.cluster.http_address import EVERYWHERE, LOOPBACK
from shardline.cluster.preflight.check import Check, failed, passed, warned
from shardline.cluster.preflight.folders import Folder, check_writable
from shardline.cluster.preflight.host_checks import check_clock
from shardline.cluster.preflight.launch_file import LaunchFile
from shardline.cluster.preflight.launch_hosts import NoAnswer, ProbeAnswer
from shardline.shards.core.errors import ConfigError, DataError, Unavailable

OLDEST_PYTHON = (3, 11)
DIGEST_DIGITS = 16
# port -> who listens there, on a host that serves
PORTS = {
    8404: "HAProxy's statistics",
    8500: "Serve's fallback proxy",
}
HEAD_PORTS = {8265: "Ray's dashboard and job server", 10001: "Ray's client server"}
LOOPBACK_PORTS = (8265,)
RAYS = {"raylet", "gcs_server"}


@dataclass(frozen=True, slots=True)
class Token:
    """Ray's token on this machine. mode: of the file's permissions; digest: as a host says it."""

    mode: int
    digest: str


def read_token(path: Path) -> Token | None:
    """None: there is no such file."""
    try:
        content, mode = path.read_bytes().strip(), stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None
    return Token(mode, sha256(content).hexdigest()[:DIGEST_DIGITS])


def ports_of(
    launch: LaunchFile, http_host: str, http_port: int
) -> dict[str, list[tuple[str, int]]]:
    """What each host is going to listen on, by its address."""
    everywhere = EVERYWHERE[0]
    every = [(http_host, http_port), *((everywhere, port) for port in PORTS)]
    head = [(LOOPBACK if port in LOOPBACK_PORTS else everywhere, port) for port in HEAD_PORTS]
    return {
        host: [*every, (everywhere, launch.ray_port), *head] if host == launch.head else every
        for host in launch.hosts
    }


def check_own_token(token: Token | None, path: Path, *, brings_token: bool) -> Check:
    """Of this machine, from where `ray up` copies the token."""
    name = "token here"
    if not brings_token:
        return passed(name, f"not brought by the launcher file; each host has its own {path.name}")
    if token is None:
        error = Unavailable(
            f"{path}: no token for Ray on this machine, where `ray up` copies it from",
            hint="`(umask 077; ray get-auth-token --generate > /dev/null)` makes one",
        )
        return failed(name, error)
    if token.mode & 0o077:
        return failed(name, _open_token(str(path), f"{token.mode:o}"))
    return passed(name, f"{path}, mode {token.mode:o}")


def check_answer(
    answer: NoAnswer | ProbeAnswer, launch: LaunchFile, own: Token | None, store: Path
) -> Iterator[Check]:
    """All checks of one host, in the order in which `ray up` would need them."""
    if isinstance(answer, NoAnswer):
        yield _no_answer(answer, launch)
        return
    content = answer.content
    yield passed("ssh", f"{launch.user}@{answer.address} is {content['name']}")
    yield _python(content["python"], has_venv=content["venv"])
    yield _rsync(content["rsync"])
    yield _ray(content["ray"])
    yield _token(content["token"], own, launch)
    yield _ports(content["ports"], content["rays"])
    yield _names(content["name"], content["resolved"])
    yield _reach(content["reach"])
    yield from _store(content["store"], store, is_writer=answer.is_writer)
    yield check_clock(content["clock"], answer.asked_s, answer.answered_s)


def _no_answer(answer: NoAnswer, launch: LaunchFile) -> Check:
    if answer.step == "ssh":
        key = "" if launch.key is None else f" -i {launch.key}"
        hint = f"try `ssh{key} {launch.user}@{answer.address}`"
    else:
        hint = "install Python 3.11 or newer there, as python3"
    error = Unavailable(f"{answer.step} does not work", got=answer.reason, hint=hint)
    return failed(answer.step, error)


def _python(version: str, *, has_venv: bool) -> Check:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if numbers < OLDEST_PYTHON:
        error = Unavailable(
            "too old a python3", expected=f"{oldest} or newer", got=version, hint="install it there"
        )
        return failed("python3", error)
    if not has_venv:
        error = Unavailable(
            f"python3 {version} cannot make environments",
            expected="its module venv",
            hint="install python3-venv there",
        )
        return failed("python3", error)
    return passed("python3", version)


def _rsync(path: str | None) -> Check:
    if path is None:
        error = Unavailable("no rsync, with which `ray up` copies files", hint="install it there")
        return failed("rsync", error)
    return passed("rsync", path)


def _ray(version: str | None) -> Check:
    return passed("ray", version or "not installed yet: `ray up` does it")


def _token(found: dict[str, str] | None, own: Token | None, launch: LaunchFile) -> Check:
    name = "token"
    if found is None:
        if launch.brings_token:
            return passed(name, "not there yet: `ray up` brings it")
        error = Unavailable(
            "no token for Ray", hint="copy ~/.ray/auth_token there, or name it in file_mounts"
        )
        return failed(name, error)
    if int(found["mode"], 8) & 0o077:
        return failed(name, _open_token("~/.ray/auth_token", found["mode"]))
    if own is not None and found["digest"] != own.digest:
        if launch.brings_token:
            return warned(name, "another one than here: `ray up` replaces it")
        error = Unavailable("another token than here", hint="copy ~/.ray/auth_token there")
        return failed(name, error)
    return passed(name, f"the same as here, mode {found['mode']}")


def _open_token(path: str, mode: str) -> ConfigError:
    return ConfigError(
        f"{path}: others may read the token, which opens Ray to them",
        expected="mode 600",
        got=f"mode {mode}",
        hint=f"chmod 600 {path}",
    )


def _ports(ports: dict[str, str | None], rays: Sequence[str]) -> Check:
    """Ray's own ports are freed by `ray up`, which ends Ray first where it runs already."""
    name = "ports"
    taken = {place: reason for place, reason in ports.items() if reason is not None}
    if not taken:
        return passed(name, ", ".join(place.rpartition(":")[2] for place in ports) + " free")
    text = ", ".join(f"{place} {reason}" for place, reason in taken.items())
    if RAYS & set(rays):
        return warned(name, f"{text}: Ray runs there already, and `ray up` restarts it")
    orphan = " (HAProxy runs there, and outlives the Ray that started it)" if rays else ""
    error = Unavailable(
        "a port of the cluster is not free", got=text + orphan, hint="end what listens there"
    )
    return failed(name, error)


def _names(name: str, resolved: str | None) -> Check:
    if resolved is None or resolved.startswith("127."):
        found = "nothing" if resolved is None else resolved
        return warned(
            "names",
            f"its own name {name} resolves to {found}: Ray and training use addresses instead",
        )
    return passed("names", f"{name} is {resolved}")


def _reach(reached: dict[str, str | None]) -> Check:
    """Every port is open between the hosts of a cluster; that of ssh stands for them."""
    lost = {place: reason for place, reason in reached.items() if reason is not None}
    if lost:
        error = Unavailable(
            "it does not reach other hosts",
            expected="every port open between the hosts",
            got=", ".join(f"{place}: {reason}" for place, reason in lost.items()),
            hint="let them reach each other; shards and Ray listen on ports of their own choice",
        )
        return failed("network", error)
    return passed("network", f"reaches {len(reached)} other hosts")


def _store(found: dict[str, Any], path: Path, *, is_writer: bool) -> Iterator[Check]:
    if not found["exists"]:
        error = DataError(
            f"{path}: no such folder",
            expected="the folder of `store`, on every host",
            hint="mount the shared file system there",
        )
        yield failed("store", error)
        return
    refusal = None if found["errno"] is None else OSError(found["errno"], found["text"])
    folder = Folder(path=path, free_bytes=found["free"], can_execute=True, refusal=refusal)
    yield check_writable("store", folder)
    if not is_writer and refusal is None and not found["sees"]:
        error = DataError(
            f"{path}: another folder than on the first host",
            expected="one store that every host mounts",
            got="one without the file just written there",
            hint="mount the shared file system there",
        )
        yield failed("shared store", error)
