"""Commands on machines that lack something: files, disks, shared memory; with variables of others.

What cannot be had without mounts is skipped where this user may make none.
"""

import concurrent.futures
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.machines import conftest
from tests.machines.conftest import TEMPORARY, Served, run, serving

AT_ONCE = 200
REFUSED_S = 20.0  # far below what Ray takes to start and fail
NOTICED_S = 15.0

MAY_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
)
needs_mounts = pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount")

Within = Callable[[str], None]


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Within:
    """Has every command run after a line of shell, in a mount namespace of its own."""
    plain = conftest.command

    def enter(line: str) -> None:
        separate = ["unshare", "-m"] if "mount" in line else []
        shell = [*separate, "sh", "-ec", f'{line}; exec "$@"', "sh"]
        monkeypatch.setattr(conftest, "command", lambda *arguments: [*shell, *plain(*arguments)])

    return enter


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """One line that says why, and not a word of Ray."""
    assert done.stderr.count("\n") == 1, done.stderr
    for text in expected:
        assert text in done.stderr


@pytest.fixture
def others() -> Iterator[dict[str, str]]:
    """Variables that name another Ray and several proxies, all of them here; nobody asks there."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        yield {
            "RAY_ADDRESS": address,
            "http_proxy": f"http://{address}",
            "HTTPS_PROXY": "http://[::1",  # no URL
            "ALL_PROXY": f"socks5://{address}",
            "grpc_proxy": f"http://{address}",
            "no_proxy": "[::1",
        }
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            asked, _ = other.accept()
            with asked:
                asked.setblocking(False)
                pytest.fail(f"asked the other: {asked.recv(1 << 12)!r}")


def test_serve_under_4096_open_files_with_addresses_and_proxies_of_others(
    store: Path, within: Within, others: dict[str, str]
) -> None:
    within("ulimit -n 4096")
    with serving(store, **others) as served:
        assert "warning: 4,096 open files are enough for 1,587 HTTP connections" in served.text
        for process in psutil.Process(served.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                assert not others.keys() & process.environ().keys(), process
        (written,) = TEMPORARY.glob("shardline-*/*/haproxy.cfg")
        assert "maxconn 1587\n" in written.read_text()
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            statuses = list(pool.map(lambda _: status_of(f"{served.url}/readyz"), range(AT_ONCE)))
        assert statuses == [200] * AT_ONCE
        status = json.loads(run(store, "status", "--json", **others).stdout)
        assert status["rows"] == conftest.ROWS
        found = run(store, "query", "--item", "3", "-k", "5", "--json", **others).stdout
        assert len(json.loads(found)["results"]) == 5
        doctor = run(store, "doctor", expect=None, **others).stdout
        assert "warn  open files: 4,096" in doctor
        load = ("bench", "load", "rate", "--seconds", "1", "--warm-up", "0", "--rate", "5")
        assert "p50" in run(store, *load, **others).stdout


def status_of(url: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        return int(answer.status)


def test_too_few_files_are_refused_with_the_number_and_the_command(
    store: Path, within: Within
) -> None:
    within("ulimit -n 600")
    began = time.monotonic()
    done = run(store, "serve", "--insecure", "--port", "0", expect=4)
    assert time.monotonic() - began < REFUSED_S
    refused(done, "at least 768 for HAProxy", "got 600", "`ulimit -n 768`")
    assert "FAIL  open files: " in run(store, "doctor", expect=3).stdout


@needs_mounts
@pytest.mark.parametrize("command", ["serve", "build"])
def test_a_read_only_store_is_refused(store: Path, within: Within, command: str) -> None:
    within(f"mount --bind {store} {store}; mount -o remount,ro,bind {store}")
    refused(run(store, command, expect=3), f"{store}: on a read-only file system")
    assert "FAIL  store: " in run(store, "doctor", expect=3).stdout


@needs_mounts
@pytest.mark.parametrize("command", ["serve", "build"])
def test_a_full_store_is_refused(store: Path, within: Within, command: str) -> None:
    within(f"{on_small_disk(store)}; cat /dev/zero > {store}/fill 2>/dev/null || true")
    refused(run(store, command, expect=3), f"{store}: no space left", "make room")


def on_small_disk(store: Path) -> str:
    """Puts a copy of the store on a disk of 64 MiB, in its own place."""
    copy = f"{store}.copy"
    return (
        f"mkdir -p {copy}; mount -t tmpfs -o size=64m tmpfs {copy}; cp -a {store}/. {copy}/; "
        f"mount --move {copy} {store} 2>/dev/null || mount --bind {copy} {store}"
    )


@needs_mounts
def test_programs_cannot_be_started_in_the_temporary_folder_and_shared_memory_is_small(
    store: Path, within: Within, tmp_path: Path
) -> None:
    """`serve` is refused; `build`, for which nothing is started there, works with a real Ray."""
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    within(
        f"mount -t tmpfs -o noexec,size=1g tmpfs {TEMPORARY}; "
        "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    )
    done = run(copy, "serve", "--insecure", "--port", "0", expect=4)
    refused(done, f"{TEMPORARY}: mounted so that no program in it can be started", "set TMPDIR=/")
    built = run(copy, "--set", "cluster.shards=2", "build")
    assert "generation 2: 2,000 rows in 2 shards" in built.stdout
    assert "warning: /dev/shm: 64 MiB free" in built.stderr


@needs_mounts
def test_a_temporary_folder_without_room_is_refused(store: Path, within: Within) -> None:
    within(f"mount -t tmpfs -o size=8m tmpfs {TEMPORARY}")
    done = run(store, "serve", "--insecure", "--port", "0", expect=4)
    refused(done, f"{TEMPORARY}: no space for Ray's files", "got 8 MiB", "set TMPDIR=/")


@needs_mounts
def test_a_store_that_fills_up_while_it_is_served(store: Path, within: Within) -> None:
    """Answers go on; `status` says why nothing new is published, until there is room again."""
    within(on_small_disk(store))
    with serving(store) as served:
        inside = Path(f"/proc/{served.pid}/root") / store.relative_to("/")
        note = json.loads((inside / "serving.json").read_text())
        assert note["url"] == served.url
        with filled(inside / "fill"):
            shard_of(served).kill()
            warning = wait_for_warning(store, served)
            assert warning["code"] == "invalid_data"
            assert "cannot save its counter" in warning["text"]
            assert "no space left" in warning["text"]
        deadline = time.monotonic() + conftest.START_S
        while time.monotonic() < deadline:
            report = status(store, served)
            if not report["warnings"] and all(shard["connected"] for shard in report["shards"]):
                break
            time.sleep(0.5)
        assert report["warnings"] == []
        assert [shard["connected"] for shard in report["shards"]] == [True, True]


@contextlib.contextmanager
def filled(path: Path) -> Iterator[None]:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        path.unlink()


def shard_of(served: Served) -> psutil.Process:
    children = psutil.Process(served.pid).children(recursive=True)
    return next(each for each in children if "ShardActor" in " ".join(each.cmdline()))


def status(store: Path, served: Served) -> dict:
    return dict(json.loads(run(store, "status", "--url", served.url, "--json").stdout))


def wait_for_warning(store: Path, served: Served) -> dict:
    deadline = time.monotonic() + NOTICED_S
    while time.monotonic() < deadline:
        found = [
            each for each in status(store, served)["warnings"] if each["about"] == "controller"
        ]
        if found:
            return dict(found[0])
        time.sleep(0.2)
    raise AssertionError("no warning in status")
