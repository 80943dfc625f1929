"""How a command ends by signals, by a second one, too late, or when Ray has died: without Ray."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardline.cluster.serving import ray_session
from shardline.cluster.serving.ending import ORDERLY_AFTER_CTRL_C_S, ORDERLY_S, Ending, overdue

START_S = 30.0
END_S = 10.0
PRELUDE = """
import os, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
from shardline.cluster.serving import ending as module
from shardline.cluster.serving.ending import Ending
say = partial(print, flush=True)
session = Path(sys.argv[1])
def child():
    # ends at nothing but SIGKILL, and is known by the session's folder on its command line
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
    return subprocess.Popen([sys.executable, "-c", code, str(session / "log")])
"""


@pytest.mark.parametrize(
    ("signals", "now", "reason"),
    [
        ([], 1e9, None),
        ([(signal.SIGINT, 5.0)], 5.1, None),
        ([(signal.SIGINT, 5.0)], 5.1 + ORDERLY_AFTER_CTRL_C_S, "not ended within 6 s"),
        ([(signal.SIGTERM, 5.0)], 5.1 + ORDERLY_AFTER_CTRL_C_S, None),
        ([(signal.SIGTERM, 5.0)], 5.1 + ORDERLY_S, "not ended within 15 s"),
        ([(signal.SIGHUP, 5.0)], 5.1 + ORDERLY_S, "not ended within 15 s"),
        # of a closing terminal, or sent to a process and to its group
        ([(signal.SIGHUP, 5.0), (signal.SIGTERM, 5.4), (signal.SIGHUP, 5.9)], 6.0, None),
        ([(signal.SIGTERM, 5.0), (signal.SIGTERM, 6.5)], 6.5, "signalled again"),
        (
            [(signal.SIGINT, 5.0), (signal.SIGINT, 5.2), (signal.SIGINT, 9.0)],
            9.0,
            "signalled again",
        ),
    ],
)
def test_when_the_orderly_end_is_over(
    signals: list[tuple[int, float]], now: float, reason: str | None
) -> None:
    assert overdue(signals, now) == reason


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Path]:
    session = tmp_path / "shardline-session"
    session.mkdir()
    yield session


class Script:
    """Python code in a process of its own, in the style of a command."""

    def __init__(self, session: Path, code: str) -> None:
        self.session = session
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(session)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for found in self.process.stdout:
            if found.strip() == line:
                return
        raise AssertionError(f"no line {line!r}: {self.process.communicate()}")

    def ends(self) -> tuple[int, str, str]:
        """Its exit code and what it has written since; nothing of the session is left."""
        try:
            out, error = self.process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        assert not self.session.exists()
        assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mentions(p, self.session)]
        return self.process.returncode, out, error


def mentions(path: Path, session: Path) -> bool:
    try:
        return str(session).encode() in path.read_bytes()
    except OSError:
        return False


def test_a_signal_is_no_interruption_of_what_waits_for_it(session: Path) -> None:
    script = Script(
        session,
        """
with Ending() as ending:
    ending.begin(session)
    ending.wait(lambda: say("ready"))
    say("stopping")
    session.rmdir(); ending.finish()
say("done")
""",
    )
    script.wait_for("ready")
    script.process.send_signal(signal.SIGHUP)
    assert script.ends() == (0, "stopping\ndone\n", "")


def test_a_signal_that_another_thread_takes_ends_the_wait_too(session: Path) -> None:
    script = Script(
        session,
        """
import threading
def take():
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
with Ending() as ending:
    ending.begin(session)
    ending.wait(threading.Timer(0.3, take).start)
    session.rmdir(); ending.finish()
say("done")
""",
    )
    script.wait_for("done")
    assert script.ends() == (0, "", "")


def test_an_interruption_waits_for_the_end_of_what_is_held(session: Path) -> None:
    script = Script(
        session,
        """
try:
    with Ending() as ending:
        ending.begin(session)
        with ending.held():
            say("held")
            time.sleep(0.5)
            say("still here")
        say("never")
except KeyboardInterrupt:
    say("interrupted")
""",
    )
    script.wait_for("held")
    script.process.send_signal(signal.SIGTERM)
    # the session, which nobody else has ended, goes with the block
    assert script.ends() == (0, "still here\ninterrupted\n", "")


def test_a_second_signal_kills_what_would_not_end(session: Path) -> None:
    script = Script(
        session,
        """
with Ending() as ending:
    ending.begin(session)
    ending.also(lambda: say("also"))
    child()
    with ending.held():
        say("stopping")
        time.sleep(99)
""",
    )
    script.wait_for("stopping")
    script.process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert script.process.poll() is None
    script.process.send_signal(signal.SIGINT)
    assert script.ends() == (130, "also\n", "interrupted: signalled again, killed\n")


def test_an_end_that_takes_too_long_is_cut_off(session: Path) -> None:
    script = Script(
        session,
        """
module.ORDERLY_AFTER_CTRL_C_S = 0.5
with Ending() as ending:
    ending.begin(session)
    child()
    with ending.held():
        say("starting")
        time.sleep(99)
""",
    )
    script.wait_for("starting")
    script.process.send_signal(signal.SIGINT)
    code, _, error = script.ends()
    assert (code, error) == (130, "interrupted: not ended within 0 s, killed\n")


def test_without_what_it_follows_it_ends_with_code_4(session: Path) -> None:
    script = Script(
        session,
        """
with Ending() as ending:
    ending.begin(session)
    followed = child()
    child()
    ending.follow({"Ray's raylet": followed.pid})
    say("serving")
    time.sleep(0.7)
    followed.kill()
    time.sleep(99)
""",
    )
    script.wait_for("serving")
    code, _, error = script.ends()
    assert code == 4
    assert error.startswith("error: Ray's raylet ended unexpectedly; ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("waits", "code"), [(True, 0), (False, 130)])
def test_ray_ended_together_with_the_command_is_no_error(
    session: Path, waits: bool, code: int
) -> None:
    """As when a supervisor signals every process of a service."""
    script = Script(
        session,
        f"""
with Ending() as ending:
    ending.begin(session)
    followed = child()
    ending.follow({{"Ray's raylet": followed.pid}})
    try:
        if {waits}:
            ending.wait(lambda: say(followed.pid))
        else:
            say(followed.pid)
            time.sleep(99)
    finally:
        time.sleep(99)
""",
    )
    assert script.process.stdout is not None
    followed = int(script.process.stdout.readline())
    os.kill(followed, signal.SIGKILL)
    script.process.send_signal(signal.SIGTERM)
    expected = "interrupted: Ray's raylet ended too, killed the rest\n"
    assert script.ends() == (code, "", expected)


def test_what_is_meant_to_end_is_not_missed(session: Path) -> None:
    script = Script(
        session,
        """
with Ending() as ending:
    ending.begin(session)
    followed = child()
    ending.follow({"Ray's raylet": followed.pid})
    with ending.stopping_ray():
        followed.kill()
        time.sleep(1.2)
        session.rmdir(); ending.finish()
say("done")
""",
    )
    script.wait_for("done")
    assert script.ends() == (0, "", "")


def test_nothing_is_started_any_more_once_all_is_ended() -> None:
    ending = Ending()
    with ending.starting_process():
        pass
    ending._is_over = True
    with pytest.raises(KeyboardInterrupt), ending.starting_process():
        pytest.fail("started")


def test_rays_processes_start_in_sessions_of_their_own() -> None:
    """So that a signal to this process's group, or from its terminal, does not reach them."""
    services = ray_session.services
    before = services.ConsolePopen
    with ray_session._children_apart(Ending()):
        # as `start_ray_process` of the Ray installed does
        process = services.ConsolePopen(
            [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"],
            stdout=subprocess.PIPE,
        )
        assert process.communicate()[0] == b"True\n"
    assert services.ConsolePopen is before
    assert "ConsolePopen" in services.start_ray_process.__code__.co_names


def test_this_ray_sets_its_handlers_where_they_are_held_off(session: Path) -> None:
    from ray._private import node, ray_constants, utils, worker

    assert "set_sigterm_handler" in worker.init.__wrapped__.__code__.co_names
    assert "set_sigterm_handler" in node.Node._register_shutdown_hooks.__code__.co_names
    assert ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER is False
    ending = Ending()
    ending.is_active = True
    before = signal.getsignal(signal.SIGTERM)
    with ray_session._handlers_kept(ending):
        utils.set_sigterm_handler(lambda *_: os.abort())
        assert signal.getsignal(signal.SIGTERM) is before
        assert ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER is True
    assert ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER is False


def test_a_command_that_is_not_watched_over_has_its_signals_as_they_were() -> None:
    ending = Ending()
    with ending.held(), ray_session._handlers_kept(ending):
        pass
    ending.begin(Path("/nowhere"))
    ending.finish()
    assert not ending.is_active
