"""A thin synchronous client of the HTTP API: msgpack both ways, numpy in and out, typed errors.

    with Client("http://localhost:8000", key="...") as client:
        answer = client.search(features=[{"user_id": 7}], k=10)
        answer.ids[0], answer.scores[0], answer.coverage.share

Problems come back as the error of ``shards.core.errors`` that the server raised.
"""

from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import orjson

from shardline.router.http.api_keys import KEY
from shardline.router.http.codec import decode_answer, encode_query
from shardline.router.http.media import Media
from shardline.router.http.problems import CONTENT_TYPE, REFUSALS
from shardline.router.query import ItemAnswer, SearchAnswer, SearchQuery
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    ShardlineError,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.messages import SearchParams

DEFAULT_TIMEOUT_S = 30.0
MSGPACK_HEADERS = {"content-type": Media.MSGPACK.value, "accept": Media.MSGPACK.value}
_KINDS: tuple[type[ShardlineError], ...] = (
    InvalidInput,
    NotFound,
    VersionMismatch,
    Unavailable,
    DeadlineExceeded,
    Overloaded,
    *REFUSALS,
)
_ERRORS = {kind.code: kind for kind in _KINDS}


class Client:
    """One server, over kept-alive connections; for use by one thread at a time, or by many."""

    def __init__(
        self, base_url: str, timeout: float = DEFAULT_TIMEOUT_S, *, key: str | None = None
    ) -> None:
        """timeout: seconds to wait for the server, a request's own deadline aside.

        Raises:
            InvalidInput: ``key`` has a form that no API key has.
        """
        if key is not None and not KEY.fullmatch(key):
            raise InvalidInput("not an API key", got=f"{len(key)} characters")
        self._base_url = base_url
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=base_url, timeout=timeout, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def search(
        self,
        *,
        vectors: Any = None,
        features: list[dict[str, Any]] | None = None,
        item_ids: Any = None,
        k: int | None = None,
        timeout_ms: float | None = None,
        min_coverage: float | None = None,
        params: SearchParams | None = None,
    ) -> SearchAnswer:
        """ids (n, k) int64 and scores (n, k) float32, best first; empty slots are -1 and -inf.

        Exactly one of vectors (n, dim), features (n maps), item_ids (n,). None elsewhere leaves
        the choice to the server.

        Raises:
            InvalidInput: the server refused the request; field names what.
            VersionMismatch, DeadlineExceeded, Overloaded, Unavailable: as the server said, and
                Unavailable too when it cannot be reached.
        """
        query = SearchQuery(
            vectors=None if vectors is None else np.asarray(vectors, dtype="<f4"),
            features=features,
            item_ids=None if item_ids is None else np.asarray(item_ids, dtype="<i8"),
            k=k,
            timeout_ms=timeout_ms,
            min_coverage=min_coverage,
            params=params or SearchParams(),
        )
        body = encode_query(query)
        response = self._send("POST", "/v1/search", content=body, headers=MSGPACK_HEADERS)
        return decode_answer(response.content)

    def item(self, item_id: int) -> ItemAnswer:
        """One item's stored vector (dim,) float32. Raises NotFound, or as ``search``."""
        content = orjson.loads(self._send("GET", f"/v1/items/{item_id}").content)
        return ItemAnswer(**content | {"vector": np.asarray(content["vector"], dtype=np.float32)})

    def status(self) -> dict[str, Any]:
        """What the router serves: generation, model, index, shards, encoder."""
        content: dict[str, Any] = orjson.loads(self._send("GET", "/v1/status").content)
        return content

    def healthy(self) -> bool:
        """Whether a server answers at all."""
        return self._answers("/healthz")

    def ready(self) -> bool:
        """Whether a server answers, and can answer queries."""
        return self._answers("/readyz")

    def _answers(self, path: str) -> bool:
        try:
            return self._http.get(path).is_success
        except httpx.TransportError:
            return False

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"no answer from {self._base_url} in time") from error
        except httpx.TransportError as error:
            raise Unavailable(
                f"cannot reach {self._base_url}",
                got=str(error) or type(error).__name__,
                hint="is the cluster up? shardline status, shardline serve",
            ) from error
        if not response.is_success:
            raise as_error(response)
        return response


def as_error(response: httpx.Response) -> ShardlineError:
    """The error a problem stands for; Unavailable for what is no problem of ours, such as the
    page of a load balancer."""
    problem = _problem_of(response)
    if problem is None:
        return Unavailable(
            "the answer is not Shardline's",
            expected=CONTENT_TYPE,
            got=f"HTTP {response.status_code}",
        )
    details = {name: problem.get(name) for name in ("field", "expected", "got", "hint")}
    kind = _ERRORS.get(problem["code"])
    if kind is not None:
        return kind(problem["detail"], **details)
    details["hint"] = f"the server's log has more under request {problem.get('request_id')}"
    return ShardlineError(problem["detail"], **details)


def _problem_of(response: httpx.Response) -> dict[str, Any] | None:
    if not response.headers.get("content-type", "").startswith(CONTENT_TYPE):
        return None
    try:
        problem = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return None
    return problem if isinstance(problem, dict) and {"code", "detail"} <= problem.keys() else None
