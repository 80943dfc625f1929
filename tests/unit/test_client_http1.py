"""Bytes to responses: every framing, cut at every byte."""

import pytest

from shardline.router.client.http1 import Response, ResponseReader

HEAD = b"HTTP/1.1 200 OK\r\nX-Name: value\r\n"
LENGTH = HEAD + b"Content-Length: 3\r\n\r\nabc"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nT: v\r\n\r\n"
TO_THE_END = HEAD + b"\r\nabc"


def read(data: bytes, cut: int) -> list[Response]:
    """The responses in ``data``, fed in two pieces, and then the end of the stream."""
    reader = ResponseReader()
    found = [reader.feed(piece) for piece in (data[:cut], data[cut:]) if piece]
    if not any(found):
        found.append(reader.feed(b""))
    return [response for response in found if response is not None]


@pytest.mark.parametrize(
    ("data", "keep_alive"),
    [
        (LENGTH, True),
        (CHUNKED, True),
        (TO_THE_END, False),
        (LENGTH.replace(b"1.1", b"1.0", 1), False),
        (LENGTH.replace(b"X-Name: value", b"X-Name: value\r\nConnection: close"), False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH, True),
    ],
)
def test_every_framing_cut_anywhere(data: bytes, keep_alive: bool) -> None:
    for cut in range(len(data) + 1):
        (response,) = read(data, cut)
        assert (response.status, response.body) == (200, b"abc")
        assert response.headers[b"x-name"] == b"value"
        assert response.keep_alive == keep_alive


def test_no_content() -> None:
    (response,) = read(b"HTTP/1.1 204 No Content\r\n\r\n", 5)
    assert (response.status, response.body, response.is_success) == (204, b"", True)


@pytest.mark.parametrize("data", [LENGTH, CHUNKED])
def test_a_response_cut_short_is_none(data: bytes) -> None:
    for end in range(1, len(data)):
        reader = ResponseReader()
        assert reader.feed(data[:end]) is None
        with pytest.raises(ConnectionError):
            reader.feed(b"")


def test_an_end_within_the_head_is_not_the_end_of_a_body() -> None:
    reader = ResponseReader()
    assert reader.feed(HEAD) is None
    with pytest.raises(ConnectionResetError):
        reader.feed(b"")


def test_one_reader_reads_one_response_after_the_other() -> None:
    reader = ResponseReader()
    for data in (LENGTH, CHUNKED, LENGTH):
        assert not reader.started
        assert reader.feed(data[:9]) is None
        assert reader.started
        response = reader.feed(data[9:])
        assert response is not None and response.body == b"abc"


def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    response = ResponseReader().feed(LENGTH + LENGTH)
    assert response is not None and not response.keep_alive
