"""What the costliest requests take: memory and time of a router's codec for bodies made to hurt.

    python -m shardline.bench.load.request_costs            31 MiB each, as a table for SECURITY.md
    python -m shardline.bench.load.request_costs --mib 4

Each body is read in a process of its own that has read nothing before: ``decode_query``, then what
the router does with the values before it asks a shard (vectors checked, features encoded by a
query tower with a feature of each kind). Memory is the growth of the process's peak, the body
included, over the size of the body; time is processor time. Beside it stands what a fixed piece
of Python took just before and after, so that figures of machines, and of hours, can be compared.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import click
import msgpack
import numpy as np

from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.query import QueryKind
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric, check_ids, query_vectors

DEFAULT_MIB = 31.0
STATUS = Path("/proc/self/status")
PROBE_ROUNDS = 100_000  # 3.5 ms
RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # proc_pid_clear_refs(5)
Body = Callable[[int], bytes]


def _pack(content: Any) -> bytes:
    packed: bytes = msgpack.packb(content)
    return packed


def _repeated(start: bytes, unit: bytes, end: bytes) -> Body:
    return lambda size: start + unit * ((size - len(start) - len(end)) // len(unit)) + end


def _listed(field: str, unit: bytes, inside: bytes = b"") -> Body:
    """A list of ``unit`` under a field, below ``inside``."""

    def body(size: int) -> bytes:
        start = b"\x81" + _pack(field) + inside + b"\xdd"
        count = (size - len(start) - 4) // len(unit)
        return start + count.to_bytes(4) + unit * count

    return body


def _packed(content: Callable[[int], Any]) -> Body:
    return lambda size: _pack(content(size))


def _array(dtype: str, size: int) -> dict[str, Any]:
    count = size // np.dtype(dtype).itemsize
    values = np.random.default_rng(1).integers(300, 2**31, count).astype(dtype)
    return {"dtype": dtype, "shape": [count], "data": values.tobytes()}


def _rows(unit: bytes, queries: int) -> Body:
    """A legal batch of vectors in JSON, all of its numbers ``unit``."""

    def body(size: int) -> bytes:
        row = b"[" + b",".join([unit] * max(1, size // queries // (len(unit) + 1))) + b"]"
        return b'{"vectors":[' + b",".join([row] * queries) + b"]}"

    return body


def _packed_rows(unit: bytes, numbers: int = 1) -> Body:
    """A legal batch of 1024 vectors as lists in msgpack; ``unit`` holds some numbers of them."""

    def body(size: int) -> bytes:
        units = max(1, size // 1024 // len(unit) - 1)
        row = b"\xdd" + (units * numbers).to_bytes(4) + unit * units
        return b"\x81" + _pack("vectors") + b"\xdc\x04\0" + row * 1024

    return body


def _queries(start: bytes, unit: bytes, end: bytes, most: int) -> Body:
    """A batch of 1024 queries by features in JSON, as large as is legal."""

    def body(size: int) -> bytes:
        query = start + unit * (min(size, most) // 1024 // len(unit)) + end
        return b'{"features":[' + b",".join([query] * 1024) + b"]}"

    return body


def _excluding(size: int) -> bytes:
    """A batch of 1024 queries that exclude as many items as are legal, or as fit."""
    count = min(10_000, size // 1024 // 6)
    ids = b"[" + b",".join(b"%d" % item for item in range(10_000, 10_000 + count)) + b"]"
    queries = b",".join([b"1"] * 1024)
    return b'{"item_ids":[' + queries + b'],"exclude":[' + b",".join([ids] * 1024) + b"]}"


def _fields(size: int) -> bytes:
    return b"{" + b",".join(b'"%x":0' % number for number in range(size // 11)) + b"}"


KINDS: dict[tuple[str, Media], Body] = {
    ("vectors of 1024 queries, numbers of 19 digits", Media.JSON): _rows(
        b"0.1234567890123456", 1024
    ),
    ("vectors of 1024 queries, numbers of 7 digits", Media.JSON): _rows(b"-0.123456", 1024),
    ("vectors of 1024 queries, numbers of one digit", Media.JSON): _rows(b"0", 1024),
    ("one vector, numbers of two digits", Media.JSON): _rows(b"0.1", 1),
    ("one vector, negative digits", Media.JSON): _rows(b"-7", 1),
    ("one vector, exponents", Media.JSON): _rows(b"1e9", 1),
    ("one vector, a number of millions of digits", Media.JSON): _repeated(
        b'{"vectors":[[', b"9", b"]]}"
    ),
    ("one vector, numbers of 800 digits", Media.JSON): _rows(b"0." + b"123456789" * 88, 1),
    ("item ids", Media.JSON): _repeated(b'{"item_ids":[', b"1000,", b"1]}"),
    ("exclusions of 1024 queries", Media.JSON): _excluding,
    ("exclusions of one query", Media.JSON): _repeated(
        b'{"item_ids":[1],"exclude":[[', b"1000,", b"1]]}"
    ),
    ("empty lists", Media.JSON): _repeated(b'{"features":[', b"[],", b"[]]}"),
    ("lists of lists", Media.JSON): _repeated(b'{"vectors":[', b"[[[]]],", b"[]]}"),
    ("empty maps", Media.JSON): _repeated(b'{"features":[', b"{},", b"{}]}"),
    ("small maps", Media.JSON): _repeated(b'{"features":[', b'{"a":0},', b"{}]}"),
    ("the same key again and again", Media.JSON): _repeated(b"{", b'"k":1,', b'"k":1}'),
    ("unknown fields", Media.JSON): _fields,
    ("features with many names", Media.JSON): lambda size: b'{"features":[' + _fields(size) + b"]}",
    ("params with many names", Media.JSON): lambda size: b'{"params":' + _fields(size) + b"}",
    ("a long field name", Media.JSON): _repeated(b'{"', b"a", b'":0}'),
    ("a long field name beyond U+FFFF", Media.JSON): _repeated(
        b'{"' + "\U0001f600".encode(), b"a", b'":0}'
    ),
    ("a long feature name", Media.JSON): _repeated(b'{"features":[{"', b"a", b'":0}]}'),
    ("a long text for k", Media.JSON): _repeated(b'{"k":"', b"\\u0001", b'"}'),
    ("names to return", Media.JSON): _repeated(b'{"return":[', b'"ab",', b'"a"]}'),
    ("a long name to return", Media.JSON): _repeated(b'{"item_ids":[1],"return":["', b"a", b'"]}'),
    ("a long text", Media.JSON): _repeated(b'{"features":[{"text":"', b"ab", b'"}]}'),
    ("a long text of ligatures", Media.JSON): _repeated(
        b'{"features":[{"text":"', "\ufdfa".encode(), b'"}]}'
    ),
    ("a long history", Media.JSON): _repeated(b'{"features":[{"past":[', b"123456,", b"1]}]}"),
    ("tags", Media.JSON): _repeated(b'{"features":[{"tags":[', b'"abcdef",', b'"a"]}]}'),
    ("deep nesting", Media.JSON): _repeated(b'{"features":', b"[", b""),
    ("vectors of 1024 queries, lists of float32", Media.MSGPACK): _packed_rows(b"\xca?\x80\0\0"),
    ("vectors of 1024 queries, lists of float64", Media.MSGPACK): _packed_rows(
        b"\xcb?\xf0\0\0\0\0\0\0"
    ),
    ("vectors of 1024 queries, lists of small integers", Media.MSGPACK): _packed_rows(b"\x01"),
    ("vectors of 1024 queries, zeros among float64", Media.MSGPACK): _packed_rows(
        b"\0\xcb?\xf0\0\0\0\0\0\0", 2
    ),
    ("texts of 1024 queries", Media.JSON): _queries(b'{"text":"', b"ab ", b'"}', 1 << 21),
    ("texts of 1024 queries, ligatures", Media.JSON): _queries(
        b'{"text":"', "\ufdfa".encode(), b'"}', 600 << 10
    ),
    ("histories of 1024 queries", Media.JSON): _queries(
        b'{"past":[', b"123456789,", b"1]}", 4 << 20
    ),
    ("tags of 1024 queries", Media.JSON): _queries(
        b'{"tags":[', b'"abcdefghijklm",', b'"a"]}', 2 << 20
    ),
    ("one row of float64", Media.MSGPACK): _listed("vectors", b"\xcb?\xf0\0\0\0\0\0\0", b"\x91"),
    ("one row of float32", Media.MSGPACK): _listed("vectors", b"\xca?\x80\0\0", b"\x91"),
    ("one row of small integers", Media.MSGPACK): _listed("vectors", b"\x01", b"\x91"),
    ("one row of negative integers", Media.MSGPACK): _listed("vectors", b"\xe0", b"\x91"),
    ("one row of 16-bit integers", Media.MSGPACK): _listed("vectors", b"\xcd\x11\x11", b"\x91"),
    ("one row of mixed numbers", Media.MSGPACK): _listed(
        "vectors", b"\xca?\x80\0\0\xcd\x11\x11", b"\x91"
    ),
    ("an array of vectors", Media.MSGPACK): _packed(
        lambda size: {
            "vectors": _array("<f4", size - 99) | {"shape": [256, (size - 99) // 4 // 256]}
        }
    ),
    ("empty maps", Media.MSGPACK): _listed("features", b"\x80"),
    ("empty lists", Media.MSGPACK): _listed("features", b"\x90"),
    ("small maps", Media.MSGPACK): _listed("features", b"\x81\xa1a\0"),
    ("short texts", Media.MSGPACK): _listed("return", b"\xa2ab"),
    ("short binary", Media.MSGPACK): _listed("return", b"\xc4\x02ab"),
    ("times", Media.MSGPACK): _listed("vectors", b"\xd6\xff\0\0\0\0", b"\x91"),
    ("extension types", Media.MSGPACK): _listed("vectors", b"\xd4\x05\0", b"\x91"),
    ("maps of distinct keys", Media.MSGPACK): _packed(
        lambda size: {"features": [{f"{n:x}": 0 for n in range(size // 6)}]}
    ),
    ("nested headers", Media.MSGPACK): lambda size: (
        b"\x81\xa8features" + b"\xdd\x01\0\0\0" * 1000 + bytes(size - 5010)
    ),
    ("small arrays", Media.MSGPACK): _listed(
        "features", _pack({"dtype": "<f4", "shape": [1], "data": bytes(4)})
    ),
    ("an array for a feature", Media.MSGPACK): _packed(
        lambda size: {"features": [{"past": _array("<i4", size - 99)}]}
    ),
    ("a shape of many sizes", Media.MSGPACK): _packed(
        lambda size: {
            "vectors": {"dtype": "<f4", "shape": [2**62] * ((size - 50) // 9), "data": b""}
        }
    ),
    ("a long text for dtype", Media.MSGPACK): _packed(
        lambda size: {"vectors": {"dtype": "\x01" * (size - 50), "shape": [], "data": b""}}
    ),
    ("a long key beyond U+FFFF", Media.MSGPACK): _packed(
        lambda size: {"\U0001f600" + "a" * (size - 50): 0}
    ),
}


def encoder() -> QueryEncoder:
    """A small query tower with a feature of each kind that takes more than a number."""
    width, dim = 8, 16
    rng = np.random.default_rng(0)
    features = [
        {"column": "text", "kind": "text", "buckets": 100, "words": [1, 2], "chars": [3, 5],
         "max_ngrams": 256},
        {"column": "tags", "kind": "multi_valued", "value_type": "string", "values": ["a", "b"],
         "max_length": 16},
        {"column": "past", "kind": "history", "max_length": 50},
    ]  # fmt: skip
    shapes = {
        "embedding.0": (101, width), "embedding.1": (3, width), "history.rows": (1000, width),
        "output.weight": (dim, 3 * width + 2), "output.bias": (dim,),
        "skip.weight": (dim, 3 * width + 2),
    }  # fmt: skip
    weights: dict[str, Any] = {
        name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()
    }
    weights["history.item_ids"] = np.arange(1000)
    return QueryEncoder({"model_version": "m", "dim": dim, "features": features}, weights)


def measure(body: Path, media: Media) -> dict[str, Any]:
    """Reads a body in this process: bytes of memory, seconds of processor, what came of it.

    ``probe_seconds`` is the mean time of the fixed work before and after.
    """
    tower, config = encoder(), RouterConfig()
    _read(b'{"item_ids": [1]}', Media.JSON, tower, config)  # what the first of all requests loads
    probes_s = [_probe()]
    RESET_PEAK[0].write_text(RESET_PEAK[1])
    before, began = _status_bytes("VmRSS"), time.process_time()
    outcome = _read(body.read_bytes(), media, tower, config)
    taken_s = time.process_time() - began
    taken_bytes = _status_bytes("VmHWM") - before
    probes_s.append(_probe())
    return {
        "bytes": taken_bytes, "seconds": taken_s, "probe_seconds": sum(probes_s) / 2,
        "outcome": outcome,
    }  # fmt: skip


def _probe() -> float:
    """Seconds of processor for a loop in Python."""
    began, total = time.process_time(), 0
    for number in range(PROBE_ROUNDS):
        total += number & 7
    return time.process_time() - began


def _read(body: bytes, media: Media, tower: QueryEncoder, config: RouterConfig) -> str:
    try:
        query = decode_query(body, media, config)
        if query.kind is QueryKind.FEATURES:
            missing = {"text": None, "tags": None, "past": None}
            tower.encode([missing | row for row in query.values])
        elif query.kind is QueryKind.ITEM_IDS:
            check_ids(query.values)
        else:
            dim = query.values.shape[1]
            query_vectors(query.values, dim=dim, metric=Metric.COSINE)
    except InvalidInput as error:
        return f"refused: {error.message}"
    return "answered"


def _status_bytes(name: str) -> int:
    (line,) = (each for each in STATUS.read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) << 10


def measured(
    size: int, names: Collection[str] = ()
) -> Iterator[tuple[str, Media, int, dict[str, Any]]]:
    """Every kind, or those of ``names``, at about ``size`` bytes: name, media, size, ``measure``.

    A process for each, forked from this one, so that no memory that another has freed is reused.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, context.Pool(1, maxtasksperchild=1) as forked:
        path = Path(folder) / "body"
        for name, media in KINDS:
            if names and name not in names:
                continue
            length = forked.apply(_write, (path, (name, media), size))
            yield name, media, length, forked.apply(measure, (path, media))


def _write(path: Path, kind: tuple[str, Media], size: int) -> int:
    return path.write_bytes(KINDS[kind](size))


@click.command(help=__doc__)
@click.option("--mib", default=DEFAULT_MIB, show_default=True, help="MiB of each body.")
@click.option(
    "--body",
    "names",
    multiple=True,
    type=click.Choice(sorted({name for name, _ in KINDS})),
    metavar="NAME",
    help="Only the bodies of this name; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object per body instead of a table.")
def main(mib: float, names: tuple[str, ...], as_json: bool) -> None:
    if not as_json:
        click.echo(f"Bodies of at most {mib:g} MiB\n")
        click.echo("| body | format | MiB | memory, x its size | processor, s | outcome |")
        click.echo("|---|---|---|---|---|---|")
    for name, media, size, cost in measured(int(mib * (1 << 20)), names):
        if as_json:
            click.echo(json.dumps({"body": name, "format": media, "size": size, **cost}))
            continue
        factor, kind = cost["bytes"] / size, media.removeprefix("application/")
        figures = f"{size / (1 << 20):.1f} | {factor:.1f} | {cost['seconds']:.2f}"
        click.echo(f"| {name} | {kind} | {figures} | {cost['outcome']} |")


if __name__ == "__main__":
    main()
