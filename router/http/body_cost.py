"""What a body will take in memory once it is parsed, bounded before it is parsed.

A byte of JSON or msgpack can stand for a whole Python object: 31 MB of empty maps are 2 GB, and 11
seconds of work. So a large body is counted first, by what its bytes say alone, and refused where
the objects it stands for could take more than ALLOWED_FACTORS times its size (LEAST_ALLOWED_BYTES
for small ones). Nearly all bodies are below COUNTED_FROM and not looked at.
`python -m shardline.bench.load.request_costs` measures what holds.

The sizes are CPython's on a 64-bit machine, rounded up.
"""

import re
from typing import NamedTuple

import numpy as np

from shardline.router.contract import PayloadTooLarge
from shardline.router.http.media import Media

# How many times its size a body's objects may take: with the body, and the copy of it that orjson
# works on, ten times in all
ALLOWED_FACTORS = {Media.JSON: 8, Media.MSGPACK: 9}
# What any request may take, however small it is: a batch of 1024 queries of 1024 numbers, in lists,
# passes in whatever form
LEAST_ALLOWED_BYTES = 64 << 20
MAX_CONTAINERS = 1 << 18  # lists and maps, which cost time as well: a legal batch has thousands
# A byte makes at most 66 bytes, in an empty map of msgpack: smaller bodies take little enough
COUNTED_FROM = 512 << 10
CHUNK = 1 << 18  # bytes counted at a time, so that numpy's masks stay in the cache

NODE = 16  # of the tree that orjson builds first
SLOT = 8  # of a list
NUMBER = 32  # but integers from -5 to 256 are shared
LIST = 80
MAP = 256
MAP_ENTRY = 160  # two slots of the map, and of the pairs that msgpack makes first
TEXT = 64
BYTES_PER_CHARACTER = 4  # of every character, where a text holds one beyond U+FFFF

# A header of msgpack makes room for as many items as it names before there are any, and a thousand
# may be nested: of this length they take 26 MB.
UNCOUNTED_LENGTH = 4096
MAX_TOKENS = 1 << 20  # values of msgpack looked at one by one, at 0.2 microseconds each
SHORT = 8  # a list of fewer values is walked sooner than looked at as a whole
RUN = 64  # numbers of mixed types that are passed over in one step


def refuse_costly(body: bytes, media: Media) -> None:
    """Refuses a body that could take too much memory or time to parse.

    Raises:
        PayloadTooLarge: it could.
    """
    if media is Media.JSON:
        _check_json(body)
    else:
        _check_msgpack(body)


def _check_json(body: bytes) -> None:
    """Counts the characters that no value can do without. Those inside of texts count as well:
    a text has far fewer of them than would matter."""
    commas, lists, maps, colons, quotes = _counts(body, b',[{:"')
    _check_containers(lists + maps)
    values = commas + lists + maps  # each is before a comma, or the last of its container
    # a value takes a character and a separator, one that is no shared object takes two
    objects = min(values, max(0, len(body) - 2 * values))
    _check_cost(
        body,
        Media.JSON,
        (NODE + SLOT) * values
        + NUMBER * objects
        + LIST * lists
        + MAP * maps
        + (MAP_ENTRY + NODE) * colons
        + TEXT // 2 * quotes,
    )


def _counts(body: bytes, characters: bytes) -> list[int]:
    """How often each of the characters stands in the body."""
    counts = [0] * len(characters)
    for start in range(0, len(body), CHUNK):
        part = np.frombuffer(body, np.uint8, min(CHUNK, len(body) - start), start)
        for place, character in enumerate(characters):
            counts[place] += int(np.count_nonzero(part == character))
    return counts


def _check_msgpack(body: bytes) -> None:
    """Walks over the values; numbers in lists are passed over many at a time."""
    end, limit = len(body), _allowed(body, Media.MSGPACK)
    position = cost = tokens = containers = 0
    while position < end:
        kind = _KINDS[body[position]]
        position += 1
        length = kind.length
        if kind.length_bytes:
            length = int.from_bytes(body[position : position + kind.length_bytes])
            position += kind.length_bytes
        position += kind.data_bytes + length * kind.bytes_each
        cost += kind.cost + length * kind.cost_each
        tokens += 1
        if kind.is_container:
            containers += 1
            if length >= SHORT:
                position, numbers = _past_numbers(body, position, length)
                cost += NUMBER * numbers
        if cost > limit or tokens > MAX_TOKENS or containers > MAX_CONTAINERS:
            _check_containers(containers)
            _check_cost(body, Media.MSGPACK, cost)
            raise _too_costly(f"more than {MAX_TOKENS} values of mixed types")


def _past_numbers(body: bytes, position: int, length: int) -> tuple[int, int]:
    """Where the numbers of a list of ``length`` end, or not far before, and how many are passed.

    Each is counted as an object, though integers up to 256 are shared: that bounds the time too.
    Numbers that follow the list may be passed with its own; they count like those.
    """
    code = body[position : position + 1]
    width = _NUMBER_BYTES.get(code)
    if width and body[position : position + length * width : width].count(code) == length:
        return position + length * width, length
    small = _SMALL.match(body, position, position + length)
    assert small is not None  # it may be empty
    count, position = small.end() - position, small.end()
    if length - count >= RUN:
        while found := _MIXED.match(body, position):
            count, position = count + RUN, found.end()
    return position, count


def _allowed(body: bytes, media: Media) -> int:
    return max(LEAST_ALLOWED_BYTES, ALLOWED_FACTORS[media] * len(body))


def _check_containers(containers: int) -> None:
    if containers > MAX_CONTAINERS:
        raise _too_costly(f"more than {MAX_CONTAINERS} lists and maps")


def _check_cost(body: bytes, media: Media, cost: int) -> None:
    if cost > _allowed(body, media):
        raise _too_costly(f"values that may take {cost} bytes of memory")


def _too_costly(got: str) -> PayloadTooLarge:
    return PayloadTooLarge(
        "body too costly to read",
        field="body",
        expected="fewer values, or values of more characters",
        got=got,
        hint="send vectors as arrays in msgpack, or the queries in several requests",
    )


class _Kind(NamedTuple):
    """What follows a first byte of msgpack, and what the value costs in memory: its ``length``, or
    ``length_bytes`` that hold it; then ``data_bytes``, and ``bytes_each`` times the length."""

    cost: int = 0
    data_bytes: int = 0
    length: int = 0
    length_bytes: int = 0
    bytes_each: int = 0
    cost_each: int = 0
    is_container: bool = False


def _kinds() -> list[_Kind]:
    """By first byte; https://github.com/msgpack/msgpack/blob/master/spec.md"""
    number = _Kind(cost=NUMBER)
    text = _Kind(cost=TEXT, bytes_each=1, cost_each=BYTES_PER_CHARACTER)
    binary = _Kind(cost=TEXT, bytes_each=1, cost_each=1)
    extension = binary._replace(cost=MAP)  # for the time that a Timestamp takes; others are refused
    a_list = _Kind(cost=LIST, cost_each=SLOT, is_container=True)
    a_map = _Kind(cost=MAP, cost_each=MAP_ENTRY, is_container=True)
    kinds = [_Kind()] * 256  # small integers, null, true, false: objects that all share
    for first, lengths, kind in ((0x80, 16, a_map), (0x90, 16, a_list), (0xA0, 32, text)):
        for length in range(lengths):
            kinds[first + length] = kind._replace(length=length)
    sized: list[tuple[int, list[int], _Kind]] = [
        (0xC4, [1, 2, 4], binary),
        (0xC7, [1, 2, 4], extension._replace(data_bytes=1)),
        (0xD9, [1, 2, 4], text),
        (0xDC, [2, 4], a_list),
        (0xDE, [2, 4], a_map),
    ]
    for first, widths, kind in sized:
        for place, width in enumerate(widths):
            kinds[first + place] = kind._replace(length_bytes=width)
    fixed: list[tuple[int, list[int], _Kind]] = [
        (0xCA, [4, 8], number),
        (0xCC, [1, 2, 4, 8], number),
        (0xD0, [1, 2, 4, 8], number),
        (0xD4, [2, 3, 5, 9, 17], extension),
    ]
    for first, widths, kind in fixed:
        for place, width in enumerate(widths):
            kinds[first + place] = kind._replace(data_bytes=width)
    kinds[0xE0:] = [number] * 32  # -32 to -1
    return kinds


_KINDS = _kinds()
_SMALL = re.compile(rb"[\x00-\x7f\xe0-\xff]*+")
# 0.04 microseconds per number, and possessive ("+" behind "}"): there is one way to read it only
_MIXED = re.compile(
    rb"(?:[\x00-\x7f\xe0-\xff]|[\xcb\xcf\xd3].{8}|[\xca\xce\xd2].{4}|[\xcc\xd0].|[\xcd\xd1]..){%d}+"
    % RUN,
    re.DOTALL,
)
_NUMBER_BYTES = {bytes([code]): 1 + _KINDS[code].data_bytes for code in range(0xCA, 0xD4)}
