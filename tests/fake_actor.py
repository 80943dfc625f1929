"""Stand-ins for the handles of Ray actors, and the errors that Ray makes of theirs."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

HANG = object()


class Method:
    """A remote method: each call gives, or raises, the next of its plan, and None after that."""

    def __init__(self) -> None:
        self.plan: list[Any] = []
        self.calls = 0
        self.asked: list[tuple[object, ...]] = []

    def remote(self, *arguments: object) -> Awaitable[Any]:
        self.calls += 1
        self.asked.append(arguments)
        return self._outcome(self.plan.pop(0) if self.plan else None)

    async def _outcome(self, outcome: Any) -> Any:
        if outcome is HANG:
            await asyncio.Event().wait()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Handle:
    """Of a shard actor."""

    def __init__(self) -> None:
        self.ping, self.announce, self.describe = Method(), Method(), Method()


def raised_in_a_method(cause: Exception) -> RayTaskError:
    """As a caller of an actor sees what the method raised."""
    return _task_error(cause).as_instanceof_cause()


def raised_in_the_constructor(cause: Exception) -> RayActorError:
    """As a caller sees it after Ray has pickled it."""
    return cloudpickle.loads(cloudpickle.dumps(ActorDiedError.from_task_error(_task_error(cause))))


def _task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("name", f"Traceback\n{cause}", cause, "actor", 1, "127.0.0.1")
