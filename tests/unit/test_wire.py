"""Frames, the handshake, and the promise that garbage raises ProtocolError and nothing else."""

from dataclasses import fields, replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ProtocolError
from shards.types import (
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    Proof,
    SearchParams,
    SearchReply,
    SearchRequest,
    Welcome,
)
from shards.wire import (
    HEADER,
    MAX_FRAME_BYTES,
    MESSAGE_TYPES,
    PROTOCOL_VERSION,
    FrameSplitter,
    _mac,
    check_welcome,
    decode_payload,
    encode_frame,
    new_hello,
    prove,
    welcome,
)

FLOATS = np.array([[1.5, -2.0], [0.0, np.inf]], dtype=np.float32)
IDS = np.array([[3, -1], [2**62, 0]], dtype=np.int64)
MESSAGES = [
    Hello(protocol=1, shard=2, generation=3, epoch=4, nonce=b"n" * 16),
    Proof(nonce=b"n" * 16, mac=b"m" * 32),
    Welcome(mac=b"m" * 32),
    ErrorReply(code="overloaded", message="später"),
    ErrorReply(code="invalid_input", message="out of range", field="params.nprobe"),
    SearchRequest(queries=FLOATS, k=7, timeout_ms=12.5, params=SearchParams(nprobe=4)),
    SearchReply(ids=IDS, scores=FLOATS, rows=10, search_ms=0.25),
    FetchRequest(item_ids=IDS[0], timeout_ms=3),
    FetchReply(item_ids=IDS[0], vectors=FLOATS),
    FetchReply(item_ids=IDS[0][:0], vectors=FLOATS[:0]),
]


def assert_equal(got: object, expected: object) -> None:
    assert type(got) is type(expected)
    for field in fields(expected):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_round_trip(message) -> None:
    frame = encode_frame(77, message)
    length, request_id = HEADER.unpack(frame[: HEADER.size])
    assert length == len(frame) - HEADER.size
    assert request_id == 77
    assert_equal(decode_payload(frame[HEADER.size :]), message)


def test_every_message_type_is_covered_here() -> None:
    assert {type(message) for message in MESSAGES} == set(MESSAGE_TYPES)


def test_arrays_need_not_be_contiguous() -> None:
    message = SearchRequest(queries=FLOATS.T, k=1, timeout_ms=1.0)
    decoded = decode_payload(encode_frame(1, message)[HEADER.size :])
    np.testing.assert_array_equal(decoded.queries, FLOATS.T)


def test_the_payloads_that_the_bad_ones_start_from_are_good() -> None:
    assert decode_payload(refusal(field="k")) == ErrorReply(code="", message="", field="k")
    assert isinstance(decode_payload(request()), SearchRequest)


def test_an_oversized_frame_is_not_sent() -> None:
    vectors = np.zeros((1, MAX_FRAME_BYTES // 4 + 1), dtype=np.float32)
    with pytest.raises(ProtocolError, match="frame too large"):
        encode_frame(1, FetchReply(item_ids=np.zeros(1, np.int64), vectors=vectors))


def request(**changes: object) -> bytes:
    content = {
        "queries": ["<f4", [1, 2], bytes(8)],
        "k": 1,
        "timeout_ms": 1.0,
        "params": [None, None, None],
    }
    assert list(content) == [field.name for field in fields(SearchRequest)]
    return msgpack.packb([4, *(content | changes).values()])


def refusal(**changes: object) -> bytes:
    return msgpack.packb([3, *({"code": "", "message": "", "field": None} | changes).values()])


def array(dtype: object, shape: object, data: object) -> dict:
    return {"queries": [dtype, shape, data]}


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
        request(k="1"),
        request(k=True),
        request(k=1.0),
        request(timeout_ms=None),
        request(timeout_ms=float("nan")),
        request(timeout_ms=float("inf")),
        request(params=None),
        request(params=[]),
        request(params={"nprobe": 4}),
        request(params=[0, None, None]),
        request(params=[1.5, None, None]),
        request(params=[True, None, None]),
        request(params=[None, None, None, 1]),
        request(queries=None),
        request(queries=[[1.0, 2.0]]),
        request(queries=["<f4"]),
        request(queries={"dtype": "<f4", "shape": [1, 2], "data": bytes(8)}),
        request(**array("<f8", [1, 1], bytes(8))),
        request(**array(">f4", [1, 2], bytes(8))),
        request(**array("O", [1, 1], bytes(8))),
        request(**array("|O8", [1, 1], bytes(8))),
        request(**array(["<f4"], [1, 2], bytes(8))),
        request(**array("<f4", [1, 2], bytes(7))),
        request(**array("<f4", [1, 2], "text....")),
        request(**array("<f4", [2], bytes(8))),
        request(**array("<f4", 2, bytes(8))),
        request(**array("<f4", [-1, -2], bytes(8))),
        request(**array("<f4", [True, 2], bytes(8))),
        request(**array("<f4", [1.0, 2.0], bytes(8))),
        request(**array("<f4", [2**63, 0], b"")),
        request(**array("<f4", [0] * 80, b"")),
        request(**array("<i8", [1, 1], bytes(8))),
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
    tag = data.draw(st.integers(0, len(MESSAGE_TYPES) - 1))
    names = [field.name for field in fields(MESSAGE_TYPES[tag])]
    payload = msgpack.packb([tag, *(data.draw(VALUES) for _ in names)])
    try:
        message = decode_payload(payload)
    except ProtocolError:
        return
    assert type(message) is MESSAGE_TYPES[tag]


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


def test_the_splitter_refuses_a_frame_above_its_limit() -> None:
    splitter = FrameSplitter(limit=10)
    assert splitter.feed(HEADER.pack(10, 7) + bytes(10)) == [(7, bytes(10))]
    with pytest.raises(ProtocolError, match="frame too large"):
        splitter.feed(HEADER.pack(11, 7))


SECRET = b"s" * 32
HERE = ("127.0.0.1", 4000)


def test_both_sides_prove_the_secret() -> None:
    hello = new_hello(shard=1, generation=2, epoch=3)
    said, proof, mac = prove(hello, SECRET, HERE)
    assert said == hello
    check_welcome(welcome(proof, SECRET, hello, HERE), mac)


def test_nonces_are_never_reused() -> None:
    hellos = [new_hello(shard=1, generation=2, epoch=3) for _ in range(50)]
    assert len({hello.nonce for hello in hellos}) == 50
    assert len({prove(hellos[0], SECRET, HERE)[1].nonce for _ in range(50)}) == 50


def test_a_wrong_secret_is_refused_by_either_side() -> None:
    hello = new_hello(shard=1, generation=2, epoch=3)
    _, proof, mac = prove(hello, b"another", HERE)
    with pytest.raises(ProtocolError, match="no proof of the cluster secret"):
        welcome(proof, SECRET, hello, HERE)
    forged = welcome(proof, b"another", hello, HERE)
    check_welcome(forged, mac)
    with pytest.raises(ProtocolError, match="server does not know"):
        check_welcome(forged, prove(hello, SECRET, HERE)[2])


def test_a_replayed_or_reflected_proof_is_refused() -> None:
    first, second = (new_hello(shard=1, generation=2, epoch=3) for _ in range(2))
    _, proof, _ = prove(first, SECRET, HERE)
    with pytest.raises(ProtocolError):
        welcome(proof, SECRET, second, HERE)
    accepted = welcome(proof, SECRET, first, HERE)
    with pytest.raises(ProtocolError):  # the server's own mac does not pass for a client's
        welcome(replace(proof, mac=accepted.mac), SECRET, first, HERE)


ELSEWHERE = ("127.0.0.1", 4001)
# what somebody in between may want to pass a proof on to
OTHERS = [
    ({"shard": 2}, HERE),
    ({"generation": 3}, HERE),
    ({"epoch": 4}, HERE),
    ({"protocol": PROTOCOL_VERSION + 1}, HERE),
    ({}, ELSEWHERE),
    ({}, ("127.0.0.2", HERE[1])),
]


@pytest.mark.parametrize(("changes", "address"), OTHERS)
def test_a_proof_is_good_for_the_server_it_was_made_for_and_no_other(changes, address) -> None:
    hello = new_hello(shard=1, generation=2, epoch=3)
    other = replace(hello, **changes)  # the nonce stays, as when a greeting is passed on
    _, proof, mac = prove(hello, SECRET, HERE)
    with pytest.raises(ProtocolError, match="for this server"):
        welcome(proof, SECRET, other, address)
    same_nonce = replace(proof, mac=_mac(SECRET, "client", other, address, proof.nonce))
    of_other = welcome(same_nonce, SECRET, other, address)
    with pytest.raises(ProtocolError, match="server does not know"):
        check_welcome(of_other, mac)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_only_the_right_message_greets(message) -> None:
    hello = new_hello(shard=1, generation=2, epoch=3)
    with pytest.raises(ProtocolError):
        welcome(message, SECRET, hello, HERE)
    with pytest.raises(ProtocolError):
        check_welcome(message, b"x" * 32)
    if not isinstance(message, Hello):
        with pytest.raises(ProtocolError):
            prove(message, SECRET, HERE)


def test_another_protocol_version_is_refused() -> None:
    hello = replace(new_hello(shard=1, generation=2, epoch=3), protocol=PROTOCOL_VERSION + 1)
    with pytest.raises(ProtocolError, match="protocol version"):
        prove(hello, SECRET, HERE)
