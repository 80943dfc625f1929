"""The API's verbs, apart from any socket: requests to bytes, outcomes to answers or errors.

Problems come back as the error of ``shards.core.errors`` or ``router.contract`` that the server
raised: same class, field, expected, got and hint.
"""

import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, Unpack

from shardline.router.client.answers import (
    Answer,
    DeleteAnswer,
    SearchAnswer,
    UpsertAnswer,
    read_delete,
    read_item,
    read_search,
    read_upsert,
)
from shardline.router.client.conversions import (
    MAX_GOT,
    listed,
    milliseconds,
    packed,
    records,
    to_filter,
    to_ids,
    to_json,
    to_matrix,
)
from shardline.router.client.event_calls import event_requests, read_events
from shardline.router.client.http1 import Response, Server
from shardline.router.client.list_calls import ListRequest
from shardline.router.client.retries import Attempts, Outcome, Retry
from shardline.router.client.seq import Seq
from shardline.router.client.write_calls import (
    DeleteFields,
    UpsertFields,
    WriteRequest,
    delete_requests,
    upsert_requests,
)
from shardline.router.contract import (
    PROBLEM_TYPE,
    REFUSALS,
    WRITE_KEY_HEADER,
    FailedPart,
    ItemAnswer,
    WriteParts,
)
from shardline.shards.core.errors import (
    Behind,
    CardFailed,
    DeadlineExceeded,
    DeltaFull,
    EncoderUnavailable,
    InvalidInput,
    ListsUnavailable,
    NotFound,
    NotPrimary,
    Overloaded,
    ProtocolError,
    ReadOnly,
    ShardlineError,
    StoreFull,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.schema import check_ids

if TYPE_CHECKING:
    import ssl

    from numpy.typing import ArrayLike

    from shardline.shards.core.messages import SearchParams

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 1e6  # sockets take no more than about 9e9
_KINDS: tuple[type[ShardlineError], ...] = (
    InvalidInput,
    NotFound,
    VersionMismatch,
    Unavailable,
    DeadlineExceeded,
    Overloaded,
    Behind,
    DeltaFull,
    NotPrimary,
    ReadOnly,
    StoreFull,
    ListsUnavailable,
    EncoderUnavailable,
    CardFailed,
    *REFUSALS,
)
_ERRORS = {kind.code: kind for kind in _KINDS}


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One request, and how the body of a successful response is read."""

    message: bytes
    read: Callable[[bytes], Answer]


class SearchFields(TypedDict, total=False):
    """The arguments of a search, as ``Client.search`` describes them; None is left out."""

    vectors: "ArrayLike | None"
    features: "Sequence[Mapping[str, Any]] | None"
    item_ids: "ArrayLike | None"
    texts: "Sequence[str] | None"
    exclude_lists: "Sequence[str] | None"
    k: int | None
    timeout_ms: float | None
    min_coverage: float | None
    params: "SearchParams | None"
    min_seq: "Sequence[int | None] | None"
    background: bool | None
    exact: bool | None
    filter: "Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None"
    exclude: "Sequence[ArrayLike | Set[int]] | None"
    exclude_history: bool | None
    cap: "Mapping[str, Any] | Sequence[Mapping[str, Any]] | None"
    boost: "Mapping[str, Any] | Sequence[Mapping[str, Any]] | None"
    diversify: "Mapping[str, Any] | None"
    return_: "Sequence[str] | None"
    return_original_ids: bool | None
    experiment_key: str | None


def search_body(**fields: Unpack[SearchFields]) -> bytes:
    """A search as a msgpack body.

    Raises:
        InvalidInput: a field has no form in msgpack, or would change on the way (text for a
            number, a fraction for an id). The server checks everything else.
    """
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in SearchFields.__annotations__:
            raise TypeError(f"search() got an unexpected keyword argument {name!r}")
        if value is not None:
            given[name.rstrip("_")] = _converted(name, value)  # return is a word of Python
    min_seq = fields.get("min_seq")
    if isinstance(min_seq, Seq) and min_seq.origin is not None:
        given["min_seq_of"] = min_seq.origin
    try:
        return packed(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("not to be sent", field=_culprit(given), got=str(error)) from error


def _converted(name: str, value: Any) -> Any:
    try:
        return _CONVERTED[name](value) if name in _CONVERTED else value
    except InvalidInput:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput("not to be sent", field=name, got=repr(value)[:MAX_GOT]) from error


def _culprit(fields: Mapping[str, Any]) -> str:
    """The innermost field that cannot be packed."""
    for name, value in fields.items():
        try:
            packed(value)
        except (TypeError, ValueError, OverflowError):
            if name != "features":
                return name
            rows = {
                f"features[{row}].{key}": v for row, m in enumerate(value) for key, v in m.items()
            }
            return _culprit(rows)
    raise AssertionError("every field can be packed")


# fields that are sent in another form than they are given
_CONVERTED: dict[str, Callable[[Any], Any]] = {
    "vectors": to_matrix,
    "exclude_lists": lambda names: names if isinstance(names, str) else listed(names),
    "features": lambda rows: [
        {name: to_json(value) for name, value in dict(row).items()} for row in records(rows)
    ],
    "item_ids": to_ids,
    "texts": lambda texts: texts if isinstance(texts, str) else listed(texts),
    "return_": lambda names: names if isinstance(names, str) else listed(names),
    "min_seq": listed,
    "filter": to_filter,
    "exclude": lambda lists: [
        to_ids(list(ids) if isinstance(ids, set | frozenset) else ids, f"exclude[{row}]")
        for row, ids in enumerate(listed(lists))
    ],
    "cap": to_filter,
    "boost": to_filter,
    "diversify": to_filter,
    "params": lambda params: {
        name: value for name in params.__slots__ if (value := getattr(params, name)) is not None
    },
}


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("not JSON", got=str(error)) from error
    return content


def as_error(response: Response) -> ShardlineError:
    """The error a problem stands for; Unavailable for what is no problem of ours, such as the
    page of a load balancer."""
    problem = _problem_of(response)
    if problem is None:
        return Unavailable(
            "the answer is not Shardline's",
            expected=PROBLEM_TYPE,
            got=f"HTTP {response.status}",
        )
    given = {name: problem.get(name) for name in ("field", "expected", "got", "hint")}
    details = {name: None if value is None else str(value) for name, value in given.items()}
    kind = _ERRORS.get(problem["code"])
    if kind is not None:
        error = kind(problem["detail"], **details)
        error.parts = _write_parts(problem)
        return error
    details["hint"] = f"the server's log has more under request {problem.get('request_id')}"
    return ShardlineError(problem["detail"], **details)


def _problem_of(response: Response) -> dict[str, Any] | None:
    if not response.headers.get(b"content-type", b"").startswith(PROBLEM_TYPE.encode()):
        return None
    try:
        problem = json.loads(response.body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(problem, dict):
        return None
    is_ours = all(isinstance(problem.get(name), str) for name in ("code", "detail"))
    return problem if is_ours else None


def _write_parts(problem: Mapping[str, Any]) -> WriteParts | None:
    """What a problem says of the parts of a write; None: nothing that is to be understood."""
    try:
        return WriteParts(
            failed=tuple(
                FailedPart(
                    shard=each["shard"], code=each["code"], text=each["text"], items=each["items"]
                )
                for each in problem["failed"]
            ),
            applied_items=problem["applied_items"],
            idempotency_key=problem["idempotency_key"],
        )
    except (KeyError, TypeError):
        return None


def _system_tls() -> "ssl.SSLContext":
    import ssl  # 10 ms, which plain http need not pay

    return ssl.create_default_context()


class ClientCore:
    """What both clients are made of, all but their connections: the arguments, and the calls."""

    def __init__(
        self,
        base_url: str,
        timeout: float = DEFAULT_TIMEOUT_S,
        *,
        key: str | None = None,
        retry: Retry | None = None,
        tls: "ssl.SSLContext | None" = None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """timeout: seconds for one call, its retries and their pauses included. tls: for https,
        instead of the system's certificates. clock and uniform are for tests.

        Raises:
            InvalidInput: no http(s) URL, a ``key`` of a form that no API key has, or a timeout that
                is no number of seconds from 0 to MAX_TIMEOUT_S.
        """
        if not 0 < timeout <= MAX_TIMEOUT_S:
            raise InvalidInput(
                "not a timeout",
                field="timeout",
                expected=f"more than 0, at most {MAX_TIMEOUT_S:.0f} s",
                got=str(timeout),
            )
        self._server = Server.of(base_url, key)
        self._timeout_s = timeout
        self._retry = retry or Retry()
        self._clock = clock
        self._uniform = uniform
        self._tls = (tls or _system_tls()) if self._server.is_tls else None
        self._is_closed = False
        # kept connections; its operations are atomic, so that no lock is needed, which a fork
        # could leave locked
        self._idle: deque[Any] = deque()

    def _attempts(self) -> Attempts:
        if self._is_closed:
            raise RuntimeError("the client is closed")
        return Attempts(self._retry, self._timeout_s, self._clock, self._uniform)

    def _search_call(self, **fields: Unpack[SearchFields]) -> Call[SearchAnswer]:
        return Call(self._server.message("POST", "/v1/search", search_body(**fields)), read_search)

    def _item_call(self, item_id: int, timeout_ms: float | None) -> Call[ItemAnswer]:
        (number,) = check_ids([item_id], field="item_id").tolist()
        path = f"/v1/items/{number}"
        if timeout_ms is not None:
            path += f"?timeout_ms={milliseconds(timeout_ms)}"
        return Call(self._server.message("GET", path), read_item)

    def _get_call(self, path: str) -> Call[dict[str, Any]]:
        return Call(self._server.message("GET", path), _read_json)

    def _list_call(self, request: ListRequest[Answer]) -> Call[Answer]:
        return Call(self._server.message(request.method, request.path, request.body), request.read)

    def _upsert_calls(self, fields: UpsertFields) -> Iterator[tuple[int, Call[UpsertAnswer]]]:
        return self._write_calls("PUT", upsert_requests(**fields), read_upsert)

    def _delete_calls(self, fields: DeleteFields) -> Iterator[tuple[int, Call[DeleteAnswer]]]:
        return self._write_calls("DELETE", delete_requests(**fields), read_delete)

    def _event_calls(self, events: Any) -> Iterator[Call[int]]:
        for body in event_requests(events):
            yield Call(self._server.message("POST", "/v1/events", body), read_events)

    def _write_calls(
        self, method: str, requests: Iterable[WriteRequest], read: Callable[[bytes], Answer]
    ) -> Iterator[tuple[int, Call[Answer]]]:
        """Each with the number of its items."""
        for request in requests:
            header = f"{WRITE_KEY_HEADER}: {request.key}"
            message = self._server.message(method, "/v1/items", request.body, header)
            yield request.items, Call(message, read)

    def _finish(self, call: Call[Answer], outcome: Outcome) -> Answer:
        """The answer. Raises ShardlineError: there is none."""
        if isinstance(outcome, TimeoutError):
            raise DeadlineExceeded(f"no answer from {self._server.url} in time") from outcome
        if isinstance(outcome, OSError):
            raise Unavailable(
                f"cannot reach {self._server.url}",
                got=str(outcome) or type(outcome).__name__,
                hint="is the cluster up? shardline status, shardline serve",
            ) from outcome
        if not outcome.is_success:
            raise as_error(outcome)
        return call.read(outcome.body)
