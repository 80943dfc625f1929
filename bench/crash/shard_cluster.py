"""Replicas as processes, and who of them is the primary: what the controller does in service."""

import os
import random
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import psutil

from shardline.bench.crash import compactor, trapped_replica
from shardline.bench.crash.trapped_replica import Contents, Setup
from shardline.shards.wire.handshake import ServerAddress

START_S = 60.0  # of a process, on a busy machine
ANSWER_S = 30.0
POLL_S = 0.01
PRELOAD = ["shardline.bench.crash.trapped_replica", "shardline.bench.crash.compactor"]


class Ended(Exception):
    """A process that was asked has been killed, or stopped, or is not heard any more."""


@dataclass(frozen=True, slots=True)
class Primary:
    """To whom writes go."""

    number: int
    address: ServerAddress
    epoch: int


class ReplicaProcess:
    """One life of a replica."""

    def __init__(self, setup: Setup) -> None:
        context = get_context("forkserver")
        self.number = setup.replica
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=trapped_replica.serve, args=(theirs, setup), daemon=True
        )
        self._process.start()
        theirs.close()
        self._asked = 0
        self._address: ServerAddress | None = None

    @property
    def address(self) -> ServerAddress:
        """Once it has loaded the shard. Raises Ended."""
        if self._address is None:
            self._address = self._answer(0, START_S)
        return self._address

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def ended_by_itself(self) -> bool:
        return self._process.exitcode not in (None, -signal.SIGKILL)

    @property
    def is_stopped(self) -> bool:
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ask(self, name: str, argument: Any = None) -> Any:
        """Raises Ended."""
        return self.answer(self.order(name, argument))

    def order(self, name: str, argument: Any = None) -> int:
        """Its number, for ``answer``. Raises Ended."""
        assert self.address
        self._asked += 1
        try:
            self._pipe.send((self._asked, name, argument))
        except OSError as error:
            raise Ended from error
        return self._asked

    def answer(self, number: int) -> Any:
        """Raises Ended, as soon as the process is killed or stopped."""
        return self._answer(number, ANSWER_S)

    def ends_within(self, timeout_s: float) -> bool:
        return bool(connection.wait([self._process.sentinel], timeout_s))

    def stops_within(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while not self.is_stopped:
            if time.monotonic() > until or not self.is_alive:
                return False
            time.sleep(POLL_S)
        return True

    def kill(self) -> None:
        """The end of it; may be called twice."""
        if self._pipe.closed:
            return
        self.signal(signal.SIGKILL)
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _answer(self, number: int, timeout_s: float) -> Any:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            ready = connection.wait([self._pipe, self._process.sentinel], 5 * POLL_S)
            if self._pipe in ready:
                try:
                    found, value = self._pipe.recv()
                except (EOFError, OSError) as error:
                    raise Ended from error
                if found == number:
                    return value
            elif ready or self.is_stopped:
                raise Ended
        raise Ended(f"replica {self.number} does not answer")


class Cluster:
    """``primary`` may be read by any thread; all else is for one."""

    def __init__(self, generation: Path, *, replicas: int, min_rows: int) -> None:
        self.primary: Primary | None = None
        self.secret = secrets.token_bytes(16)
        self.epoch = 0
        self.refusals: list[str] = []  # why somebody did not become the primary
        self.defects: list[str] = []
        self.generation = generation
        self._min_rows = min_rows
        self._compactor_address = str(generation.parents[1] / "compactor")
        self._replicas: list[ReplicaProcess | None] = [None] * replicas
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._compactor = self._context.Process(
            target=compactor.serve, args=(self._compactor_address,), daemon=True
        )

    @contextmanager
    def running(self) -> Iterator["Cluster"]:
        self._compactor.start()
        until = time.monotonic() + START_S
        while not Path(self._compactor_address).exists():
            if time.monotonic() > until or not self._compactor.is_alive():
                raise RuntimeError("the process that compacts does not start")
            time.sleep(POLL_S)
        try:
            yield self
        finally:
            for each in filter(None, self._replicas):
                each.kill()
            with suppress(OSError):
                compactor.stop(self._compactor_address)
            self._compactor.join(ANSWER_S)
            self._compactor.kill()
            self._compactor.join()

    def replica(self, number: int) -> ReplicaProcess:
        """Started anew if it has been killed, woken if it has been stopped; it may be loading."""
        process = self._replicas[number]
        if process is not None and not process.is_alive:
            if process.ended_by_itself:
                self.defects.append(f"replica {number} ended, and nobody had killed it")
            process.kill()
            process = None
        if process is None:
            process = self._replicas[number] = ReplicaProcess(
                Setup(
                    generation=str(self.generation),
                    replica=number,
                    secret=self.secret,
                    compactor=self._compactor_address,
                    min_rows=self._min_rows,
                )
            )
        if process.is_stopped:
            process.signal(signal.SIGCONT)
        return process

    @property
    def numbers(self) -> range:
        return range(len(self._replicas))

    def all_replicas(self) -> list[ReplicaProcess]:
        return [self.replica(number) for number in self.numbers]

    def others(self, number: int | None = None) -> list[int]:
        """Numbers of all replicas but one, by default the primary; in random order."""
        if number is None and self.primary is not None:
            number = self.primary.number
        left = [each for each in self.numbers if each != number]
        random.shuffle(left)
        return left

    def leader(self) -> ReplicaProcess:
        """The primary; one is elected if there is none that lives and says that it leads: who was
        to succeed it may have taken its epoch away, and then have failed."""
        process = self._replicas[self.primary.number] if self.primary is not None else None
        if process is None or not process.is_alive or process.is_stopped:
            return self.elect(self.others())
        with suppress(Ended):
            if process.ask("state")["leads"] is not None:
                return process
        return self.elect([*self.others(), process.number])

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def elect(self, numbers: Sequence[int]) -> ReplicaProcess:
        """Makes the first of these replicas the primary that can be; the others are left alone."""
        until = time.monotonic() + 2 * ANSWER_S
        for number in cycle(numbers):
            process, epoch = self.replica(number), self.next_epoch()
            with suppress(Ended):
                if self.led(process, epoch, process.ask("lead", epoch)):
                    return process
            if time.monotonic() > until:
                break
        raise RuntimeError(f"nobody becomes the primary: {self.refusals[-4:]}")

    def led(self, process: ReplicaProcess, epoch: int, outcome: Any) -> bool:
        """Publishes a primary that has become one."""
        if isinstance(outcome, int):
            self.primary = Primary(process.number, process.address, epoch)
            return True
        self.refusals.append(str(outcome))
        return False

    def situation(self) -> str:
        """Who leads, and what each replica says of itself: for whoever looks into a violation."""
        told = [f"to be written to {self.primary}", f"last refusals {self.refusals[-3:]}"]
        for number, process in enumerate(self._replicas):
            state: object = "has ended"
            if process is not None and process.is_stopped:
                state = "is stopped"
            elif process is not None and process.is_alive:
                try:
                    state = process.ask("state")
                except Ended as error:
                    state = f"alive, {error or 'no answer'}"
            told.append(f"replica {number}: {state}")
        return "; ".join(told)

    def fresh_contents(self) -> Contents | str:
        """Of the shard as a new process loads it, which does not lead; or why it cannot."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=trapped_replica.fresh, args=(theirs, str(self.generation)), daemon=True
        )
        process.start()
        theirs.close()
        try:
            with ours:
                if not ours.poll(START_S):
                    return "no answer"
                found: Contents | str = ours.recv()
                return found
        except EOFError:
            return "the process ended"
        finally:
            process.join(START_S)
            process.kill()
            process.join()
