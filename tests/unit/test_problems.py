"""Errors as HTTP answers: statuses, headers, and what is never told."""

import logging

import orjson
import pytest

from shardline.router.client.calls import as_error
from shardline.router.client.http1 import Response
from shardline.router.contract import REFUSALS, PayloadTooLarge
from shardline.router.http.problems import MAX_TEXT, PROBLEM_TYPE, PROBLEMS, to_problem
from shardline.shards.core.errors import (
    CorruptFile,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    Unavailable,
    VersionMismatch,
)


def problem_of(error):
    answer = to_problem(error, request_id="r", retry_after_s=3)
    return answer, dict(answer.headers), orjson.loads(answer.body)


@pytest.mark.parametrize(
    ("kind", "status", "retry"),
    [
        (InvalidInput, 400, False),
        (NotFound, 404, False),
        (PayloadTooLarge, 413, False),
        (Overloaded, 429, True),
        (VersionMismatch, 503, True),
        (Unavailable, 503, True),
        (DeadlineExceeded, 504, False),
    ],
)
def test_status_and_retry_of_each_code(kind, status, retry):
    answer, headers, body = problem_of(kind("what", field="f", expected="e", got="g", hint="h"))
    assert answer.status == body["status"] == status
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers.get(b"retry-after") == (b"3" if retry else None)
    assert body == {
        "type": f"urn:shardline:problem:{kind.code}",
        "title": PROBLEMS[kind.code].title,
        "status": status,
        "detail": "what",
        "code": kind.code,
        "request_id": "r",
        "field": "f",
        "expected": "e",
        "got": "g",
        "hint": "h",
    }


def test_every_refusal_of_ours_has_its_own_status():
    statuses = [PROBLEMS[kind.code].status for kind in REFUSALS]
    assert len(set(statuses)) == len(REFUSALS)


@pytest.mark.parametrize("error", [CorruptFile("/secret/path: bad"), RuntimeError("/secret/path")])
def test_an_unexpected_error_is_logged_and_not_told(error, caplog):
    with caplog.at_level(logging.ERROR):
        answer, _, body = problem_of(error)
    assert answer.status == 500
    assert body["code"] == "internal"
    assert b"secret" not in answer.body
    assert caplog.records[0].exc_info[1] is error


def test_a_callers_own_text_is_repeated_only_so_far():
    _, _, body = problem_of(InvalidInput("x", got="a" * 10_000))
    assert len(body["got"]) == MAX_TEXT


def test_every_temporary_error_has_a_status_and_comes_back_as_itself() -> None:
    for kind in (Unavailable, *Unavailable.__subclasses__()):
        if kind.__module__ == Unavailable.__module__:
            problem = to_problem(kind("later"), request_id="r", retry_after_s=1)
            assert problem.status in (429, 503, 504)
            response = Response(
                problem.status,
                {b"content-type": PROBLEM_TYPE.encode()},
                problem.body,
                keep_alive=True,
            )
            assert type(as_error(response)) is kind
