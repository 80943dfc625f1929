"""HAProxy's configuration as Ray writes it, corrected: what it cannot be told by settings of Ray.

Ray (2.60) writes the configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names:
``haproxy_start``, which has the text corrected by what is here, pure functions of text.

- Request headers must arrive in time: else a few thousand connections that send a byte a second
  take every slot there is.
- Metrics and statistics listen on the loopback interface: they ask for no password.
- The admin socket, which can switch servers off, is its owner's alone.
- HTTP is served at any address of the machine: Ray's replicas would listen there as well, where
  HAProxy does not ask them. Ray is told the loopback address instead.
- Whoever shows no key where one is needed is answered here; so are requests without a host. HTTP/2
  is not spoken: nothing here has been tried with it.
- Overload is refused here, with 429: a refusal by a replica costs it about half of an answer,
  so that at three times its capacity it would do nothing but refuse. A request counts from when its
  body is here. One whose body is too long to be kept here counts apart from the others while it
  arrives, so that those who send slowly are in the way of nobody who does not.
- Without a replica that answers there is a 503 at once. Ray would hand such requests to its Python
  proxy, which waits for the replica to come back; and while there is no application, at the start
  and at the end, it would answer 404, at which clients give up.
- A replica that has stopped is left alone within seconds, and what it holds is answered with 503.
- Each host's HAProxy asks the replica of its own host, and those of others only while that one is
  away: a query crosses the network once. A replica that refuses costs another try elsewhere at
  once; a host that has vanished half a second, not 10 s.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

HEADER_TIMEOUT_S = 10
# A connection within a cluster takes a millisecond. One packet that is lost on the way would take a
# second more: another try, at another replica, is sooner.
CONNECT_TIMEOUT_MS = 500
# A host that takes no packet for so long has vanished: without this, a request that was sent to it
# would wait for the router's own time limit. Where nothing is sent, the kernel asks every second.
UNHEARD_MS = 2000
KEPT_ALIVE = (
    "option srvtcpka",
    "srvtcpka-idle 1s",
    "srvtcpka-intvl 1s",
    "srvtcpka-cnt 2",
)
CHECK_TIMEOUT_S = 2  # of an answer to a health check; three that fail count as a replica's end
# of the router's own time limits, after which it would have answered itself
ANSWER_MARGIN_MS = 2000
# Bodies under way are no work, and the router counts them itself: this only bounds connections.
ARRIVING_PER_IN_FLIGHT = 8
# those of router.http.auth, whose imports would delay every start of HAProxy
OPEN_PATHS = ("/", "/docs", "/healthz", "/openapi.json", "/readyz")
OPEN = f"{{ path {' '.join(OPEN_PATHS)} }}"
PROBLEM = "application/problem+json"
# what the router may answer to a request before it has read the body, and headers of that
EARLY: dict[int, tuple[str, ...]] = {
    401: ("WWW-Authenticate",),
    403: ("WWW-Authenticate",),
    404: (),
    405: ("Allow",),
    406: (),
    408: (),
    413: (),
    415: (),
    429: ("Retry-After",),
}
CARRIED = tuple({name: None for names in EARLY.values() for name in names})
REQUEST_ID = "^[!-~]{1,128}$"
CORRECTED = "# corrected by shardline.router.serve.haproxy\n"
ROUTES = "    # Static routing based on path prefixes"
FRONTEND = re.compile(r"^(frontend http_frontend\n    bind )(\S+):(\d+)$", re.MULTILINE)
BIND = re.compile(r"^frontend http_frontend\n    (bind .*)$", re.MULTILINE)  # also once corrected
BACKEND = re.compile(r"^    use_backend (\S+) if is_\1$", re.MULTILINE)
SERVER = re.compile(r"^    server (\S+) (\S+) check(?: .*)?$", re.MULTILINE)
# Ray writes a replica of HAProxy's own host so, and those of others by their host's address
OWN_HOST = ("127.0.0.1", "::1", "localhost")
OBSERVED = re.compile(r" observe \S+ error-limit \d+ on-error \S+")
CHECKED_SOONER = " observe layer4 error-limit 1 on-error fastinter"
SHUT_DOWN = "shutdown-sessions"
# what ``_own_host_first`` adds to a server's line
OWN_OPTIONS = re.compile(rf" tcp-ut \S+| on-marked-down {SHUT_DOWN}")
SERVERS = "    # Servers in"
CONNECT_TIMEOUT = re.compile(r"^    timeout connect \S+$", re.MULTILINE)
CHECKS = re.compile(r"^    (?:option httpchk|http-check|default-server) .*\n", re.MULTILINE)
FALLBACK = re.compile(r"^    server \S+ \S+ check backup\n", re.MULTILINE)
NO_APPLICATION = re.compile(r"^    http-request return status 404 .*$", re.MULTILINE)
ERROR_FILE = re.compile(r"^    errorfile (50[234]) .*\n", re.MULTILINE)
ADMIN_SOCKET = re.compile(r"^    stats socket (\S+) ", re.MULTILINE)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What HAProxy needs of the configuration: router.max_in_flight, .retry_after_s,
    .max_timeout_ms, .body_timeout_ms, and cluster.insecure.

    address: where HTTP is served; None: where Ray has been told.
    """

    max_in_flight: int
    retry_after_s: int
    max_timeout_ms: float
    body_timeout_ms: float
    insecure: bool
    address: str | None = None

    @classmethod
    def of_json(cls, text: str) -> Self:
        """Raises ValueError, TypeError: it is not what ``to_json`` makes."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def corrected(text: str, limits: Limits) -> str:
    """Ray's configuration as we want it; one that was corrected already stays as it is.

    Raises:
        ValueError: it does not read as expected; says which line is missing.
    """
    if text.startswith(CORRECTED):
        return text
    return CORRECTED + _bounded(listening(_guarded(text), limits.address), limits)


def _guarded(text: str) -> str:
    for written, meant in CORRECTIONS:
        if text.count(written) != 1:
            raise ValueError(f"Ray's HAProxy configuration has changed: not once {written!r}")
        text = text.replace(written, meant)
    return text


def listening(text: str, address: str | None) -> str:
    """With HTTP/1 served at this address, whatever Ray has been told.

    Raises:
        ValueError: the line is missing that says where.
    """

    def bind(match: re.Match[str]) -> str:
        host = match[2] if address is None else address
        both = " v4v6" if address == "::" else ""
        host = f"[{host}]" if address is not None and ":" in address else host
        return f"{match[1]}{host}:{match[3]}{both} proto h1"

    text, found = FRONTEND.subn(bind, text)
    if found != 1:
        raise ValueError("Ray's HAProxy configuration has changed: no frontend http_frontend")
    return text


def _bounded(text: str, limits: Limits) -> str:
    """With time limits of replicas, and the rules for requests."""
    text = FALLBACK.sub("", text)
    text = NO_APPLICATION.sub(lambda _: f"    http-request return {_problem(503, limits)}", text)
    text = ERROR_FILE.sub("", text)
    answer_ms = math.ceil(limits.max_timeout_ms + ANSWER_MARGIN_MS)
    errors = "".join(
        f"    http-error {_problem(status, limits)}\n" for status in (400, 408, 502, 503, 504)
    )
    defaults = f"    timeout server {answer_ms}ms\n    timeout check {CHECK_TIMEOUT_S}s\n{errors}"
    text = text.replace("\ndefaults\n    mode http\n", f"\ndefaults\n    mode http\n{defaults}", 1)
    text, found = CONNECT_TIMEOUT.subn(f"    timeout connect {CONNECT_TIMEOUT_MS}ms", text)
    if found != 1:
        raise ValueError("Ray's HAProxy configuration has changed: not one line 'timeout connect'")
    # with servers: Ray starts HAProxy without any, and adds them by a second configuration
    names = [name for name in BACKEND.findall(text) if SERVER.search(backend_section(text, name))]
    if text.count(ROUTES) != 1:
        raise ValueError(f"Ray's HAProxy configuration has changed: no line {ROUTES!r}")
    rules = [*_refusals(limits), *_arrivals(limits)]
    for name in names:
        section = backend_section(text, name)
        ordered = _own_host_first(section)
        text = text.replace(section, f"{ordered}{_arriving_section(name, ordered)}", 1)
        text = text.replace(
            f"    use_backend {name} if is_{name}\n",
            f"    use_backend {_arriving(name)} if is_{name} arriving\n"
            f"    use_backend {name} if is_{name}\n",
        )
        most_in_flight = limits.max_in_flight * _first_asked(section)
        rules += _overload(name, most_in_flight, limits)
    return text.replace(ROUTES, "".join(f"    {rule}\n" for rule in rules) + ROUTES, 1)


def _own_host_first(section: str) -> str:
    """With the replicas of this host asked first, if there are any.

    Not as others' backups would be: a server's backups are asked when health checks have found it
    down, and an HAProxy that ends after a reload makes no more checks. A request whose connection
    is refused would be tried at the same server, with pauses, until none is left. With
    ``use-server`` the next try is at another one, at once.

    A connection that fails only has the replica checked more often. Ray's own setting takes three
    of them for its end, which ends the very requests that have just failed: the connection of one
    that is still being opened would be closed without an answer. For the same reason those of
    another host, where opening one may take time, are not ended with it: what was sent to a host
    that has vanished fails after ``UNHEARD_MS``.
    """
    servers = SERVER.findall(section)
    own = [name for name, address in servers if _is_own(address)]

    def server(found: re.Match[str]) -> str:
        line = OBSERVED.sub("", found[0]) + CHECKED_SOONER
        if _is_own(found[2]):
            return f"{line} on-marked-down {SHUT_DOWN}"
        return f"{line} tcp-ut {UNHEARD_MS}ms"

    has_others = len(own) < len(servers)
    options = list(KEPT_ALIVE) if has_others else []
    if has_others:
        # of those that are left each is taken as often as any other
        options += [
            f"use-server {name} if {{ rand({left}) lt 1 }}"
            for name, left in zip(own, range(len(own), 0, -1), strict=True)
        ]
    section = SERVER.sub(server, section)
    return section.replace(SERVERS, "".join(f"    {each}\n" for each in options) + SERVERS)


def _first_asked(section: str) -> int:
    """Replicas that are asked as long as they answer: those of HAProxy's host, or else all."""
    addresses = [address for _, address in SERVER.findall(section)]
    return sum(map(_is_own, addresses)) or len(addresses)


def _is_own(address: str) -> bool:
    return address.rpartition(":")[0].strip("[]") in OWN_HOST


def _refusals(limits: Limits) -> list[str]:
    """Of requests that the API would refuse whatever their body."""
    refused = f"http-request return {_problem(400, limits)}"
    rules = [
        f"{refused} if !{{ req.ver 1.0 1.1 }}",
        f"{refused} if !{{ req.fhdr(host) -m found }} {{ req.ver 1.1 }}",
    ]
    if limits.insecure:
        return rules
    keyless = f"!{{ req.fhdr(authorization) -m found }} !{OPEN}"
    given = "req.fhdr(x-request-id,1)"
    fit = f"{{ {given} -m reg '{REQUEST_ID}' }}"
    made = "uuid,regsub(-,,g),bytes(0,16)"  # 16 hexadecimal digits, as the router's own
    return [
        *rules,
        f"http-request return {_problem(401, limits, request_id=given)} if {keyless} {fit}",
        f"http-request set-var(txn.id) {made} if {keyless}",
        f"http-request return {_problem(401, limits, request_id='var(txn.id)')} if {keyless}",
    ]


def _arrivals(limits: Limits) -> list[str]:
    """Waits for the body, or as much of it as is kept here; ``arriving`` if there is more to come.

    A body that came with its headers is not waited for. How much of a chunked one is missing
    cannot be asked.
    """
    return [
        f"http-request wait-for-body time {math.ceil(limits.body_timeout_ms)}ms",
        "http-request set-var(txn.body_here) req.body_len",
        "acl arriving req.body_size,sub(txn.body_here) gt 0",
        "acl arriving req.fhdr(transfer-encoding) -m found",
        f"http-request return {_problem(413, limits)} if arriving {OPEN}",
    ]


def _overload(name: str, most_in_flight: int, limits: Limits) -> list[str]:
    refused = f"http-request return {_problem(429, limits)} if !{{ path /healthz /readyz }}"
    most = ARRIVING_PER_IN_FLIGHT * most_in_flight
    return [
        f"{refused} !arriving {{ be_conn({name}) ge {most_in_flight} }}",
        f"{refused} arriving {{ be_conn({_arriving(name)}) ge {most} }}",
    ]


def _arriving(backend: str) -> str:
    return f"{backend}-arriving"


def _arriving_section(name: str, section: str) -> str:
    """The same servers under another name, counted apart; up or down as the first are."""
    section = CHECKS.sub("", section).replace(f"backend {name}\n", f"backend {_arriving(name)}\n")

    def tracking(found: re.Match[str]) -> str:
        own = "".join(OWN_OPTIONS.findall(found[0]))
        return f"    server {found[1]} {found[2]} track {name}/{found[1]}{own}"

    rules = "".join(f"    {rule}\n" for rule in _early_answers())
    return SERVER.sub(tracking, section).replace(SERVERS, f"{rules}{SERVERS}")


def _early_answers() -> list[str]:
    """The router's refusals, given once more by HAProxy, which then drops the rest of the body.

    It would wait for that else, until the client gives up, and count the request so long.
    """
    always = ("Cache-Control", "X-Request-ID")
    carried = {name: f"txn.{name.lower().replace('-', '_')}" for name in (*always, *CARRIED)}
    early = f"{{ status {' '.join(map(str, EARLY))} }}"
    rules = [
        # what a rule answers is made when the answer that came is gone: hence the variables
        f"http-response wait-for-body time {HEADER_TIMEOUT_S}s if {early}",
        f"http-response set-var(txn.problem) res.body if {early}",
        *(
            f"http-response set-var({variable}) res.fhdr({name}) if {early}"
            for name, variable in carried.items()
        ),
    ]
    for status, more in EARLY.items():
        headers = " ".join(f'hdr {name} "%[var({carried[name]})]"' for name in (*always, *more))
        answer = f'content-type {PROBLEM} lf-string "%[var(txn.problem)]" {headers}'
        rules.append(f"http-response return status {status} {answer} if {{ status {status} }}")
    return rules


def backend_section(text: str, backend: str) -> str:
    """From its name to its last line; empty if there is none."""
    found = re.search(rf"^backend {re.escape(backend)}\n(?:[ ].*\n|\n)*", text, re.MULTILINE)
    return found[0] if found else ""


def has_servers(text: str) -> bool:
    """Whether a configuration, corrected, has any."""
    return SERVER.search(text) is not None


def _problem(status: int, limits: Limits, request_id: str | None = None) -> str:
    """HAProxy's words for a problem+json answer; codes and titles are those of the router.

    ``request_id`` is an expression of HAProxy's, for where a request's own can be given.
    """
    code, title, detail, more = PROBLEMS[status]
    problem: dict[str, Any] = {
        "type": f"urn:shardline:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": "" if request_id is None else f"%[{request_id},json(utf8s)]",
        **more,
    }
    headers = {"Cache-Control": "no-store"}
    if status in (429, 502, 503):
        headers["Retry-After"] = str(limits.retry_after_s)
    if status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    if request_id is not None:
        headers["X-Request-ID"] = f"%[{request_id}]"
    body = "string" if request_id is None else "lf-string"
    return " ".join(
        [
            f"status {status} content-type {PROBLEM}",
            f"{body} {_quoted(json.dumps(problem, separators=(',', ':')))}",
            *(f"hdr {name} {_quoted(value)}" for name, value in headers.items()),
        ]
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


CHALLENGE = 'Bearer realm="shardline"'
LATER = {"hint": "try again after the time in Retry-After"}
PROBLEMS: dict[int, tuple[str, str, str, dict[str, str]]] = {
    400: (
        "invalid_input",
        "Invalid input",
        "not a whole request of HTTP/1.1",
        {
            "hint": "send a Host header and no HTTP/2; "
            "leave the connection open until the answer has come"
        },
    ),
    401: (
        "unauthenticated",
        "No valid API key",
        "a key is needed",
        {
            "field": "Authorization",
            "expected": "Bearer <key>",
            "got": "no such headers",
            "hint": "see `shardline keys`, or ask who runs the cluster",
        },
    ),
    408: (
        "body_timeout",
        "The body did not arrive in time",
        "headers or body did not arrive in time",
        {},
    ),
    413: ("payload_too_large", "Body too large", "no body belongs here", {"field": "body"}),
    429: ("overloaded", "Too many requests", "too many requests at once", LATER),
    502: ("unavailable", "Unavailable", "the router ended before it had answered", LATER),
    503: ("unavailable", "Unavailable", "no router answers", LATER),
    504: ("deadline_exceeded", "Deadline exceeded", "the router did not answer in time", {}),
}
