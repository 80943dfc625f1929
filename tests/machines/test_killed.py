"""`serve` killed with -9: the next one ends what was left, and takes its port."""

import os
import signal
from pathlib import Path

import psutil

from shardline.cluster.serving.ray_session import free_port
from tests.machines.conftest import TEMPORARY, run, serving

TIMES = int(os.environ.get("SHARDLINE_KILLS", "20"))


def test_the_next_serve_takes_the_port_of_a_killed_one(store: Path) -> None:
    port = free_port()
    for number in range(TIMES):
        with serving(store, port=port) as served:
            session = next(TEMPORARY.glob(f"shardline-{served.pid}-*"))
            assert len(list(TEMPORARY.iterdir())) == 1, "that of the one before is gone"
            family = psutil.Process(served.pid).children(recursive=True)
            haproxy = next(each for each in family if each.name() == "haproxy")
            os.kill(served.pid, signal.SIGKILL)
            served.wait()
        assert session.exists()
        print(f"{number}: HAProxy left {'alive' if haproxy.is_running() else 'dead'}")
    out = run(store, "down").stdout
    assert "left by a session that was killed" in out
    assert "nothing is serving this store" in out


def test_down_ends_a_serve_that_is_stopped(store: Path) -> None:
    """As by Ctrl-Z, or by a debugger that has gone."""
    with serving(store) as served:
        os.kill(served.pid, signal.SIGSTOP)
        assert run(store, "down").stdout == f"stopped {served.url}\n"
        assert served.wait() == 0
