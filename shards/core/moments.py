"""Moments as ISO 8601 texts, exact to the nanosecond: Python's datetime ends at microseconds."""

import re
from datetime import datetime

NANOSECOND_DIGITS = 9
# of a second's fraction in a time of ISO 8601, extended or basic; those of an offset do not count
_FRACTION = re.compile(r".{7,10}.[0-9:]+[.,]([0-9]+)(?:Z|[+-].*)?")
# of an offset, digits that datetime would cut off
_CUT_OFFSET = re.compile(r"[+-][0-9:]+[.,][0-9]{7,}$")
_MICROSECONDS_END = len("2026-03-01T12:30:00.123456")


def read_moment(text: str) -> tuple[datetime, int]:
    """The moment, and the nanoseconds, 0 to 999, that it is after that.

    Raises:
        ValueError: no time of ISO 8601, or with more than nine digits of a second's fraction.
    """
    found = _FRACTION.fullmatch(text)
    digits = found[1].rstrip("0") if found else ""
    if len(digits) > NANOSECOND_DIGITS:
        raise ValueError(f"{len(digits)} digits of a second's fraction")
    if found is None and _CUT_OFFSET.search(text):
        raise ValueError("an offset finer than microseconds")
    return datetime.fromisoformat(text), int(digits[6:].ljust(3, "0"))


def moment_text(moment: datetime, nanoseconds: int) -> str:
    """As ISO 8601, for ``read_moment``; with nine digits only where the last three are not 0."""
    if not nanoseconds:
        return moment.isoformat()
    text = moment.isoformat(timespec="microseconds")
    return f"{text[:_MICROSECONDS_END]}{nanoseconds:03d}{text[_MICROSECONDS_END:]}"
