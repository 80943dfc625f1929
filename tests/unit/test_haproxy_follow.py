"""Servers that Ray has lost on a reload: which are kept, and how they are checked."""

from pathlib import Path

import pytest

from shardline.router.serve.haproxy import SERVER, corrected, has_servers
from shardline.router.serve.haproxy_follow import (
    note_servers,
    noted_servers,
    with_kept_servers,
)
from tests.haproxy_in_front import LIMITS, rendered

PORT = 18000
OWN, OTHERS = (30000,), (30001, 30002)


@pytest.fixture
def known(tmp_path: Path) -> str:
    """What Ray wrote for a router of this host and two of others."""
    return rendered(tmp_path, PORT, OWN, OTHERS, inter="1s")


@pytest.fixture
def lost(tmp_path: Path) -> str:
    """What it writes when it knows the application, and no replica."""
    return rendered(tmp_path, PORT, [], inter="1s", application=True)


def servers(text: str) -> list[str]:
    return [found[0] for found in SERVER.finditer(corrected(text, LIMITS))]


def test_an_application_without_a_replica_keeps_those_known(known: str, lost: str) -> None:
    assert not has_servers(corrected(lost, LIMITS))
    assert servers(with_kept_servers(lost, known)) == servers(known)
    assert len(servers(known)) == 3


def test_kept_again_and_again_they_stay_the_same(known: str, lost: str) -> None:
    once = with_kept_servers(lost, known)
    assert with_kept_servers(lost, once) == once


def test_the_first_failed_check_of_a_kept_one_counts(known: str, lost: str) -> None:
    usual = "default-server fastinter 250ms downinter 250ms fall 3 rise 2 inter 1s check\n"
    at_once = "default-server fastinter 250ms downinter 250ms fall 1 rise 2 inter 250ms check\n"
    assert usual in known
    assert at_once not in known
    text = with_kept_servers(lost, known)
    assert at_once in text
    assert usual not in text


def test_what_ray_knows_is_taken_as_it_is(known: str, tmp_path: Path) -> None:
    fewer = rendered(tmp_path, PORT, [], OTHERS[:1], inter="1s")
    assert servers(with_kept_servers(fewer, known)) == servers(fewer)
    assert " fall 3 " in with_kept_servers(fewer, known)


def test_nothing_is_kept_of_an_application_that_has_gone(known: str, tmp_path: Path) -> None:
    gone = rendered(tmp_path, PORT, [], inter="1s")
    assert with_kept_servers(gone, known) == gone


def test_nothing_is_kept_where_nothing_was_known(lost: str, tmp_path: Path) -> None:
    assert noted_servers(tmp_path / "haproxy.cfg") == ""
    assert servers(with_kept_servers(lost, "")) == []
    note_servers(tmp_path / "haproxy.cfg", lost)
    assert servers(with_kept_servers(lost, noted_servers(tmp_path / "haproxy.cfg"))) == []
