"""The API's verbs, apart from any socket: requests to bytes, outcomes to answers or errors.

Problems come back as the error of ``shards.core.errors`` or ``router.contract`` that the server
raised: same class, field, expected, got and hint.
"""

import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, TypedDict, Unpack
from uuid import UUID

import msgpack
import numpy as np

from shardline.router.client.answers import Answer, SearchAnswer, read_item, read_search
from shardline.router.client.http1 import Response, Server
from shardline.router.client.retries import Attempts, Outcome, Retry
from shardline.router.contract import PROBLEM_TYPE, REFUSALS, ItemAnswer, pack_array
from shardline.shards.core.errors import (
    Behind,
    DeadlineExceeded,
    DeltaFull,
    EncoderUnavailable,
    InvalidInput,
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
from shardline.shards.core.schema import FloatArray, IdArray, check_ids

if TYPE_CHECKING:
    import ssl

    from numpy.typing import ArrayLike

    from shardline.shards.core.messages import SearchParams

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 1e6  # sockets take no more than about 9e9
MAX_GOT = 100  # characters of a refused value that an error shows
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
    EncoderUnavailable,
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
    k: int | None
    timeout_ms: float | None
    min_coverage: float | None
    params: "SearchParams | None"
    min_seq: "Sequence[int] | None"
    return_: "Sequence[str] | None"
    return_original_ids: bool | None


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
    try:
        return _packed(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("not to be sent", field=_culprit(given), got=str(error)) from error


def _converted(name: str, value: Any) -> Any:
    try:
        return _CONVERTED[name](value) if name in _CONVERTED else value
    except InvalidInput:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput("not to be sent", field=name, got=repr(value)[:MAX_GOT]) from error


def _milliseconds(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            "not to be sent", field="timeout_ms", got=repr(value)[:MAX_GOT]
        ) from error


def _packed(value: Any) -> bytes:
    body: bytes = msgpack.packb(value, default=_plain)
    return body


def _plain(value: Any) -> Any:
    """As ``pack_array``; dates and times as ISO 8601 text, which time features take."""
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, date):  # a pandas Timestamp too, and NaT, which no time is equal to
        return value.isoformat() if value == value else None
    if type(value).__name__ == "NAType":  # pandas.NA
        return None
    if hasattr(value, "to_numpy"):  # a Series
        value = value.to_numpy()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    return pack_array(value)


def _culprit(fields: Mapping[str, Any]) -> str:
    """The innermost field that cannot be packed."""
    for name, value in fields.items():
        try:
            _packed(value)
        except (TypeError, ValueError, OverflowError):
            if name != "features":
                return name
            rows = {
                f"features[{row}].{key}": v for row, m in enumerate(value) for key, v in m.items()
            }
            return _culprit(rows)
    raise AssertionError("every field can be packed")


def _ids(values: "ArrayLike") -> IdArray:
    _refuse_hidden("item_ids", values)
    kinds = set(map(type, values)) if isinstance(values, list | tuple) else set()
    if kinds & {bool, np.bool_}:  # numpy would make them 1
        raise InvalidInput(
            "not an array of integers", field="item_ids", expected="1-d int64", got="a bool"
        )
    return check_ids(values).astype("<i8", copy=False)


def _refuse_hidden(field: str, values: "ArrayLike") -> None:
    """A masked value would be sent as what lies under its mask."""
    # who has a masked array has loaded the module, which takes time that others need not pay
    if "numpy.ma" in sys.modules and np.ma.is_masked(values):
        raise InvalidInput("masked values", field=field, expected="values that are all there")


def _matrix(values: "ArrayLike") -> FloatArray:
    _refuse_hidden("vectors", values)
    try:
        array = np.asarray(values)
        if array.ndim == 1 and array.dtype == object:  # rows of a Series or of an Arrow array
            array = np.array([np.asarray(row) for row in array])
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            "not a matrix of numbers", field="vectors", expected="rows of equal length"
        ) from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidInput(
            "not a matrix of numbers",
            field="vectors",
            expected="2-d float32, one row per query",
            got=f"{array.ndim}-d {array.dtype}",
        )
    with np.errstate(over="ignore"):  # becomes infinity, which the server refuses by its row
        return array.astype("<f4", copy=False)


def _records(rows: Any) -> "Iterable[Mapping[str, Any]]":
    """A map per query; of a frame of polars or pandas, or a table of pyarrow, a map per row."""
    for name, arguments in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        if hasattr(rows, name):
            records: list[dict[str, Any]] = getattr(rows, name)(*arguments)
            return records
    found: Iterable[Mapping[str, Any]] = rows
    return found


def _listed(values: Any) -> list[Any]:
    found: list[Any] = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
    return found


def _feature(value: Any) -> Any:
    """As an import reads it: NaN, which is how frames write a missing number, as None; decimals as
    numbers, times of day and durations as seconds, a UUID as text."""
    if isinstance(value, float | np.floating):
        return None if value != value else value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, time_of_day):
        return (value.hour * 60 + value.minute) * 60 + value.second + value.microsecond / 1e6
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, np.timedelta64):
        return None if np.isnat(value) else float(value / np.timedelta64(1, "s"))
    return str(value) if isinstance(value, UUID) else value


# fields that are sent in another form than they are given
_CONVERTED: dict[str, Callable[[Any], Any]] = {
    "vectors": _matrix,
    "features": lambda rows: [
        {name: _feature(value) for name, value in dict(row).items()} for row in _records(rows)
    ],
    "item_ids": _ids,
    "return_": lambda names: names if isinstance(names, str) else _listed(names),
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
        return kind(problem["detail"], **details)
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
            path += f"?timeout_ms={_milliseconds(timeout_ms)}"
        return Call(self._server.message("GET", path), read_item)

    def _get_call(self, path: str) -> Call[dict[str, Any]]:
        return Call(self._server.message("GET", path), _read_json)

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
