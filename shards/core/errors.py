"""Every error Shardline raises on purpose, in one tree.

    ShardlineError
    ├── InvalidInput        the caller's request, vector or parameter is wrong      (HTTP 4xx)
    ├── ConfigError         configuration: unknown key, illegal value, bad override
    ├── DataError           a table or text file of the user: schema, line, value
    ├── CorruptFile         a file of the store: checksum, length or header does not match
    ├── NewerFormat         a file of the store written by a newer version of Shardline
    ├── NotFound            a file, generation, user or item that does not exist
    │   └── WritesLost      writes that another generation lacks are not in the log any more
    ├── VersionMismatch     query encoder and generation come from different models
    ├── GateFailed          a generation that does not go live: beyond a bound, or lacking writes
    ├── ProtocolError       a peer broke the wire protocol, or failed to authenticate
    └── Unavailable         cannot be answered now; a later attempt may succeed
        ├── DeadlineExceeded
        ├── Overloaded
        │   └── DeltaFull   a shard takes no more rows before its next compaction
        ├── Behind          a shard has not yet applied the writes that a search asks for
        ├── NotPrimary      this replica does not take writes: another does, or none yet
        ├── ReadOnly        a shard's log cannot be written; searches go on
        │   └── StoreFull   because the disk is full
        ├── ListsUnavailable    a list of items cannot be read from the store now
        └── EncoderUnavailable  the generation's query encoder is damaged, or cannot be read

Each error says what was expected, what was found and what to do. All of them can be pickled,
because Ray carries them between processes.
"""

import re
from typing import Any, ClassVar

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
MAX_LINE = 500  # characters of a foreign message


class ShardlineError(Exception):
    """Base of the tree. ``code`` is stable and machine-readable; the message is for people."""

    code: ClassVar[str] = "error"
    # of a write that some shards have not acknowledged: what is known of its parts, as
    # router.contract.WriteParts; it does not survive pickling
    parts: Any = None

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.expected = expected
        self.got = got
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.field}: {self.details}" if self.field else self.details

    @property
    def details(self) -> str:
        """The message without the field name: problem+json reports the field separately."""
        parts = [self.message]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.hint is not None:
            parts.append(self.hint)
        return "; ".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        details = (self.field, self.expected, self.got, self.hint)
        return _rebuild, (type(self), self.message, *details)


def _rebuild(
    kind: type[ShardlineError],
    message: str,
    field: str | None,
    expected: str | None,
    got: str | None,
    hint: str | None,
) -> ShardlineError:
    return kind(message, field=field, expected=expected, got=got, hint=hint)


class InvalidInput(ShardlineError, ValueError):
    code = "invalid_input"


class ConfigError(ShardlineError):
    code = "invalid_config"


class DataError(ShardlineError):
    code = "invalid_data"


class CorruptFile(ShardlineError):
    code = "corrupt_file"


class NewerFormat(ShardlineError):
    code = "newer_format"


class NotFound(ShardlineError):
    code = "not_found"


class WritesLost(NotFound):
    pass


class VersionMismatch(ShardlineError):
    code = "version_mismatch"


class GateFailed(ShardlineError):
    code = "gate_failed"


class ProtocolError(ShardlineError):
    code = "protocol_error"


class Unavailable(ShardlineError):
    code = "unavailable"


class CardFailed(Unavailable):
    code = "card_failed"


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"


class Overloaded(Unavailable):
    code = "overloaded"


class Behind(Unavailable):
    code = "behind"


class DeltaFull(Overloaded):
    code = "delta_full"


class NotPrimary(Unavailable):
    code = "not_primary"


class ReadOnly(Unavailable):
    code = "read_only"


class StoreFull(ReadOnly):
    code = "store_full"


class ListsUnavailable(Unavailable):
    code = "lists_unavailable"


class EncoderUnavailable(Unavailable):
    code = "encoder_unavailable"


def last_line(error: BaseException) -> str:
    """The last line of a foreign error that says something: what ``got`` takes of it.

    Ray and C++ libraries put whole tracebacks into their messages, in colours, with the reason at
    the end.
    """
    lines = [line.strip() for line in COLOURS.sub("", str(error)).splitlines()]
    telling = [line for line in lines if any(letter.isalnum() for letter in line)]
    return telling[-1][:MAX_LINE] if telling else type(error).__name__


def error_of(code: str, message: str) -> ShardlineError:
    """An error of the class that has this code; of the base class where none has."""
    kinds = [ShardlineError]
    for kind in kinds:
        if kind.code == code:
            return kind(message)
        kinds += kind.__subclasses__()
    return ShardlineError(message)


def too_much_returned(limit: int) -> InvalidInput:
    """More than ``limit`` bytes of attributes in an answer."""
    return InvalidInput(
        "too much to return",
        field="return",
        expected=f"at most {limit >> 20} MiB of attributes in an answer",
        hint="ask for fewer attributes, fewer results or fewer queries",
    )
