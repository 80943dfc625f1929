"""What is stored of searches and of what came of them: one row per event. Plain data.

A caller's events say what came of a search: a click, a purchase. Two kinds are the router's own: a
search that was answered, and the recall of one that was asked again exactly.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

SEARCH = "search"  # by the router: a search was answered
RECALL = "recall"  # by the router: value is the recall of one search, against the exact answer
OWN = (SEARCH, RECALL)
KIND = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # as names of arms
MAX_ID_CHARS = 128  # of request ids, and of event ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """at: seconds since 1970. event_id: of the caller; the same one again is the same event. arms:
    experiment -> arm. took_ms, k, queries, results: of a search; results are those of all its
    queries together."""

    event: str
    at: float
    key: str | None = None
    request_id: str | None = None
    event_id: str | None = None
    item_id: int | None = None
    value: float | None = None
    arms: Mapping[str, str] = field(default_factory=dict)
    took_ms: float | None = None
    k: int | None = None
    queries: int | None = None
    results: int | None = None
