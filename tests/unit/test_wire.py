"""Frames, and the promise that garbage raises ProtocolError and nothing else."""

from dataclasses import fields
from typing import get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.exclusions import Excluded
from shardline.shards.core.messages import (
    AttributesReply,
    AttributesRequest,
    DeleteRequest,
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    Proof,
    SearchOptions,
    SearchParams,
    SearchReply,
    SearchRequest,
    UpsertRequest,
    Welcome,
    WriteReply,
)
from shardline.shards.core.schema import Ranked
from shardline.shards.wire.frames import (
    CHEAP_COPY_BYTES,
    HEADER,
    MAX_FRAME_BYTES,
    MESSAGE_TYPES,
    FrameSplitter,
    Message,
    decode_payload,
    encode_frame,
)
from shardline.shards.wire.search_layout import REPLY, REQUEST

FLOATS = np.array([[1.5, -2.0], [0.0, np.inf]], dtype=np.float32)
IDS = np.array([[3, -1], [2**62, 0]], dtype=np.int64)
MESSAGES = [
    Hello(protocol=1, generation=3, shard=2, replica=0, epoch=4, nonce=b"n" * 16),
    Proof(nonce=b"n" * 16, mac=b"m" * 32),
    Welcome(mac=b"m" * 32),
    ErrorReply(code="overloaded", message="später"),
    ErrorReply(code="invalid_input", message="out of range", field="params.nprobe"),
    SearchRequest(queries=FLOATS, k=7, timeout_ms=12.5, params=SearchParams(nprobe=4)),
    SearchReply(ranked=Ranked(IDS, FLOATS), rows=10, generation=57, seq=2**40, search_ms=0.25),
    SearchReply(
        ranked=Ranked(IDS, FLOATS),
        rows=10,
        generation=57,
        seq=2**40,
        search_ms=0.25,
        others_share=0.125,
        matched=0,
    ),
    SearchRequest(
        queries=FLOATS,
        k=7,
        timeout_ms=12.5,
        options=SearchOptions(background=True),
        excluded=Excluded(np.array([0, 3], np.int32), np.array([0, 7, 2**62])),
    ),
    SearchReply(
        ranked=Ranked(IDS, FLOATS),
        rows=10,
        generation=57,
        seq=0,
        search_ms=0.25,
        excluded=np.array([10, 0], np.int32),
    ),
    FetchRequest(item_ids=IDS[0], timeout_ms=3),
    FetchRequest(item_ids=IDS[0], timeout_ms=3, min_seq=(4, 0)),
    FetchReply(item_ids=IDS[0], vectors=FLOATS, generation=57, seq=4),
    FetchReply(item_ids=IDS[0][:0], vectors=FLOATS[:0], generation=57, seq=4),
    AttributesRequest(item_ids=IDS[0], names=("preis", "größe"), timeout_ms=3),
    AttributesReply(
        item_ids=IDS[0],
        names=("a", "b"),
        values=msgpack.packb([[1], ["a"]]),
        kinds=("integer", "text"),
        generation=57,
        seq=4,
    ),
    UpsertRequest(item_ids=IDS[0], vectors=FLOATS, attributes=b"\x80", key="k-1", timeout_ms=3),
    UpsertRequest(
        item_ids=IDS[0], vectors=FLOATS, attributes=b"", key="", timeout_ms=3, features=b"\x90"
    ),
    DeleteRequest(item_ids=IDS[0], key="", timeout_ms=3),
    WriteReply(rows=2, existed=1, generation=57, seq=2**40),
]


def assert_equal(got: object, expected: object) -> None:
    assert type(got) is type(expected)
    for field in fields(expected):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        for x, y in zip(a, b, strict=True) if isinstance(b, Ranked | Excluded) else [(a, b)]:
            if isinstance(y, np.ndarray):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
            else:
                assert x == y


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_round_trip(message) -> None:
    frame = encode_frame(77, message)
    length, request_id = HEADER.unpack(frame[: HEADER.size])
    assert length == len(frame) - HEADER.size
    assert request_id == 77
    assert_equal(decode_payload(frame[HEADER.size :]), message)


def test_every_message_type_is_covered_here() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(Message))


def test_arrays_need_not_be_contiguous() -> None:
    message = SearchRequest(queries=FLOATS.T, k=1, timeout_ms=1.0)
    decoded = decode_payload(encode_frame(1, message)[HEADER.size :])
    np.testing.assert_array_equal(decoded.queries, FLOATS.T)


def test_the_payloads_that_the_bad_ones_start_from_are_good() -> None:
    assert decode_payload(refusal(field="k")) == ErrorReply(code="", message="", field="k")
    assert isinstance(decode_payload(request()), FetchRequest)
    assert isinstance(decode_payload(search()), SearchRequest)
    assert isinstance(decode_payload(found()), SearchReply)


def test_an_oversized_frame_is_not_sent() -> None:
    vectors = np.zeros((1, MAX_FRAME_BYTES // 4 + 1), dtype=np.float32)
    with pytest.raises(ProtocolError, match="frame too large"):
        encode_frame(
            1, FetchReply(item_ids=np.zeros(1, np.int64), vectors=vectors, generation=1, seq=0)
        )


def request(**changes: object) -> bytes:
    content = {"item_ids": ["<i8", [1], bytes(8)], "timeout_ms": 1.0}
    content |= {"min_seq": ["<i8", [0], b""]}
    assert list(content) == [field.name for field in fields(FetchRequest)]
    return msgpack.packb([6, *(content | changes).values()])


def search(data: bytes = bytes(8), **changes: object) -> bytes:
    """A SearchRequest's payload: one query of two numbers."""
    head = {"kind": 4, "n": 1, "dim": 2, "k": 1, "timeout_ms": 1.0}
    head |= {"nprobe": 0, "ef_search": 0, "rerank_factor": 0, "tail": 0, "excluded": 0, "zero": 0}
    return REQUEST.pack(*(head | changes).values()) + data


def found(data: bytes = bytes(24), **changes: object) -> bytes:
    """A SearchReply's payload: two results of one query."""
    head = {"kind": 5, "n": 1, "k": 2, "zero": 0, "generation": 1, "seq": 0, "rows": 10}
    head |= {"search_ms": 0.5, "others_share": 0.25, "matched": -1, "counts": 0, "zeros": 0}
    return REPLY.pack(*(head | changes).values()) + data


def refusal(**changes: object) -> bytes:
    return msgpack.packb([3, *({"code": "", "message": "", "field": None} | changes).values()])


def array(dtype: object, shape: object, data: object) -> dict:
    return {"item_ids": [dtype, shape, data]}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"garbage that is no msgpack",
        msgpack.packb(5),
        msgpack.packb("abc"),
        msgpack.packb([]),
        msgpack.packb([4]),
        msgpack.packb([4, {}]),
        msgpack.packb([4, []]),
        msgpack.packb([99, b""]),
        msgpack.packb([-1, b""]),
        msgpack.packb([True, b"", b""]),
        msgpack.packb([2.0, b""]),
        msgpack.packb(["2", b""]),
        msgpack.packb([None, b""]),
        msgpack.packb({2: b""}),
        msgpack.packb([2, "text"]),
        msgpack.packb([2, b"", 1]),
        msgpack.packb([2, {"mac": b""}]),
        msgpack.packb([2, b""]) + b"trailing",
        msgpack.packb([2, b""])[:-1],
        msgpack.packb([3, "", ""]),
        refusal(code=b"\xff"),
        refusal(field=5),
        refusal(field=b"k"),
        refusal(field=["k"]),
        refusal(code="abc").replace(b"abc", b"a\xffc"),  # invalid UTF-8 in a string
        refusal(code=msgpack.ExtType(5, b"x")),
        refusal(code=msgpack.Timestamp(0)),
        b"\x91" * 2000,  # deep nesting
        b"\xdd\xff\xff\xff\xff",  # an array that claims four billion items
        b"\xc6\xff\xff\xff\xff",  # bytes that claim four gigabytes
        request(timeout_ms=None),
        request(timeout_ms="1"),
        request(timeout_ms=True),
        request(timeout_ms=float("nan")),
        request(timeout_ms=float("inf")),
        request(item_ids=None),
        request(item_ids=[1, 2]),
        request(item_ids=["<i8"]),
        request(item_ids={"dtype": "<i8", "shape": [1], "data": bytes(8)}),
        request(**array("<f8", [1], bytes(8))),
        request(**array(">i8", [1], bytes(8))),
        request(**array("O", [1], bytes(8))),
        request(**array("|O8", [1], bytes(8))),
        request(**array(["<i8"], [1], bytes(8))),
        request(**array("<i8", [1], bytes(7))),
        request(**array("<i8", [1], "text....")),
        request(**array("<i8", [1, 1], bytes(8))),
        request(**array("<i8", 1, bytes(8))),
        request(**array("<i8", [-1], bytes(8))),
        request(**array("<i8", [True], bytes(8))),
        request(**array("<i8", [1.0], bytes(8))),
        request(**array("<i8", [2**63, 0], b"")),
        request(**array("<i8", [0] * 80, b"")),
        request(**array("<f4", [2], bytes(8))),
        request(min_seq=None),
        request(min_seq=[1, 2]),
        request(min_seq=["<f8", [1], bytes(8)]),
        request(min_seq=["<i8", [2], bytes(8)]),
        search()[:-1],
        search()[: REQUEST.size],
        search()[: REQUEST.size - 1],
        search()[:1],
        search() + b"x",
        search(kind=260),  # of which the first byte alone is right
        search(tail=1),
        search(bytes(8) + b"\x80", tail=2),
        search(bytes(8) + b"\xc1", tail=1),
        search(bytes(8) + b"\x01", tail=1),
        search(bytes(8) + b"\x81\xa1x\x01", tail=4),  # an option that nobody knows
        search(n=2),
        search(dim=0),
        search(n=2**32 - 1, dim=2**32 - 1),
        search(zero=1),
        search(bytes(16), excluded=1),
        search(bytes(8 + 8 + 4), excluded=1),  # counts that name no id
        search(bytes(16 + 8) + b"\x03\0\0\0", excluded=2),
        search(bytes(16 + 8) + b"\xff" * 4, excluded=2),
        search(bytes(8 + 16) + b"\x02\0\0\0\xff\xff\xff\xff", n=2, excluded=1),
        search(excluded=2**32 - 1),
        search(timeout_ms=float("nan")),
        search(timeout_ms=float("-inf")),
        found()[:-1],
        found()[: REPLY.size - 1],
        found() + b"x",
        found(kind=261),
        found(zero=1),
        found(k=1),
        found(n=2**32 - 1, k=2**32 - 1),
        found(search_ms=float("inf")),
        found(search_ms=float("nan")),
        found(search_ms=1e306),
        found(others_share=-0.25),
        found(others_share=1.5),
        found(others_share=float("nan")),
        found(zeros=1),
        found(counts=1),
        found(bytes(24 + 8), counts=2),
        found(bytes(24) + b"\xff" * 4, counts=1),
        found(bytes(24) + b"\x0b\0\0\0", counts=1),
        found(matched=-2),
        found(matched=11),
    ],
)
def test_bad_payloads_are_protocol_errors(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_payload(payload)


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_random_bytes_raise_nothing_else(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_payload(payload)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9)
    | st.tuples(
        st.sampled_from(["<f4", "<i8", "O", 1]),
        st.lists(st.integers(-1, 2**64 - 1) | st.integers(0, 2), max_size=3),
        st.binary(max_size=16),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=300)
def test_structured_garbage_raises_nothing_else(data: st.DataObject) -> None:
    """The right number of fields with wrong values, which reach deeper than random bytes do."""
    tag, kind = data.draw(st.sampled_from(sorted(MESSAGE_TYPES.items())))
    payload = msgpack.packb([tag, *(data.draw(VALUES) for _ in fields(kind))])
    try:
        message = decode_payload(payload)
    except ProtocolError:
        return
    assert type(message) is kind


SMALL = st.integers(0, 3) | st.integers(0, 2**32 - 1)


@given(st.tuples(SMALL, SMALL, SMALL), st.floats(), st.binary(max_size=48), st.booleans())
@settings(max_examples=300)
def test_a_layout_with_wrong_sizes_raises_nothing_else(sizes, number, data, asks) -> None:
    n, dim, k = sizes
    if asks:
        payload = search(data, n=n, dim=dim, k=k, timeout_ms=number)
    else:
        payload = found(data, n=n, k=k, search_ms=number)
    try:
        message = decode_payload(payload)
    except ProtocolError:
        return
    held = message.queries.nbytes if asks else sum(each.nbytes for each in message.ranked)
    assert held == len(data)


def test_what_the_layout_cannot_hold_is_refused_by_the_sender() -> None:
    for request in (
        SearchRequest(queries=FLOATS, k=-1, timeout_ms=1.0),
        SearchRequest(queries=FLOATS, k=2**32, timeout_ms=1.0),
        SearchRequest(queries=FLOATS, k=1, timeout_ms=1.0, params=SearchParams(nprobe=2**32)),
        SearchRequest(queries=FLOATS, k=1, timeout_ms=1.0, params=SearchParams(ef_search=0)),
    ):
        with pytest.raises(ProtocolError, match="not fit"):
            encode_frame(1, request)


def test_arrays_of_another_type_arrive_as_the_type_that_travels() -> None:
    ids, scores = np.array([[7, 8]], dtype=np.int32), np.array([[0.5, 0.25]])
    reply = SearchReply(ranked=Ranked(ids, scores), rows=2, generation=1, seq=0, search_ms=0.0)
    decoded = decode_payload(encode_frame(1, reply)[HEADER.size :]).ranked
    assert (decoded.ids.dtype, decoded.scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(decoded.ids, ids)
    np.testing.assert_array_equal(decoded.scores, scores)


@given(st.data())
@settings(max_examples=300)
def test_flipped_bytes_raise_nothing_else(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(MESSAGES))
    payload = bytearray(encode_frame(1, message)[HEADER.size :])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    try:
        decode_payload(bytes(payload))
    except ProtocolError:
        return


@given(st.lists(st.integers(1, 40), max_size=30))
def test_frames_are_cut_wherever_the_stream_breaks(sizes: list[int]) -> None:
    frames = [encode_frame(number, message) for number, message in enumerate(MESSAGES)]
    stream = b"".join(frames)
    splitter = FrameSplitter()
    found = []
    start = 0
    for size in [*sizes, len(stream)]:
        found += splitter.feed(stream[start : start + size])
        start += size
    assert found == [(number, frame[HEADER.size :]) for number, frame in enumerate(frames)]


def test_a_frame_in_one_piece_is_a_view_and_one_in_several_is_copied_once() -> None:
    queries = np.zeros((100, CHEAP_COPY_BYTES // 400 + 1), dtype=np.float32)
    frame = encode_frame(3, SearchRequest(queries=queries, k=7, timeout_ms=1.0))
    ((_, whole),) = FrameSplitter().feed(frame)
    assert whole.obj is frame
    splitter = FrameSplitter()
    assert splitter.feed(frame[:20]) == []
    ((_, joined),) = splitter.feed(frame[20:])
    assert joined == whole
    assert len(joined.obj) == len(frame) - HEADER.size


def test_the_splitter_refuses_a_frame_above_its_limit() -> None:
    splitter = FrameSplitter(limit=10)
    assert splitter.feed(HEADER.pack(10, 7) + bytes(10)) == [(7, bytes(10))]
    with pytest.raises(ProtocolError, match="frame too large"):
        splitter.feed(HEADER.pack(11, 7))
