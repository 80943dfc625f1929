"""What a body may take in memory and processor time, as docs/SECURITY.md says it.

``bench.load.request_costs`` measures it: each body in a process of its own, by the peak of its
resident memory, because orjson and numpy take memory that Python does not count.
"""

import bisect
import contextlib
import gc
import itertools
import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardline.bench.load.request_costs import KINDS
from shardline.router.contract import PayloadTooLarge
from shardline.router.http import body_cost, body_values, feature_values
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.ngrams import ngram_buckets

MIB = 1 << 20
SIZE_MIB = 4  # of a body; tests/machines/test_large_requests.py has 31
FACTOR = 10
LEAST_BYTES = body_cost.LEAST_ALLOWED_BYTES + 4 * MIB  # and what the process itself grows by
# Processor time grows with a body up to a second for 31 MiB. Texts stop growing sooner, at their
# limit of characters, and values of msgpack that are counted one by one at a million of those.
SECONDS_PER_MIB = 1 / 31
ALLOWANCE_S = 0.2  # beside that: twice what the costliest takes
BOUNDED_S = 1.0  # as docs/SECURITY.md says; a million values take 0.5 s, the texts 0.4 s
PROBE_S = 0.0035  # of the machine those figures are of; another, or a busy one, is slower at both
BOUNDED = {
    "texts of 1024 queries, ligatures", "texts of 1024 queries", "short binary", "short texts",
    "times", "extension types",
}  # fmt: skip
CONFIG = RouterConfig()
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False)
    | st.integers(-40, 300) | st.text(max_size=5)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


MEASUREMENTS = 4  # at most, of a body whose time is over the limit: other work only adds to it
PAUSE_S = 1.0  # before another one


def _measured(*options: str) -> dict[tuple[str, str], dict]:
    """By kind of body: its size and what it cost. Measured from a process without threads."""
    command = [sys.executable, "-m", "shardline.bench.load.request_costs", "--json", *options]
    run = subprocess.run(
        [*command, "--mib", str(SIZE_MIB)], check=True, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {(row["body"], row["format"]): row for row in rows}


@pytest.fixture(scope="module")
def costs():
    return _measured()


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_no_body_costs_more_than_ten_times_its_size(costs, kind) -> None:
    cost = costs[kind]
    assert cost["bytes"] <= max(FACTOR * cost["size"], LEAST_BYTES + cost["size"])
    growing_s = SECONDS_PER_MIB * cost["size"] / MIB + ALLOWANCE_S
    limit_s = BOUNDED_S if kind[0] in BOUNDED else growing_s
    taken_s = [cost["seconds"] * PROBE_S / cost["probe_seconds"]]
    while taken_s[-1] > limit_s and len(taken_s) < MEASUREMENTS:
        time.sleep(PAUSE_S)
        again = _measured("--body", kind[0])[kind]
        taken_s.append(again["seconds"] * PROBE_S / again["probe_seconds"])
    assert taken_s[-1] <= limit_s, taken_s


def test_a_legal_batch_of_vectors_is_answered_in_either_form(costs) -> None:
    answered = {name for (name, _), row in costs.items() if row["outcome"] == "answered"}
    legal = {name for name, _ in KINDS if name.startswith("vectors of 1024 queries")}
    # a batch of zeros is read, and refused by the metric; 4 million numbers are too many
    assert legal - answered == {
        "vectors of 1024 queries, numbers of one digit",
        "vectors of 1024 queries, lists of small integers",
    }


def _numbers(kind: str) -> list[list[float]]:
    rng = np.random.default_rng(0)
    if kind == "3 decimals":
        return rng.uniform(-1, 1, (1024, 768)).round(3).tolist()
    if kind == "int8":
        return rng.integers(-128, 128, (1024, 1024)).tolist()
    if kind == "longer int8":
        return rng.integers(-128, 128, (1024, 1100)).tolist()
    if kind == "zeros":
        return [[0] * 1536] * 1024
    values = rng.random((1024, 1024))
    return [[0 if each < 0.5 else each for each in row] for row in values.tolist()]


@pytest.mark.parametrize("media", list(Media))
@pytest.mark.parametrize(
    "kind", ["3 decimals", "int8", "longer int8", "zeros", "zeros among floats"]
)
def test_legal_batches_of_short_numbers_are_read(kind: str, media: Media) -> None:
    rows = _numbers(kind)
    body = (orjson.dumps if media is Media.JSON else msgpack.packb)({"vectors": rows})
    values = decode_query(body, media, CONFIG).values
    np.testing.assert_array_equal(values, np.array(rows))


@pytest.mark.parametrize(
    ("media", "each"),
    [(Media.JSON, body_cost.NODE + body_cost.SLOT + body_cost.NUMBER),
     (Media.MSGPACK, body_cost.SLOT + body_cost.NUMBER)],
)  # fmt: skip
def test_where_refusals_begin_is_what_security_md_says(media: Media, each: int) -> None:
    most = body_cost.LEAST_ALLOWED_BYTES // each
    text = (Path(__file__).parents[2] / "docs" / "SECURITY.md").read_text()
    assert f"{most // 1000 * 1000:,} numbers" in text
    pack = orjson.dumps if media is Media.JSON else msgpack.packb
    for count, fits in ((most - 2000, True), (most + 10, False)):
        rows = [[100] * (count // 8)] * 8
        with contextlib.nullcontext() if fits else pytest.raises(PayloadTooLarge):
            body_cost.refuse_costly(pack({"vectors": rows}), media)


# each of another type in msgpack, and of bytes that would be empty lists
DECEPTIVE = [
    *(int.from_bytes(b"\x90" * width) for width in (1, 2, 4, 8)),
    *(int.from_bytes(b"\x90" * width, signed=True) for width in (1, 2, 4, 8)),
    float(np.frombuffer(b"\x90" * 4, ">f4")[0]),
]
NUMBERS = st.lists(
    st.sampled_from(DECEPTIVE)
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-140, 300)
    | st.integers(-70000, 70000)
    | st.floats(allow_nan=False, width=32),
    min_size=1,
)


@example(few=DECEPTIVE, times=40, between=[], is_single=True, cut=0)
@example(few=DECEPTIVE, times=40, between=[], is_single=False, cut=0)
@given(
    few=NUMBERS,
    times=st.integers(1, 40),
    between=st.lists(VALUES, max_size=3),
    is_single=st.booleans(),
    cut=st.integers(0, 12),
)
@settings(max_examples=60, deadline=None)
def test_numbers_passed_over_at_once_count_like_those_walked_one_by_one(
    few, times, between, is_single, cut
) -> None:
    """The number of lists and maps tells whether what follows the numbers was read as it is."""
    numbers = msgpack.packb(few * times, use_single_float=is_single)
    others, none = msgpack.packb(between), msgpack.packb([[]])
    body = b"\x96" + others + numbers + none + others + b"\x81\xa1a" + numbers + none
    body = body[: len(body) - cut]

    def containers(short: int) -> int:
        def fits(most: int) -> bool:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(body_cost, "SHORT", short)
                patch.setattr(body_cost, "MAX_CONTAINERS", most)
                try:
                    body_cost.refuse_costly(body, Media.MSGPACK)
                except PayloadTooLarge:
                    return False
                return True

        return bisect.bisect_left(range(1 << 14), True, key=fits)

    assert containers(body_cost.SHORT) == containers(1 << 60) > 0
    each = [msgpack.packb(number, use_single_float=is_single) for number in few * times]
    ends = [0, *itertools.accumulate(map(len, each))]
    end, count = body_cost._past_numbers(b"".join(each), 0, len(each))
    assert end == ends[count]
    assert len(each) - count < body_cost.RUN


@pytest.mark.parametrize("few", [[0], [0, 255], [-1, -127], [0.5, 1], [-5000, 2**40]])
def test_lists_of_numbers_are_not_walked_in_python(few: list[float], monkeypatch) -> None:
    """A list longer than those that go uncounted must not hold up the router's event loop."""
    body = msgpack.packb([few * 30 * body_cost.UNCOUNTED_LENGTH])
    monkeypatch.setattr(body_cost, "MAX_TOKENS", 100)
    body_cost.refuse_costly(body, Media.MSGPACK)


def test_counting_many_other_values_is_not_for_the_event_loop() -> None:
    names = msgpack.packb({"return": ["ab"] * 3 * body_cost.UNCOUNTED_LENGTH})
    assert len(names) > body_values.COUNTED_IN_LOOP
    with pytest.raises(body_values.TakesLong):
        decode_query(names, Media.MSGPACK, CONFIG, in_loop=True)
    with pytest.raises(InvalidInput, match="return"):
        decode_query(names, Media.MSGPACK, CONFIG)
    time = msgpack.Timestamp(1)
    for value in ({}, [], {"a": 0}, time, {"dtype": "<f4", "shape": [1], "data": bytes(4)}):
        body = msgpack.packb({"features": [[value] * 4000] * 2 + [["a" * 30] * 1000]})
        with pytest.raises(body_values.TakesLong):
            decode_query(body, Media.MSGPACK, CONFIG, in_loop=True)
        with pytest.raises(InvalidInput):
            decode_query(body, Media.MSGPACK, CONFIG)
    few = msgpack.packb({"return": ["a"] * (body_cost.UNCOUNTED_LENGTH + 1)})
    assert len(few) < body_values.COUNTED_IN_LOOP
    with pytest.raises(InvalidInput, match="return"):
        decode_query(few, Media.MSGPACK, CONFIG, in_loop=True)


@pytest.mark.parametrize("media", list(Media))
@given(value=VALUES, before=VALUES, depth=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_what_is_not_refused_takes_no_more_than_is_allowed(media, value, before, depth) -> None:
    """Any structure repeated to 100 KB, as if none were small enough to take what it likes."""
    pack = orjson.dumps if media is Media.JSON else msgpack.packb
    for _ in range(depth):
        value = [before, value]
    content = {"features": [value] * max(1, 100_000 // len(pack(value)))}
    body = pack(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_cost, "LEAST_ALLOWED_BYTES", 0)
        try:
            body_cost.refuse_costly(body, media)
        except PayloadTooLarge:
            return
    gc.collect()
    tracemalloc.start()
    kept = (orjson.loads if media is Media.JSON else msgpack.unpackb)(body)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if media is Media.JSON:  # its peak is room for a tree of which no more than this is touched
        peak = held + body_cost.NODE * sum(map(body.count, (b",", b"[", b"{", b":")))
    del kept
    assert peak <= body_cost.ALLOWED_FACTORS[media] * len(body) + 4096


@pytest.mark.parametrize(
    "code", [b"\xdc\xff\xff", b"\xdd\x00\x01\x00\x00", b"\xdf\x00\x01\x00\x00\xa1a"]
)
@pytest.mark.parametrize("size", [0, 1 * MIB])
def test_nested_headers_make_no_room_for_items_that_do_not_come(code, size) -> None:
    body = b"\x81\xa7vectors" + code * 1000 + bytes(size)
    tracemalloc.start()
    with pytest.raises(InvalidInput):
        decode_query(body, Media.MSGPACK, CONFIG)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= LEAST_BYTES + 16 * MIB  # the sizes asked for, not all of which are touched


def test_lists_longer_than_those_that_go_uncounted_are_read() -> None:
    numbers = list(range(3 * body_cost.UNCOUNTED_LENGTH))
    assert decode_query(msgpack.packb({"vectors": [numbers]}), Media.MSGPACK, CONFIG).values.size
    with pytest.raises(InvalidInput, match="not msgpack"):
        decode_query(msgpack.packb({"vectors": [numbers]})[:-1], Media.MSGPACK, CONFIG)


@pytest.mark.parametrize("content", [{}, {"params": {}}])
def test_one_of_many_unknown_fields_is_named(content) -> None:
    inner = content.get("params", content)
    inner |= {f"{number:06x}": 0 for number in range(5000)}
    with pytest.raises(InvalidInput, match="unknown field") as caught:
        decode_query(orjson.dumps(content), Media.JSON, CONFIG)
    assert caught.value.field.endswith("000000")


def test_small_bodies_are_not_counted(monkeypatch) -> None:
    monkeypatch.setattr(body_values, "refuse_costly", None)
    vectors = np.random.default_rng(0).random((64, 128), np.float32)
    array = {"dtype": "<f4", "shape": [64, 128], "data": vectors.tobytes()}
    decode_query(msgpack.packb({"vectors": array}), Media.MSGPACK, CONFIG)
    decode_query(orjson.dumps({"vectors": vectors.tolist()}), Media.JSON, CONFIG)


def test_large_lists_of_vectors_read_as_small_ones_do() -> None:
    rows = np.random.default_rng(0).random((600, 512)).tolist()
    assert len(rows) * len(rows[0]) > 1 << 18
    for pack, media in ((orjson.dumps, Media.JSON), (msgpack.packb, Media.MSGPACK)):
        values = decode_query(pack({"vectors": rows}), media, CONFIG).values
        np.testing.assert_array_equal(values, np.array(rows))


@pytest.mark.parametrize(
    "features",
    [
        [{"past": [1] * (feature_values.MAX_VALUES + 1)}],
        [{"text": "a" * (feature_values.MAX_CHARACTERS + 1)}],
        [{"text": "é" * (feature_values.MAX_CHARACTERS // 10 + 1)}],
        [{"tags": ["a" * 1000] * (feature_values.MAX_CHARACTERS // 1000 + 1)}],
        [{"past": [1] * (feature_values.MAX_VALUES // 10)}] * 11,
    ],
    ids=["values", "text", "text beyond ASCII", "texts in a list", "values of all queries"],
)
def test_features_are_bounded(features) -> None:
    with pytest.raises(PayloadTooLarge, match="features too large"):
        feature_values.checked_features(features)


def test_ngrams_of_an_endless_word_are_those_that_are_asked_for() -> None:
    word = "abcdefghij" * 200_000
    began = time.process_time()
    found = ngram_buckets(word, buckets=1000, words=(1, 2), chars=(3, 5), limit=64)
    assert time.process_time() - began < 0.5  # all of its n-grams take 2 s
    assert (
        found[1:]
        == ngram_buckets(word[:500], buckets=1000, words=(1, 2), chars=(3, 5), limit=64)[1:]
    )


def test_names_to_return_are_bounded() -> None:
    body = orjson.dumps({"item_ids": [1], "return": ["a" * (1 << 16), "b"]})
    with pytest.raises(InvalidInput, match="names too long"):
        decode_query(body, Media.JSON, CONFIG)
