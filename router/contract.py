"""What the server and the clients of the HTTP API both know. Light: a client imports it.

The form of an API key, the errors that only HTTP has, what an answer says besides its results, and
arrays in msgpack bodies:
``{"dtype": "<f4", "shape": [n, d], "data": bin}``, C order, at most 2-d.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from shardline.shards.core.errors import InvalidInput, VersionMismatch
from shardline.shards.core.schema import FloatArray

MSGPACK_TYPE = "application/msgpack"
PROBLEM_TYPE = "application/problem+json"  # RFC 9457

MIN_KEY_CHARS = 32  # 128 bits even where a key is hexadecimal
MAX_KEY_CHARS = 256
# what a Bearer token may be made of (RFC 6750, section 2.1)
KEY = re.compile(rf"(?=.{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}$)[A-Za-z0-9._~+/-]+=*")

ARRAY_KEYS = {"dtype", "shape", "data"}
ARRAY_DTYPES = {name: np.dtype(name) for name in ("<f4", "<f8", "<i4", "<i8")}
ARRAY_NAMES = {dtype: name for name, dtype in ARRAY_DTYPES.items()}  # dtype.str builds it anew
MAX_NDIM = 2
MAX_WRITE_ITEMS = 10_000  # of one request to write
MAX_EVENTS = 10_000  # of one request to store events
WRITE_KEY = re.compile(r"[!-~]{1,128}")  # what an Idempotency-Key may be
WRITE_KEY_HEADER = "Idempotency-Key"
PLAIN_KINDS = "biufU"  # numpy kinds whose values JSON and msgpack have: bool, numbers, text


class PayloadTooLarge(InvalidInput):
    code = "payload_too_large"


class UnsupportedMediaType(InvalidInput):
    code = "unsupported_media_type"


class NotAcceptable(InvalidInput):
    code = "not_acceptable"


class MethodNotAllowed(InvalidInput):
    code = "method_not_allowed"


class BodyTimeout(InvalidInput):
    code = "body_timeout"


class Unauthenticated(InvalidInput):
    code = "unauthenticated"


class Forbidden(InvalidInput):
    """``scope``: that of a key which would be let in; empty where that is not known."""

    code = "forbidden"

    def __init__(self, message: str, *, scope: str = "", **details: str | None) -> None:
        super().__init__(message, **details)
        self.scope = scope


class OtherModel(VersionMismatch):
    """A write names another model version than the generation's."""


REFUSALS = (
    PayloadTooLarge,
    UnsupportedMediaType,
    NotAcceptable,
    MethodNotAllowed,
    BodyTimeout,
    Unauthenticated,
    Forbidden,
)


class ReasonCode(StrEnum):
    """Why a query of a batch has no answer, or a short one."""

    NOT_FOUND = "not_found"  # no shard holds the item
    NOT_FOUND_PARTIAL = "not_found_partial"  # no shard that answered holds it, and one did not
    FILTER = "filter"  # fewer items match its filter than were asked for
    EXCLUSION = "exclusion"  # items that it excludes are those that are missing
    COVERAGE = "coverage"  # a shard that did not answer may have more
    PROBE_LIMIT = "probe_limit"  # its search parameters visit too few items
    CAP = "cap"  # its caps refuse the items that there are beyond those


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why the query at position ``query`` has an empty or a short answer: a stable code, a text for
    people.

    code is a ``ReasonCode``, or what a newer server says. matched: of code ``filter``, how many
    items match, in the shards that answered, without the item that was asked with; else None.
    count: of code ``exclusion``, how many items it excludes, of those that match its filter;
    ``coverage``: how many were not searched; ``probe_limit``: how many results are missing.
    """

    query: int
    code: str
    text: str
    matched: int | None = None
    count: int | None = None

    @property
    def content(self) -> dict[str, Any]:
        """As bodies have it, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Degraded:
    """Why a shard is missing from an answer; ``code`` is that of an error of shards.core.errors."""

    shard: int
    code: str
    text: str

    def __str__(self) -> str:
        return f"shard {self.shard}: {self.text}"


@dataclass(slots=True, kw_only=True)  # not frozen: every search makes one, in a third of the time
class Coverage:
    """How much of the corpus an answer saw; ``degraded`` says why each missing shard is missing.

    Where items were looked up and some not found, a shard that missed the look-up is missing too.

    Rows are as the shard counts them where it answered, as the routing table does elsewhere.
    """

    shards_asked: int
    shards_answered: int
    rows_asked: int
    rows_answered: int
    degraded: tuple[Degraded, ...]

    @property
    def share(self) -> float:
        """Rows answered of rows asked, 0 to 1; shards instead of rows while there are no rows."""
        if self.rows_asked:
            return self.rows_answered / self.rows_asked
        return self.shards_answered / self.shards_asked if self.shards_asked else 0.0

    def joined(self, other: "Coverage") -> "Coverage":
        """Of an answer that needed both: the counts of the smaller, every reason of either."""
        smaller = min(self, other, key=lambda coverage: coverage.share)
        return replace(smaller, degraded=tuple(dict.fromkeys(self.degraded + other.degraded)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemAnswer:
    """One item's stored vector (dim,) float32, its attributes, and the shard that holds it.

    seq: how many writes that shard had applied.
    """

    item_id: int
    vector: FloatArray
    attributes: Mapping[str, Any]
    shard: int
    seq: int
    generation: int
    model_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPart:
    """Items of a write that their shard has not acknowledged; ``code`` as of ``Degraded``."""

    shard: int
    code: str
    text: str
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteParts:
    """``parts`` of the error of a write that not every shard has acknowledged.

    applied_items: those that were. The same request with the same idempotency_key applies what is
    missing, and nothing twice.
    """

    failed: tuple[FailedPart, ...]
    applied_items: int
    idempotency_key: str


def pack_array(value: Any) -> Any:
    """``default`` of ``msgpack.packb``: numpy arrays and scalars in a form that msgpack has.

    Arrays of other number types than ``ARRAY_DTYPES`` become lists.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, np.ndarray):
        name = ARRAY_NAMES.get(value.dtype)
        if name is not None:
            data = np.ascontiguousarray(value).tobytes()
            return {"dtype": name, "shape": value.shape, "data": data}
        if value.dtype.kind in PLAIN_KINDS:
            return value.tolist()
    elif isinstance(value, np.generic) and value.dtype.kind in PLAIN_KINDS:
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in msgpack")


def array_of(value: dict[str, Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """The array that a map with exactly ``ARRAY_KEYS`` stands for; read-only, shares its bytes.

    Raises:
        InvalidInput: another type, a wrong shape, or data of another length.
    """
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if not isinstance(dtype, str) or dtype not in ARRAY_DTYPES:
        raise InvalidInput(
            "array type not supported",
            field="dtype",
            expected=f"one of {', '.join(sorted(ARRAY_DTYPES))}",
            got=repr(dtype[:40]) if isinstance(dtype, str) else type(dtype).__name__,
        )
    is_short = isinstance(shape, list) and len(shape) <= MAX_NDIM
    are_sizes = is_short and {int}.issuperset(map(type, shape))
    if not are_sizes or min(shape, default=0) < 0:
        raise InvalidInput(
            "bad array",
            field="shape",
            expected=f"a list of at most {MAX_NDIM} sizes",
            got=repr(shape) if are_sizes else type(shape).__name__,
        )
    kind = ARRAY_DTYPES[dtype]
    expected = math.prod(shape) * kind.itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise InvalidInput(
            "bad array",
            field="data",
            expected=f"{expected} bytes for shape {shape}",
            got=got,
        )
    return np.frombuffer(data, dtype=kind).reshape(shape)
