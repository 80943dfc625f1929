"""The short way between a router and a shard of one machine: a Unix socket beside the TCP port.

It carries the same bytes in less time (docs/PERFORMANCE.md). Its name is made of the TCP address,
so nobody has to be told of it, and lies in Linux's abstract name space: it is known in the same
network name space as the port, leaves no file, and is gone with its process. Elsewhere, and
between machines, there is TCP alone.

Anybody on the machine may take such a name first and so stand between the two; a router therefore
speaks only to processes of its own user. That says nothing of who knows the cluster secret: the
handshake is the same.
"""

import os
import socket
import struct
import sys

from shards.handshake import ServerAddress

CREDENTIALS = struct.Struct("iII")  # pid, uid and gid of the peer, as SO_PEERCRED gives them


def listen(address: ServerAddress, backlog: int) -> socket.socket | None:
    """A listening socket beside the one at ``address``; None where there can be none."""
    if sys.platform != "linux":
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(_name(address))
    except OSError:  # somebody holds the name
        listener.close()
        return None
    listener.listen(backlog)
    listener.setblocking(False)
    return listener


def connect(address: ServerAddress) -> socket.socket | None:
    """Connected to the server at ``address``; None if it is not here, or of another user.

    Does not block: a Unix socket is connected at once or not at all.
    """
    if sys.platform != "linux":
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(_name(address))
        sent = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    except OSError:  # nobody listens, or too many wait to be accepted
        connection.close()
        return None
    if CREDENTIALS.unpack(sent)[1] != os.geteuid():
        connection.close()
        return None
    return connection


def _name(address: ServerAddress) -> str:
    host, port = address
    return f"\0shardline/{host}/{port}"
