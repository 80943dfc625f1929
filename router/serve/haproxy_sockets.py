"""Copies of the sockets on which HAProxy listens, kept for the HAProxy that takes its place.

As long as one copy is open, the kernel takes new connections and lets them wait, also while there
is no HAProxy. Its admin socket gives such copies to whoever asks: that is how one HAProxy follows
another on a reload (``-x``). Both sides of that exchange are here, as HAProxy 2.8 speaks it: the
request; a 32-bit count; one message with the sockets and six bytes on each of them; the count again
as the receiver's thanks.
"""

import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

REQUEST = b"_getsocks\n"
COUNT = struct.Struct("=i")
# no name of a namespace, none of a device, four bytes of options
SAID_BYTES = 6
MOST = 252  # sockets in one message; Ray's configuration has three, and the admin socket
ANSWERS_WITHIN_S = 5.0
ASKS_WITHIN_S = 10.0  # HAProxy reads its configuration first


@dataclass(frozen=True, slots=True)
class ListeningSockets:
    """Their descriptors, owned by whoever holds this, and HAProxy's six bytes on each."""

    descriptors: tuple[int, ...] = ()
    said: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, admin_socket: str) -> Self:
        """Copies of the TCP sockets of the HAProxy behind this admin socket.

        The admin socket itself is left out: whoever connects there is to see that HAProxy is gone.

        Raises:
            OSError: it does not answer, or not as expected.
        """
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(ANSWERS_WITHIN_S)
            asked.connect(admin_socket)
            asked.sendall(REQUEST)
            (count,) = COUNT.unpack(_exactly(asked, COUNT.size))
            said, given, *_ = socket.recv_fds(
                asked, MOST * SAID_BYTES, MOST, flags=socket.MSG_CMSG_CLOEXEC
            )
            sockets = cls._tcp_only(given, said)
            try:
                if len(given) != count or len(said) != count * SAID_BYTES:
                    raise OSError(
                        f"HAProxy gave {len(given)} of {count} sockets, with {len(said)} bytes on "
                        f"them; expected all, with {SAID_BYTES} bytes on each"
                    )
                asked.sendall(COUNT.pack(len(given)))
            except OSError:
                sockets.close()
                raise
        return sockets

    @classmethod
    def _tcp_only(cls, given: list[int], said: bytes) -> Self:
        """Closes the others."""
        kept = [number for number, each in enumerate(given) if _is_tcp(each)]
        for number in set(range(len(given))) - set(kept):
            os.close(given[number])
        return cls(
            tuple(given[number] for number in kept),
            tuple(said[number * SAID_BYTES :][:SAID_BYTES] for number in kept),
        )

    def hand_over(self, offer: socket.socket, process: int) -> None:
        """Gives copies to the HAProxy that asks on this socket; process: its descriptor
        (pidfd_open).

        Raises:
            OSError: it does not ask, or has ended.
        """
        ready, _, _ = select.select([offer.fileno(), process], [], [], ASKS_WITHIN_S)
        if offer.fileno() not in ready:
            raise TimeoutError("HAProxy has not asked for its listening sockets")
        asking, _ = offer.accept()
        with asking:
            asking.settimeout(ANSWERS_WITHIN_S)
            _exactly(asking, len(REQUEST))
            asking.sendall(COUNT.pack(len(self.descriptors)))
            if self.descriptors:
                socket.send_fds(asking, [b"".join(self.said)], self.descriptors)
                _exactly(asking, COUNT.size)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


@contextmanager
def offering(path: Path) -> Iterator[socket.socket]:
    """A socket at which a HAProxy may ask (``-x path``), for its owner alone."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as offer:
        offer.bind(str(path))
        path.chmod(0o600)
        offer.listen(1)
        try:
            yield offer
        finally:
            path.unlink()


def _is_tcp(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as one:
        return one.family in (socket.AF_INET, socket.AF_INET6)


def _exactly(source: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        part = source.recv(size - len(got))
        if not part:
            raise ConnectionResetError(f"HAProxy ended after {len(got)} of {size} bytes")
        got += part
    return got
