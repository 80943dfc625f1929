"""Threads that wait for a core: every one of a process, those to come as well."""

import os
import subprocess
import sys

import pytest

from shards import scheduling

# In a process of its own: the policy of this one would stay changed.
OF_A_PROCESS = """
import os, threading
from shards.scheduling import THREADS, wait_for_cores

stop = threading.Event()
policies = []
threading.Thread(target=stop.wait).start()
changed = wait_for_cores()
later = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
later.start()
later.join()
policies += [os.sched_getscheduler(int(entry.name)) for entry in THREADS.iterdir()]
stop.set()
assert changed >= 2, changed
print(set(policies) == {os.SCHED_BATCH})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a policy of Linux")
def test_every_thread_waits_those_to_come_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OF_A_PROCESS], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="a policy of Linux")
def test_a_system_that_forbids_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("not here")

    before = os.sched_getscheduler(0)
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    assert scheduling.wait_for_cores() == 0
    assert os.sched_getscheduler(0) == before
