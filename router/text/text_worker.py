"""The text process: loads the encoder, then answers lists of texts until its router is gone.

    python -m shardline.router.text.text_worker MODEL

Runs no event loop and no thread of its own; the router sends one list at a time. Its router's end
closes the pipe, and so ends it.
"""

import logging
import os
import signal
import sys
from typing import BinaryIO

import msgpack

from shardline.router.text.text_frames import (
    LENGTH,
    Failure,
    Hello,
    Reply,
    Vectors,
    WrongText,
    pack_reply,
)
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.text.text_encoder import FRAME, TextEncoder, Unreadable

logger = logging.getLogger(__name__)


def main(model: str) -> None:
    """Serves the model over standard input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the router's to hear
    # what a library prints must not come between the frames
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        encoder = TextEncoder.load(model)
    except (ShardlineError, OSError, MemoryError) as error:
        code = error.code if isinstance(error, ShardlineError) else Unavailable.code
        _send(answers, Failure(code, str(error) or repr(error)))
        return
    about = encoder.model
    _send(answers, Hello(about.id, about.name, about.width))
    while (texts := _read(sys.stdin.buffer)) is not None:
        _send(answers, encoded(encoder, texts))


def encoded(encoder: TextEncoder, texts: list[str]) -> Reply:
    try:
        vectors = encoder.encode(texts)
    except Unreadable as error:
        if error.tokens <= FRAME:
            return WrongText(
                error.place, "text without a word", "a character that the model reads", "none"
            )
        most = f"<= {encoder.model.max_tokens} tokens"
        return WrongText(error.place, "text too long", most, f"{error.tokens} tokens")
    except MemoryError:
        raise  # to begin anew helps
    except Exception as error:  # whatever it is, other texts can be encoded
        logger.exception("texts")
        return Failure(ShardlineError.code, repr(error))
    return Vectors(len(vectors), vectors.tobytes())


def _read(source: BinaryIO) -> list[str] | None:
    """The next list; None: the router is gone."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    payload = source.read(size)
    if len(payload) < size:
        return None
    texts: list[str] = msgpack.unpackb(payload)
    return texts


def _send(answers: BinaryIO, reply: Reply) -> None:
    answers.write(pack_reply(reply))
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
