"""Signals that end a command: they interrupt it, or wait; one that is ignored stays so."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shardline.cluster.signals import interrupting, not_ignored, postponed

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers_are_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in ENDING]
    yield
    assert [signal.getsignal(number) for number in ENDING] == before


@pytest.mark.parametrize("number", ENDING)
def test_each_interrupts_as_ctrl_c_does(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interrupting():
        signal.raise_signal(number)


@pytest.mark.parametrize("number", ENDING)
def test_a_postponed_one_comes_afterwards(number: signal.Signals) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupting():
        with postponed():
            signal.raise_signal(number)
            done.append("the import")
        done.append("what comes after it")
    assert done == ["the import"]


@pytest.mark.parametrize("number", ENDING)
def test_what_is_ignored_stays_so(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert number not in not_ignored()
        with interrupting(), postponed():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", ENDING)
def test_a_command_that_is_interrupted_undoes_what_it_has_begun(number: signal.Signals) -> None:
    code = f"""
import os, signal
from shardline.cluster import cli
def callback():
    try:
        os.kill(os.getpid(), {int(number)})
    finally:
        print("undone")
cli.cli.main = lambda **_: cli.click.Command("x", callback=callback).main([], standalone_mode=False)
cli.main(["x"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "undone\n")
    assert done.stderr.strip() == "interrupted"
