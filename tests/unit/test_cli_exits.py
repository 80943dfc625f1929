"""What a command ends with: exit codes, one line for errors about paths, suggestions."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pyarrow as pa
import pytest

from shardline.cluster import cli as command_line
from shardline.cluster.cli import COMMANDS, RAYS_WORDS, main
from shardline.cluster.exits import EXITS, as_known, exit_code
from shardline.shards.core import errors, files
from shardline.shards.core.errors import DataError, NotFound, ShardlineError, Unavailable

BARE = (ShardlineError, KeyboardInterrupt)  # their line needs no traceback
OPERATIONS = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidInput, 2),
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.CorruptFile, 3),
        (errors.NewerFormat, 3),
        (errors.NotFound, 3),
        (errors.VersionMismatch, 3),
        (errors.Unavailable, 4),
        (errors.DeadlineExceeded, 4),
        (errors.Overloaded, 4),
        (errors.ProtocolError, 1),
        (errors.ShardlineError, 1),
    ],
)
def test_every_error_has_its_code(kind: type[ShardlineError], code: int) -> None:
    assert exit_code(kind("a")) == code
    assert as_known(kind("a")) is not None


def test_help_and_the_operations_page_list_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ends(capsys, "--help")
    assert code == 0
    listed = " ".join(out.partition("Exit codes:")[2].split())
    table = OPERATIONS.read_text()
    for row in EXITS:
        assert f"{row.code} {row.meaning}" in listed
        assert f"| {row.code} | {row.meaning} |" in table
    assert len({row.code for row in EXITS}) == len(EXITS)


def write_over_a_folder(folder: Path) -> None:
    folder.write_text("x")


def make_below_a_file(folder: Path) -> None:
    (folder / "file").write_text("x")
    (folder / "file" / "below").mkdir(parents=True)


def make_over_a_file(folder: Path) -> None:
    (folder / "file").write_text("x")
    (folder / "file").mkdir(exist_ok=True)


def write_twice(folder: Path) -> None:
    with files.staged_folder(folder / "whole"):
        (folder / "whole").mkdir()


def lose_the_folder(folder: Path) -> None:
    with files.staged_folder(folder / "whole") as staging:
        (staging / "part" / "file").write_text("x")


def write_arrow_nowhere(folder: Path) -> None:
    pa.OSFile(str(folder / "nowhere" / "file"), "wb")


@pytest.mark.parametrize(
    ("act", "path", "text"),
    [
        (write_over_a_folder, ".", "a folder, where a file is needed"),
        (make_below_a_file, "file/below", "not a folder, or below something that is none"),
        (make_over_a_file, "file", "a file, where a folder is needed; remove it"),
        (write_twice, "whole", "exists already; another command has just written it; run again"),
        (lose_the_folder, ".", "no such file or folder"),
        (write_arrow_nowhere, "nowhere/file", "no such file or folder"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(
    tmp_path: Path, act: Callable[[Path], None], path: str, text: str
) -> None:
    with pytest.raises(OSError) as raised:
        act(tmp_path)
    known = as_known(raised.value)
    assert known is not None
    assert str(known).startswith(f"{tmp_path / path}: {text}")
    assert exit_code(known) == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT])
def test_refusals_of_the_system_name_path_and_reason(number: int) -> None:
    known = as_known(OSError(number, os.strerror(number), "/srv/store"))
    assert isinstance(known, DataError)
    assert re.fullmatch(r"/srv/store: [a-z' -]+; .+", str(known))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_from_a_defect() -> None:
    with pytest.raises(OSError) as raised, Path("/dev/full").open("w", buffering=1) as file:
        file.write("x\n")
    assert "no space left on the disk; make room" in str(as_known(raised.value))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_what_the_disk_says_needs_no_path(number: int) -> None:
    assert isinstance(as_known(OSError(number, os.strerror(number))), DataError)


@pytest.mark.parametrize(
    "defect",
    [
        ValueError("x"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError("no number"),
        TimeoutError("slow"),
        KeyError("x"),
        KeyError("x in words like No space left on device"),
        RuntimeError("write error in x: 0 != 1 (No space left on device)"),
        AssertionError("3 requested and 2 written"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
def test_what_is_not_about_a_path_stays_a_defect(defect: Exception) -> None:
    assert as_known(defect) is None


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NotFound("/x: gone", hint="look again"), 3, "error: /x: gone; look again\n"),
        (Unavailable("busy"), 4, "error: busy\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 3, "error: /x: permission de"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero; -v shows"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_a_command_that_fails_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(command_line.LazyGroup, "get_command", lambda *_: fails)
    ended, out, err = ends(capsys, "status")
    assert (ended, out) == (code, "")
    assert err.startswith(line)
    assert err.strip().count("\n") == 0
    assert err.endswith("; -v shows where\n") == (not isinstance(error, BARE))
    if code in (1, 3, 4):
        ended, out, told = ends(capsys, "-v", "status")
        assert (ended, out) == (code, "")
        assert told.startswith("Traceback")
        assert "in fails" in told
        assert told.endswith("\n" + err.replace("; -v shows where", ""))


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("buidl",), "Did you mean 'build'?"),
        (("qurey",), "Did you mean 'query'?"),
        (("keys", "lsit"), "Did you mean 'list'?"),
        (("query", "--itme", "3"), "Did you mean one of: '--filter', '--item', '--text'?"),
        (("query", "--store", "x"), "--store goes before the command: `shardline --store ... que"),
        (("keys", "list", "-c", "x"), "-c goes before the command: `shardline -c ... keys list`."),
    ],
)
def test_a_slip_of_the_finger_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], suggestion: str
) -> None:
    code, _, err = ends(capsys, *arguments)
    assert code == 2
    assert suggestion in err


def test_a_word_like_no_command_gets_none(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ends(capsys, "xyzzy")
    assert code == 2
    assert "No such command 'xyzzy'." in err
    assert "Did you mean" not in err
    assert "xyzzy" not in COMMANDS


def test_the_module_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the environment's programs are not on the PATH, as on a host over ssh."""
    command = [sys.executable, "-m", command_line.__name__, "query", "--nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    code, _, said = ends(capsys, "query", "--nonsense")
    assert done.returncode == code == 2
    assert "--nonsense" in done.stderr
    assert done.stderr.splitlines()[-1] == said.splitlines()[-1]


def test_what_ray_tells_of_itself_is_not_in_the_output_of_a_command() -> None:
    """Its standard output may be JSON. What ended a process for want of memory is said."""
    for line in (
        "WARNING: 8 PYTHON worker processes have been started on node: d86a",
        "Task Controller.table_after failed. There are infinite retries remaining",
        "A worker died or was killed while executing a task by an unexpected system error.",
    ):
        assert re.search(RAYS_WORDS, line)
    killed = "1 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed"
    assert not re.search(RAYS_WORDS, killed)
