"""The handshake: how router and shard prove to each other that they know the cluster secret.

On every new connection, before any request:

    server -> Hello(protocol, generation, shard, replica, epoch, nonce)
    client -> Proof(nonce, mac = HMAC(secret, ["client", all of Hello, address, client nonce]))
    server -> Welcome(mac = HMAC(secret, ["server", all of Hello, address, client nonce]))

``address`` is where the server listens, as the routing table names it. It does not travel: either
side takes what it knows itself. So whoever stands in between can pass a proof on neither to
another replica nor from another port, nor say that the answers are those of another generation.
"""

import hmac
import secrets
from dataclasses import astuple
from typing import TypeAlias

import msgpack

from shardline.shards.core.errors import ProtocolError
from shardline.shards.core.messages import Hello, Proof, ReplicaKey, Welcome
from shardline.shards.wire.frames import PROTOCOL_VERSION, Message

NONCE_BYTES = 16

ServerAddress: TypeAlias = tuple[str, int]  # host and port that the server listens on


def new_hello(key: ReplicaKey, *, epoch: int) -> Hello:
    """The first frame of a new connection, with a nonce of its own."""
    return Hello(
        protocol=PROTOCOL_VERSION,
        generation=key.generation,
        shard=key.shard,
        replica=key.replica,
        epoch=epoch,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )


def welcome(message: Message, secret: bytes, hello: Hello, address: ServerAddress) -> Welcome:
    """The server's answer to the client's first frame, when that proves the secret.

    Raises:
        ProtocolError: not a Proof, the peer does not know the secret, or its proof is for another
            server than the one at ``address`` that said ``hello``.
    """
    if not isinstance(message, Proof):
        raise ProtocolError("handshake", expected="Proof", got=type(message).__name__)
    expected = _mac(secret, "client", hello, address, message.nonce)
    if not hmac.compare_digest(message.mac, expected):
        raise ProtocolError("no proof of the cluster secret for this server")
    return Welcome(mac=_mac(secret, "server", hello, address, message.nonce))


def prove(message: Message, secret: bytes, address: ServerAddress) -> tuple[Hello, Proof, bytes]:
    """The server's first frame as Hello, the Proof to send back, and the mac Welcome must carry.

    ``address`` is the one that was connected to.

    Raises:
        ProtocolError: not a Hello, or another protocol version.
    """
    if not isinstance(message, Hello):
        raise ProtocolError("handshake", expected="Hello", got=type(message).__name__)
    if message.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            "protocol version", expected=str(PROTOCOL_VERSION), got=str(message.protocol)
        )
    nonce = secrets.token_bytes(NONCE_BYTES)
    proof = Proof(nonce=nonce, mac=_mac(secret, "client", message, address, nonce))
    return message, proof, _mac(secret, "server", message, address, nonce)


def check_welcome(message: Message, mac: bytes) -> None:
    """Raises ProtocolError unless the server's second frame proves the secret."""
    if not isinstance(message, Welcome) or not hmac.compare_digest(message.mac, mac):
        raise ProtocolError("server does not know the cluster secret")


def _mac(secret: bytes, role: str, hello: Hello, address: ServerAddress, nonce: bytes) -> bytes:
    # packed, so that no two lists of values are the same bytes
    return hmac.digest(secret, msgpack.packb([role, *astuple(hello), *address, nonce]), "sha256")
