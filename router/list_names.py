"""What a list may be called, and how many a search may name. Light: a client imports it.

The characters are those that stand for themselves in the path of a URL (RFC 3986, pchar without
escapes). So a name is never written in two ways, by escapes or by the forms of Unicode.
"""

import re
from typing import Any

from shardline.shards.core.errors import InvalidInput

MAX_NAME = 128
NAME_PATTERN = rf"[A-Za-z0-9._~!$&'()*+,;=:@-]{{1,{MAX_NAME}}}"
NAME = re.compile(NAME_PATTERN)
NAME_RULE = f"1 to {MAX_NAME} letters and digits of ASCII and -._~!$&'()*+,;=:@, not . or .."
# clients and proxies take these out of a path before they send it (RFC 3986, 5.2.4)
DOT_SEGMENTS = (".", "..")
MAX_EXCLUDE_LISTS = 16  # named by one search
LARGEST_LIST = 100_000  # ids; what router.max_list_ids may be at most
MAX_SHOWN = 60


def is_list_name(value: Any) -> bool:
    return isinstance(value, str) and bool(NAME.fullmatch(value)) and value not in DOT_SEGMENTS


def check_list_name(value: Any, field: str = "name") -> str:
    """Raises InvalidInput: no list can be called so."""
    if not is_list_name(value):
        got = repr(value[:MAX_SHOWN]) if isinstance(value, str) else type(value).__name__
        raise InvalidInput("not the name of a list", field=field, expected=NAME_RULE, got=got)
    return str(value)


def check_prefix(value: str, field: str = "prefix") -> str:
    """What names may begin with; empty for all. Raises InvalidInput: none can begin so."""
    if value and not NAME.fullmatch(value):
        raise InvalidInput(
            "no list can be called so",
            field=field,
            expected=f"nothing, or {NAME_RULE}",
            got=repr(value[:MAX_SHOWN]),
        )
    return value
