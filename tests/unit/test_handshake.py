"""The handshake: nobody without the secret gets in, nor with a proof made for another server."""

from dataclasses import replace

import numpy as np
import pytest

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import (
    ErrorReply,
    FetchRequest,
    Hello,
    Proof,
    ReplicaKey,
    Welcome,
)
from shardline.shards.wire.frames import PROTOCOL_VERSION
from shardline.shards.wire.handshake import _mac, check_welcome, new_hello, prove, welcome

MESSAGES = [
    Hello(protocol=1, generation=3, shard=2, replica=0, epoch=4, nonce=b"n" * 16),
    Proof(nonce=b"n" * 16, mac=b"m" * 32),
    Welcome(mac=b"m" * 32),
    ErrorReply(code="overloaded", message="later"),
    FetchRequest(item_ids=np.zeros(1, np.int64), timeout_ms=3),
]
SECRET = b"s" * 32
HERE = ("127.0.0.1", 4000)


def test_both_sides_prove_the_secret() -> None:
    hello = new_hello(ReplicaKey(2, 1), epoch=3)
    said, proof, mac = prove(hello, SECRET, HERE)
    assert said == hello
    check_welcome(welcome(proof, SECRET, hello, HERE), mac)


def test_nonces_are_never_reused() -> None:
    hellos = [new_hello(ReplicaKey(2, 1), epoch=3) for _ in range(50)]
    assert len({hello.nonce for hello in hellos}) == 50
    assert len({prove(hellos[0], SECRET, HERE)[1].nonce for _ in range(50)}) == 50


def test_a_wrong_secret_is_refused_by_either_side() -> None:
    hello = new_hello(ReplicaKey(2, 1), epoch=3)
    _, proof, mac = prove(hello, b"another", HERE)
    with pytest.raises(ProtocolError, match="no proof of the cluster secret"):
        welcome(proof, SECRET, hello, HERE)
    forged = welcome(proof, b"another", hello, HERE)
    check_welcome(forged, mac)
    with pytest.raises(ProtocolError, match="server does not know"):
        check_welcome(forged, prove(hello, SECRET, HERE)[2])


def test_a_replayed_or_reflected_proof_is_refused() -> None:
    first, second = (new_hello(ReplicaKey(2, 1), epoch=3) for _ in range(2))
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
    hello = new_hello(ReplicaKey(2, 1), epoch=3)
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
    hello = new_hello(ReplicaKey(2, 1), epoch=3)
    with pytest.raises(ProtocolError):
        welcome(message, SECRET, hello, HERE)
    with pytest.raises(ProtocolError):
        check_welcome(message, b"x" * 32)
    if not isinstance(message, Hello):
        with pytest.raises(ProtocolError):
            prove(message, SECRET, HERE)


def test_another_protocol_version_is_refused() -> None:
    hello = replace(new_hello(ReplicaKey(2, 1), epoch=3), protocol=PROTOCOL_VERSION + 1)
    with pytest.raises(ProtocolError, match="protocol version"):
        prove(hello, SECRET, HERE)
