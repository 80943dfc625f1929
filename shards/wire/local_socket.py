"""The short way between a router and a shard of one machine: a Unix socket beside the TCP port.

It carries the same bytes in less time (docs/PERFORMANCE.md). Its name is made of the TCP address,
so nobody has to be told of it, and lies in Linux's abstract name space: it is known in the same
network name space as the port, leaves no file, and is gone with its process. Elsewhere, and
between machines, there is TCP alone.

Anybody on the machine may take such a name first and so stand between the two. A router therefore
speaks only to processes of its own user, and either side takes into the proof of the secret by
which way the other is reached (``proven_address``): what is passed on from here to the port proves
nothing there.
"""

import logging
import os
import socket
import struct
import sys

from shardline.shards.wire.handshake import ServerAddress

logger = logging.getLogger(__name__)

CREDENTIALS = struct.Struct("iII")  # pid, uid and gid of the peer, as SO_PEERCRED gives them


def listen(address: ServerAddress, backlog: int) -> socket.socket | None:
    """A listening socket beside the one at ``address``; None where there can be none."""
    if sys.platform != "linux":
        return None
    listener: socket.socket | None = None
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_name(address))
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:  # as a rule, somebody holds the name
        logger.warning("no Unix socket beside %s:%d, TCP alone: %s", *address, error)
        if listener is not None:
            listener.close()
        return None
    return listener


def connect(address: ServerAddress) -> socket.socket | None:
    """Connected to the server at ``address``; None if it is not here, or of another user.

    Does not block: a Unix socket is connected at once or not at all.
    """
    if sys.platform != "linux":
        return None
    connection: socket.socket | None = None
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.connect(_name(address))
        sent = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    except OSError:  # nobody listens, or too many wait to be accepted
        if connection is not None:
            connection.close()
        return None
    if CREDENTIALS.unpack(sent)[1] != os.geteuid():
        connection.close()
        return None
    return connection


def proven_address(connection: socket.socket, address: ServerAddress) -> ServerAddress:
    """What stands for ``address`` in the handshake over this connection."""
    host, port = address
    return (f"unix:{host}", port) if connection.family == socket.AF_UNIX else address


def _name(address: ServerAddress) -> str:
    host, port = address
    return f"\0shardline/{host}/{port}"
