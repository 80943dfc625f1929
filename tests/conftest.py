"""For all tests: a test that is a coroutine has an event loop of its own, and leaves no task;
SIGHUP does what it does by default, also where the tests are run under nohup, which has it ignored.
"""

import asyncio
import inspect
import signal
from collections.abc import Iterator
from typing import Any

import pytest

LEFT_OVER_S = 2.0  # how long what was cancelled may take to end


@pytest.fixture(scope="session", autouse=True)
def sighup_is_not_ignored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(_run(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names}))
    return True


async def _run(test: Any, arguments: dict[str, Any]) -> None:
    await test(**arguments)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=LEFT_OVER_S)
    assert not left, f"the test left tasks behind: {left}"
