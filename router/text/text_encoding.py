"""The router's text encoder: a process of its own, what waits for it, and its restarts.

A transformer takes milliseconds per text, so it must not run in the router's event loop; and not in
a thread, whose Python code would hold up that loop. The process takes whatever waits as one list,
at most TEXTS_AT_ONCE texts, and never waits for a list to fill.
"""

import asyncio
import logging
import os
import sys
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import shardline
from shardline.router.text.text_frames import (
    LENGTH,
    Failure,
    Hello,
    Reply,
    Vectors,
    WrongText,
    frame,
    read_reply,
)
from shardline.shards.core.errors import (
    DeadlineExceeded,
    EncoderUnavailable,
    InvalidInput,
    Overloaded,
    ShardlineError,
    Unavailable,
    VersionMismatch,
)
from shardline.shards.core.messages import Absence
from shardline.shards.core.schema import FloatArray

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 32
CHARACTERS_AT_ONCE = 8192  # of one list, unless it is one text: what others wait for meanwhile
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0  # before the process is started again
LOAD_S = 300.0  # a model of gigabytes from a slow disk
REPLY_S = 60.0  # to one list; a process that takes longer hangs
END_S = 2.0  # after its pipe was closed
MOST_FAILURES = 4  # on single parts, one after the other: then another process may do better
# each of them sets the threads of one of numpy's libraries
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
NOT_SET = "the generation takes texts, and router.text_encoder is not set"
NOT_LOADED = Absence(Unavailable.code, "it is being loaded")


@dataclass(eq=False, slots=True)
class _Part:
    """At most TEXTS_AT_ONCE texts of one request; ``found`` has their vectors or the error."""

    texts: Sequence[str]
    deadline: float
    found: "asyncio.Future[FloatArray | WrongText]"


class TextEncoding:
    """All methods run in the router's event loop. ``name`` None: this router encodes no texts."""

    def __init__(self, name: str | None, *, max_waiting: int, threads: int) -> None:
        self._name = name
        self._max_waiting = max_waiting
        self._threads = threads
        self._waiting: deque[_Part] = deque()
        self._texts = 0  # that wait
        self._arrived = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._loaded: Hello | None = None
        self._absence = NOT_LOADED  # why there is none now
        self._changed = asyncio.Event()
        self._pause = FIRST_PAUSE_S  # before the next start
        self._failures = 0  # since it last encoded something

    def begin(self) -> None:
        """Starts the process, if there is to be one and it was not started before."""
        if self._name is not None and self._running is None:
            self._running = asyncio.ensure_future(self._keep_running(self._name))

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running
        self._fail_waiting(Unavailable("the router is stopping"))

    async def loaded(self) -> bool:
        """Whether it has loaded; waits until it has, or has failed to."""
        while self._loaded is None and self._absence is NOT_LOADED and self._name is not None:
            self._changed.clear()
            await self._changed.wait()
        return self._loaded is not None

    def describe(self) -> dict[str, Any] | None:
        """For JSON; None where there is none to be."""
        if self._name is None:
            return None
        hello = self._loaded
        return {
            "id": None if hello is None else hello.encoder,
            "name": self._name if hello is None else hello.name,
            "loaded": hello is not None,
            "waiting": self._texts,
        }

    def trouble(self, wanted: AbstractSet[str]) -> Absence | None:
        """Why texts for these encoders cannot be encoded; None: they can, or none is to be."""
        if self._name is None:
            return Absence(EncoderUnavailable.code, NOT_SET) if wanted else None
        if self._loaded is None:
            return self._absence
        if wanted <= {self._loaded.encoder}:
            return None
        text = f"the generation needs {', '.join(sorted(wanted))}, not {self._loaded.encoder}"
        return Absence(VersionMismatch.code, text)

    async def encode(
        self,
        texts: Sequence[str],
        fields: Sequence[str],
        *,
        wanted: AbstractSet[str],
        deadline: float,
    ) -> FloatArray:
        """(n, width) float32, in order. fields: what errors call the texts. wanted: ids of the
        encoders that are to make the vectors. deadline: on the event loop's clock.

        Raises:
            InvalidInput: no word, more tokens than the model reads, or more texts than may wait.
            EncoderUnavailable: this router has no text encoder, or it cannot be loaded.
            Unavailable: it is being loaded, or its process has ended. VersionMismatch: it is not
                the one that is wanted. Overloaded, DeadlineExceeded. ShardlineError: it has failed
                on a text.
        """
        self._check(fields[0], wanted)
        if len(texts) > self._max_waiting:
            raise InvalidInput(
                "too many texts",
                field=fields[0].partition("[")[0],
                expected=f"<= {self._max_waiting} texts",
                got=f"{len(texts)} texts",
                hint="send them in several requests",
            )
        if self._texts + len(texts) > self._max_waiting:
            raise Overloaded(
                "too many texts wait for the text encoder",
                expected=f"<= {self._max_waiting}",
                hint="try again after the time in Retry-After",
            )
        loop = asyncio.get_running_loop()
        starts = _starts_of(texts)
        parts = [
            _Part(texts[start:end], deadline, loop.create_future())
            for start, end in pairwise([*starts, len(texts)])
        ]
        self._waiting.extend(parts)
        self._texts += len(texts)
        self._arrived.set()
        try:
            async with asyncio.timeout_at(deadline):
                found = await asyncio.gather(
                    *(part.found for part in parts), return_exceptions=True
                )
        except TimeoutError as error:
            raise DeadlineExceeded("the text encoder did not answer in time") from error
        vectors: list[FloatArray] = []
        for start, each in zip(starts, found, strict=True):
            if isinstance(each, BaseException):
                raise each
            if isinstance(each, WrongText):
                raise InvalidInput(
                    each.message,
                    field=fields[start + each.place],
                    expected=each.expected,
                    got=each.got,
                )
            vectors.append(each)
        return np.concatenate(vectors)

    def _check(self, field: str, wanted: AbstractSet[str]) -> None:
        if self._name is None:
            raise EncoderUnavailable(
                "this cluster has no text encoder",
                field=field,
                expected=f"encoder {', '.join(sorted(wanted))}",
                hint="set router.text_encoder and serve again, or send vectors",
            )
        if self._loaded is None:
            code = self._absence.code
            kind = Unavailable if code == Unavailable.code else EncoderUnavailable
            raise kind(
                "the text encoder is not there",
                field=field,
                got=code if kind is EncoderUnavailable else self._absence.text,
                hint="`shardline status` says what is wrong with it",
            )
        if wanted != {self._loaded.encoder}:
            raise VersionMismatch(
                "the text encoder is another than the generation's",
                field=field,
                expected=", ".join(sorted(wanted)),
                got=self._loaded.encoder,
                hint="set router.text_encoder to the model that `data embed-text` had",
            )

    # The process

    async def _keep_running(self, name: str) -> None:
        while True:
            try:
                self._absence = await self._run(name)
            except Exception as error:
                logger.exception("the text encoder")
                self._absence = Absence(Unavailable.code, repr(error))
            self._changed.set()
            logger.error("the text encoder %s: %s", name, self._absence.text)
            self._fail_waiting(Unavailable("the text encoder ended", got=self._absence.text))
            pause, self._pause = self._pause, min(LAST_PAUSE_S, 2 * self._pause)
            await asyncio.sleep(pause)

    async def _run(self, name: str) -> Absence:
        """One process, from its start to its end; why it ended."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shardline.router.text.text_worker", name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment(),
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(LOAD_S):
                first = await _next(process.stdout)
            if isinstance(first, Failure):
                return Absence(first.code, first.text)
            assert isinstance(first, Hello), first
            self._loaded, self._failures = first, 0
            self._changed.set()
            ended = asyncio.ensure_future(process.wait())
            while True:
                parts = await self._take_unless(ended)
                await self._answer(parts, process.stdin, process.stdout)
                if self._failures >= MOST_FAILURES:
                    return Absence(Unavailable.code, "it has failed on one text after the other")
        except TimeoutError:  # an OSError, too
            return Absence(Unavailable.code, f"it was not loaded within {LOAD_S:g} s")
        except (
            EOFError,
            OSError,
            RuntimeError,
        ):  # the last one of uvloop, of a pipe that is closed
            return Absence(Unavailable.code, "its process has ended")
        finally:
            self._loaded = None
            process.stdin.close()
            await _ended(process)

    def _environment(self) -> dict[str, str]:
        """This process's, with the threads, and with the Shardline that runs here."""
        root = str(Path(shardline.__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | {"PYTHONPATH": path} | dict.fromkeys(THREADS, str(self._threads))

    async def _take_unless(self, ended: "asyncio.Future[int]") -> list[_Part]:
        """What ``_take`` returns. Raises EOFError: the process has ended before."""
        taking = asyncio.ensure_future(self._take())
        try:
            either: set[asyncio.Future[Any]] = {taking, ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                raise EOFError
            return taking.result()
        finally:
            taking.cancel()  # it takes nothing before it returns

    async def _take(self) -> list[_Part]:
        """Whatever waits and is still wanted, of at most TEXTS_AT_ONCE texts."""
        while True:
            parts: list[_Part] = []
            count, size, now = 0, 0, asyncio.get_running_loop().time()
            while self._waiting and count + len(self._waiting[0].texts) <= TEXTS_AT_ONCE:
                more = sum(map(len, self._waiting[0].texts))
                if parts and size + more > CHARACTERS_AT_ONCE:
                    break
                part = self._waiting.popleft()
                self._texts -= len(part.texts)
                if not part.found.done() and part.deadline > now:
                    parts.append(part)
                    count += len(part.texts)
                    size += more
            if parts:
                return parts
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()

    async def _answer(
        self, parts: list[_Part], texts: asyncio.StreamWriter, replies: asyncio.StreamReader
    ) -> None:
        """Of a list that has no vectors, the parts are asked for one by one."""
        try:
            texts.write(frame([text for part in parts for text in part.texts]))
            try:
                async with asyncio.timeout(REPLY_S):
                    await texts.drain()
                    reply = await _next(replies)
            except TimeoutError as error:
                raise EOFError("no answer") from error
            if isinstance(reply, WrongText | Failure) and len(parts) > 1:
                for part in parts:
                    await self._answer([part], texts, replies)
                return
        except BaseException:
            for part in parts:
                if not part.found.done():
                    part.found.set_exception(Unavailable("the text encoder ended"))
            raise
        start = 0
        if isinstance(reply, Failure):
            self._failures += 1
        else:
            self._failures, self._pause = 0, FIRST_PAUSE_S
        for part in parts:
            end = start + len(part.texts)
            if isinstance(reply, Failure) and not part.found.done():
                part.found.set_exception(ShardlineError("internal error of the text encoder"))
            elif not part.found.done():
                found = reply.array[start:end] if isinstance(reply, Vectors) else reply
                assert not isinstance(found, Hello | Failure)
                part.found.set_result(found)
            start = end

    def _fail_waiting(self, error: Unavailable) -> None:
        while self._waiting:
            part = self._waiting.popleft()
            if not part.found.done():
                part.found.set_exception(error)
        self._texts = 0


async def _next(replies: asyncio.StreamReader) -> Reply:
    """Raises EOFError: the process has ended."""
    (size,) = LENGTH.unpack(await replies.readexactly(LENGTH.size))
    return read_reply(await replies.readexactly(size))


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Returns when the process is no more; it is killed if it does not end by itself."""
    with suppress(TimeoutError):
        async with asyncio.timeout(END_S):
            await process.wait()
            return
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _starts_of(texts: Sequence[str]) -> list[int]:
    """Where parts of one request begin: none has more than TEXTS_AT_ONCE texts, nor more than
    CHARACTERS_AT_ONCE but for a single text."""
    starts, size = [0], 0
    for place, text in enumerate(texts):
        is_full = place - starts[-1] == TEXTS_AT_ONCE or size + len(text) > CHARACTERS_AT_ONCE
        if is_full and place > starts[-1]:
            starts.append(place)
            size = 0
        size += len(text)
    return starts
