"""A command whose output nobody reads does its work, and ends with its own exit code."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shardline.cluster.cli import main
from shardline.cluster.serving.endpoint import Endpoint, leave_note
from shardline.cluster.serving.ray_session import SESSION_PREFIX, reap_orphans
from shardline.cluster.store import Store
from shardline.cluster.streams import STDERR, STDIN, STDOUT, _LastOutlet, _Outlet

COMMAND = (sys.executable, "-c", "from shardline.cluster.cli import main; main()")


def close_all() -> None:
    for number in (STDIN, STDOUT, STDERR):
        os.close(number)


def close_output() -> None:
    os.close(STDOUT)


@pytest.mark.parametrize(
    ("arguments", "code"), [(("config",), 0), (("status",), 4), (("nonsense",), 2)]
)
@pytest.mark.parametrize("closed", [close_output, close_all])
def test_closed_streams_change_no_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, closed: Callable[[], None]
) -> None:
    done = subprocess.run(
        [*COMMAND, "--store", str(tmp_path), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=closed,
        check=False,
        timeout=60,
    )
    assert done.returncode == code
    assert "internal error" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "code"), [(("config",), 0), (("status",), 4)])
def test_readers_that_left_change_no_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    """For output and errors alike; as with `| head -1`, but surely gone."""
    for stream in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        other = "stderr" if stream == "stdout" else "stdout"
        done = subprocess.run(
            [*COMMAND, "--store", str(tmp_path), *arguments],
            **{stream: writer, other: subprocess.PIPE},
            check=False,
            timeout=60,
        )
        os.close(writer)
        assert done.returncode == code
        assert b"internal error" not in (done.stderr or b"")


def test_a_full_disk_behind_the_output_is_an_error_and_behind_errors_none(tmp_path: Path) -> None:
    command = [*COMMAND, "--store", str(tmp_path), "config"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == 3
        assert "no space left" in done.stderr
        done = subprocess.run([*command, "nonsense"], stderr=full, timeout=60)
        assert done.returncode == 2


@pytest.mark.parametrize("kind", [_Outlet, _LastOutlet])
def test_after_a_reader_has_left_all_is_dropped(kind: type[_Outlet]) -> None:
    reader, writer = os.pipe()
    try:
        with kind(writer, "wb", closefd=False) as outlet:
            assert outlet.write(b"abc") == 3
            assert os.read(reader, 9) == b"abc"
            os.close(reader)
            assert [outlet.write(b"abcd"), outlet.write(bytes(1 << 20))] == [4, 1 << 20]
    finally:
        os.close(writer)


def refuse(self: psutil.Process, *_: object) -> None:
    raise psutil.AccessDenied(self.pid)


def test_down_by_another_user_names_the_one_who_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = psutil.Process()
    url = "http://127.0.0.1:1"
    note = Endpoint(url=url, generation=1, pid=own.pid, started=own.create_time())
    leave_note(Store(tmp_path), note)
    monkeypatch.setattr(psutil.Process, "send_signal", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["--store", str(tmp_path), "down"])
    error = capsys.readouterr().err
    assert ended.value.code == 4
    assert error.count("\n") == 1
    assert f"run `shardline down` as {own.username()}" in error


def test_the_orphans_of_another_user_are_left_to_that_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"{SESSION_PREFIX}999999999-abc"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert reap_orphans() == []
    assert folder.exists()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid)
    assert reap_orphans() == []
    assert not folder.exists()
