"""What a connection still has to send: whole frames, given to the transport piece by piece.

A transport takes whatever it is given and copies what the socket does not take at once, so a peer
that does not read would make it hold every reply twice. Here it gets a piece when it has room. In
the loop thread only.
"""

import asyncio
from collections import deque

PIECE_BYTES = 256 << 10  # of a frame that does not go out at once


class Outbox:
    """``pause`` and ``resume`` are to be called as the transport calls its protocol's."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self.is_paused = False
        self.unsent = 0  # bytes of frames that the transport has not been given
        self._transport = transport
        self._pieces: deque[memoryview] = deque()

    def send(self, frame: bytes) -> None:
        """Sends a frame after those that wait."""
        if not self.is_paused and len(frame) <= PIECE_BYTES:  # as a rule
            self._transport.write(frame)
            return
        self._pieces.append(memoryview(frame))
        self.unsent += len(frame)
        self._pump()

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self._pump()

    def clear(self) -> None:
        """Forgets what waits: the connection is gone."""
        self._pieces.clear()
        self.unsent = 0

    def _pump(self) -> None:
        while self._pieces and not self.is_paused:
            frame = self._pieces.popleft()
            piece, rest = frame[:PIECE_BYTES], frame[PIECE_BYTES:]
            if rest:
                self._pieces.appendleft(rest)
            self.unsent -= len(piece)
            self._transport.write(piece)
