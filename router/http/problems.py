"""Errors as HTTP answers: RFC 9457 ``application/problem+json`` with a stable ``code``.

Whatever is wrong with a request's content is 400, whether it does not parse or breaks a rule: the
code and the field tell them apart better than a second status would. Errors that are not meant
for callers become 500 ``internal`` without details; the details go to the log.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from shardline.router.contract import (
    PROBLEM_TYPE,
    BodyTimeout,
    Forbidden,
    MethodNotAllowed,
    NotAcceptable,
    OtherModel,
    PayloadTooLarge,
    Unauthenticated,
    UnsupportedMediaType,
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
    ReadOnly,
    ShardlineError,
    StoreFull,
    Unavailable,
    VersionMismatch,
)

logger = logging.getLogger(__name__)

MAX_TEXT = 300  # characters of a caller's own input that an error repeats
# fields that other search services have, and what is asked for instead; their nearest spelling
# among ours would mislead
INSTEAD = dict.fromkeys(
    ("user", "users", "user_id", "user_ids"),
    "users are asked for by their features, which /v1/status lists: use features",
)
CHALLENGE = b'Bearer realm="shardline"'


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    title: str
    retry: bool = False


PROBLEMS: dict[str, _Kind] = {
    InvalidInput.code: _Kind(400, "Invalid input"),
    Unauthenticated.code: _Kind(401, "No valid API key"),
    Forbidden.code: _Kind(403, "The API key is not good for this"),
    NotFound.code: _Kind(404, "Not found"),
    MethodNotAllowed.code: _Kind(405, "Method not allowed"),
    NotAcceptable.code: _Kind(406, "Not acceptable"),
    BodyTimeout.code: _Kind(408, "The body did not arrive in time"),
    PayloadTooLarge.code: _Kind(413, "Body too large"),
    UnsupportedMediaType.code: _Kind(415, "Unsupported media type"),
    Overloaded.code: _Kind(429, "Too many requests", retry=True),
    DeltaFull.code: _Kind(429, "The shard must be compacted first", retry=True),
    "internal": _Kind(500, "Internal error"),
    VersionMismatch.code: _Kind(503, "Encoder and index are of different models", retry=True),
    Unavailable.code: _Kind(503, "Unavailable", retry=True),
    Behind.code: _Kind(503, "Writes are missing", retry=True),
    NotPrimary.code: _Kind(503, "No replica takes writes now", retry=True),
    ReadOnly.code: _Kind(503, "Writes cannot be kept now", retry=True),
    StoreFull.code: _Kind(507, "The store is full"),
    CardFailed.code: _Kind(503, "The cards of shards have failed", retry=True),
    ListsUnavailable.code: _Kind(503, "Lists cannot be read now", retry=True),
    EncoderUnavailable.code: _Kind(503, "The query encoder cannot be used"),
    DeadlineExceeded.code: _Kind(504, "Deadline exceeded"),
}

OTHER_MODEL = _Kind(409, "Vectors of another model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemAnswer:
    """What to send: status, extra headers, and the JSON body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def to_problem(error: Exception, *, request_id: str, retry_after_s: int) -> ProblemAnswer:
    """The answer for any exception; an unexpected one is logged here, with its traceback."""
    if not isinstance(error, ShardlineError) or error.code not in PROBLEMS:
        logger.error("request %s failed", request_id, exc_info=error)
        error = _Internal("something went wrong in the server", hint="its log has the details")
    kind = OTHER_MODEL if isinstance(error, OtherModel) else PROBLEMS[error.code]
    body: dict[str, Any] = {
        "type": f"urn:shardline:problem:{error.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": short(error.message),
        "code": error.code,
        "request_id": request_id,
    }
    for name in ("field", "expected", "got", "hint"):
        text = getattr(error, name)
        if text is not None:
            body[name] = short(text)
    if isinstance(error.parts, WriteParts):
        body |= asdict(error.parts)
    headers = [(b"content-type", PROBLEM_TYPE.encode()), (b"cache-control", b"no-store")]
    if kind.retry:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    if isinstance(error, Unauthenticated | Forbidden):
        headers.append((b"www-authenticate", _challenge(error)))
    return ProblemAnswer(status=kind.status, headers=headers, body=orjson.dumps(body))


def _challenge(error: Unauthenticated | Forbidden) -> bytes:
    """How to ask again: RFC 6750, section 3."""
    if isinstance(error, Unauthenticated):
        return CHALLENGE
    return CHALLENGE + f', error="insufficient_scope", scope="{error.scope}"'.encode()


class _Internal(ShardlineError):
    code = "internal"


def from_validation(error: ValidationError, known: Sequence[str]) -> InvalidInput:
    """The first complaint of pydantic in our words; ``known`` are the fields there are."""
    first = error.errors(include_url=False, include_context=False)[0]
    location = first["loc"]
    parts = [f"[{part}]" if isinstance(part, int) else f".{short_name(part)}" for part in location]
    path = "".join(parts).removeprefix(".")
    if first["type"] == "extra_forbidden":
        return unknown_field(path, known)
    return InvalidInput(
        "wrong value",
        field=path or "body",
        expected=first["msg"].removeprefix("Input should be "),
        got=_got(first["input"]),
    )


def unknown_field(path: str, known: Sequence[str]) -> InvalidInput:
    """Names the field, the one that may have been meant, and all that there are."""
    name = path.rpartition(".")[2]
    is_long = len(name) > MAX_TEXT  # nobody mistyped that, and to compare it takes seconds
    close = [] if is_long else difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    if "features" in known and name in INSTEAD:
        guess = f"{INSTEAD[name]}; "
    return InvalidInput(
        "unknown field", field=short(path), hint=f"{guess}known fields: {', '.join(known)}"
    )


def _got(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, str):
        value = short(value)  # before it is quoted, which makes it up to ten times as long
    return f"{kind} {value!r}" if isinstance(value, str | int | float | bool) else kind


def wrong_type(field: str, expected: str, value: Any, hint: str | None = None) -> InvalidInput:
    return InvalidInput(
        "wrong type", field=field, expected=expected, got=type(value).__name__, hint=hint
    )


def short(text: str) -> str:
    """A caller's own text as an error repeats it."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def short_name(key: Any) -> str:
    """A key of a caller's map as an error repeats it: in msgpack it may be bytes."""
    return short(key if isinstance(key, str) else repr(key[:MAX_TEXT]))
