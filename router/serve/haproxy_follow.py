"""What a HAProxy takes from the one that it follows: listening sockets, and servers.

Ray starts HAProxy without any server, and has it reload when it knows some. Where a substitute
serves meanwhile (``haproxy_watch``), the first HAProxy of the next manager takes over from it, with
the servers that it knows.

On a reload Ray may have lost its servers: a new controller of Serve, as after the loss of the head,
announces an application without a replica if it has not recovered them after 10 s, although they
answer. Those of the HAProxy before are kept then.
"""

import os
import re
from pathlib import Path

from shardline.router.serve.haproxy import (
    ADMIN_SOCKET,
    BACKEND,
    BIND,
    FALLBACK,
    SERVER,
    backend_section,
    has_servers,
)

# Files beside the configuration, where only this session's HAProxy looks. One letter for the
# socket, as long as Ray's own: HAProxy takes paths of 97 bytes.
SUBSTITUTE_SOCKET = "h"
SUBSTITUTE_CONFIG = "substitute.cfg"
SUBSTITUTE_PID = "substitute.pid"
NEWEST_PID = "newest.pid"  # started last
SERVING_PID = "serving.pid"  # the last that has served
NEWEST_CONFIG = "newest.cfg"
CHECK_TIMES = re.compile(r"^(    default-server .*) fall \d+( .*) inter \S+", re.MULTILINE)
# Of a server that Ray does not name: one that Serve stops fails its checks for a second before it
# ends (RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S), and is to be left alone by then.
CHECKED_AT_ONCE = r"\1 fall 1\2 inter 250ms"


def with_kept_servers(text: str, known: str) -> str:
    """Ray's configuration, with the servers that ``known``, the one before, had for an application
    which has none now. An application that is gone altogether is left so."""
    text, known = FALLBACK.sub("", text), FALLBACK.sub("", known)
    for name in BACKEND.findall(text):
        section = backend_section(text, name)
        lines = [found[0] for found in SERVER.finditer(backend_section(known, name))]
        if lines and not SERVER.search(section):
            checked = CHECK_TIMES.sub(CHECKED_AT_ONCE, section)
            text = text.replace(section, "\n".join([checked.rstrip("\n"), *lines, ""]), 1)
    return text


def note_servers(config: Path, text: str) -> None:
    """Keeps a configuration of Ray's for the HAProxy that follows on a reload."""
    (config.parent / NEWEST_CONFIG).write_text(text)


def noted_servers(config: Path) -> str:
    """What ``note_servers`` kept; empty where HAProxy was started by a version that did not."""
    newest = config.parent / NEWEST_CONFIG
    return newest.read_text() if newest.exists() else ""


def taken_over(config: Path, text: str) -> tuple[str, list[str]]:
    """The configuration to start with and HAProxy's arguments for it, where a substitute runs.

    The substitute's configuration as long as Ray knows no server, if it listens where this one
    does.
    """
    folder = config.parent
    pid = noted_pid(folder / SUBSTITUTE_PID, folder / SUBSTITUTE_CONFIG)
    if pid is None:
        return text, []
    known = (folder / SUBSTITUTE_CONFIG).read_text()
    if not has_servers(text) and BIND.findall(text) == BIND.findall(known):
        text = with_admin_socket(known, admin_socket(text))
    return text, ["-sf", str(pid), "-x", str(folder / SUBSTITUTE_SOCKET)]


def admin_socket(text: str) -> str:
    found = ADMIN_SOCKET.search(text)
    if found is None:
        raise ValueError("Ray's HAProxy configuration has changed: no line 'stats socket'")
    return found[1]


def with_admin_socket(text: str, path: str) -> str:
    return text.replace(f" stats socket {admin_socket(text)} ", f" stats socket {path} ", 1)


def note_pid(path: Path, pid: int) -> None:
    temporary = path.with_suffix(f".{pid}")
    temporary.write_text(str(pid))
    temporary.replace(path)


def noted_pid(path: Path, config: Path) -> int | None:
    """The process noted there, if it lives and is a HAProxy of this configuration."""
    try:
        pid = int(path.read_text())
        named = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(config) in named else None
