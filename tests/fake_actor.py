"""Stand-ins for the handles of Ray actors, and the errors that Ray makes of theirs."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from shardline.shards.core.messages import Pulse

HANG = object()


class Method:
    """A remote method: a call gives, or raises, the next of its plan, and after that ``then``."""

    def __init__(self, then: Any = None) -> None:
        self.then = then
        self.plan: list[Any] = []
        self.calls = 0
        self.asked: list[tuple[object, ...]] = []

    def remote(self, *arguments: object) -> Awaitable[Any]:
        self.calls += 1
        self.asked.append(arguments)
        return self._outcome(self.plan.pop(0) if self.plan else self.then)

    async def _outcome(self, outcome: Any) -> Any:
        if outcome is HANG:
            await asyncio.Event().wait()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Handle:
    """Of a shard actor, which leads, or seals, when it is asked to."""

    def __init__(self) -> None:
        self.ping = Method(Pulse(pid=1, seq=0))
        self.announce, self.describe = Method(), Method()
        self.lead = LeadMethod(self.ping)
        self.seal = SealMethod(self.ping)


class LeadMethod(Method):
    """What comes after its plan is that it leads, as the pings say from then on."""

    def __init__(self, ping: Method) -> None:
        super().__init__(0)
        self._ping = ping

    def remote(self, *arguments: object) -> Awaitable[Any]:
        if not self.plan:
            self._ping.then = replace(self._ping.then, leads=arguments[0])
        return super().remote(*arguments)


class SealMethod(Method):
    """What comes after its plan is that it leads no more, as the pings say; the writes it has."""

    def __init__(self, ping: Method) -> None:
        super().__init__(0)
        self._ping = ping

    def remote(self, *arguments: object) -> Awaitable[Any]:
        if not self.plan:
            self._ping.then = replace(self._ping.then, leads=None)
            self.then = self._ping.then.seq
        return super().remote(*arguments)


def raised_in_a_method(cause: Exception) -> RayTaskError:
    """As a caller of an actor sees what the method raised."""
    return _task_error(cause).as_instanceof_cause()


def raised_in_the_constructor(cause: Exception) -> RayActorError:
    """As a caller sees it after Ray has pickled it."""
    return cloudpickle.loads(cloudpickle.dumps(ActorDiedError.from_task_error(_task_error(cause))))


def _task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("name", f"Traceback\n{cause}", cause, "actor", 1, "127.0.0.1")
