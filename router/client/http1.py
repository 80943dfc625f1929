"""HTTP/1.1 without a socket: the server's address, requests as bytes, bytes to responses.

No proxies and no redirects: a request, with its key, goes to the address given and nowhere else.
"""

import re
from dataclasses import dataclass, field, replace
from urllib.parse import SplitResult, urlsplit

import httptools

from shardline.router.contract import KEY, MSGPACK_TYPE
from shardline.shards.core.errors import InvalidInput

PRINTABLE = re.compile(r"[!-~]+")  # of ASCII; anything else would break the request's head
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where requests go, and the headers that each carries."""

    url: str
    host: str
    port: int
    is_tls: bool
    prefix: str  # path before /v1, without a slash at its end
    headers: bytes = field(repr=False)  # holds the key

    @classmethod
    def of(cls, url: str, key: str | None) -> "Server":
        """Raises InvalidInput: no http(s) URL of a host, or no API key."""
        parts = _parts(url)
        if key is not None and not KEY.fullmatch(key):
            raise InvalidInput("not an API key", got=f"{len(key)} characters")
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        lines = [
            f"host: {name}:{port}",
            f"accept: {MSGPACK_TYPE}, application/json",
            "user-agent: shardline-python",
            *([] if key is None else [f"authorization: Bearer {key}"]),
        ]
        return cls(
            url=url,
            host=parts.hostname or "",
            port=port,
            is_tls=parts.scheme == "https",
            prefix=parts.path.rstrip("/"),
            headers="".join(f"{line}\r\n" for line in lines).encode(),
        )

    def message(self, method: str, path: str, body: bytes = b"", header: str = "") -> bytes:
        """A request as it goes over the socket; a body is msgpack. header: one more, if any."""
        kind = f"content-type: {MSGPACK_TYPE}\r\ncontent-length: {len(body)}\r\n" if body else ""
        more = f"{header}\r\n" if header else ""
        line = f"{method} {self.prefix}{path} HTTP/1.1\r\n{kind}{more}"
        return b"".join((line.encode(), self.headers, b"\r\n", body))


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_plain = PRINTABLE.fullmatch(url) and not (parts.query or parts.fragment)
        is_plain = is_plain and "@" not in parts.netloc  # an API key is the only credential
        if parts.scheme in DEFAULT_PORTS and parts.hostname and parts.port != 0 and is_plain:
            return parts
    except ValueError:  # a port that is none, an open bracket
        pass
    raise InvalidInput("not a server's URL", field="base_url", expected="http://HOST:PORT")


@dataclass(frozen=True, slots=True)
class Response:
    """Header names in lower case. keep_alive: the connection may carry another request."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


class ResponseReader:
    """The responses of one connection, in order. started: some bytes of the next have come."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self._begin()

    def _begin(self) -> None:
        self.started = False
        self._has_headers = False
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> Response | None:
        """The response that ``data`` completes, if it does; empty data is the end of the stream.

        Raises:
            ConnectionError: the stream ended too early, or is not HTTP.
        """
        if data:
            self.started = True
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                raise ConnectionError(f"the answer is not HTTP: {error}") from error
        elif self._has_headers and not {b"content-length", b"transfer-encoding"} & set(
            self._headers
        ):
            self._complete(keep_alive=False)  # a response without a length ends with the stream
        else:
            raise ConnectionResetError("the connection was closed before the answer was complete")
        response, self._response = self._response, None
        return response

    def _complete(self, keep_alive: bool) -> None:
        status = self._parser.get_status_code()
        if self._response is None:
            self._response = Response(status, self._headers, b"".join(self._body), keep_alive)
        self._begin()

    # what httptools calls

    def on_message_begin(self) -> None:
        if self._response is not None:  # bytes that nobody asked for: what follows is in doubt
            self._response = replace(self._response, keep_alive=False)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._has_headers = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._complete(self._parser.should_keep_alive())
        else:  # 1xx announces the response proper
            self._has_headers, self._headers = False, {}
