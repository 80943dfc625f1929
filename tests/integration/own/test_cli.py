"""The main job by its commands, each a process of its own, as the README gives them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from shardline.cluster.serving.ray_session import free_port
from shardline.shards.storage.generation import INDEX_NAME, shard_folder

START_S = 120.0
ASK_EVERY_S = 0.02
OTHER_KEY = "o" * 40  # of another cluster


def shardline(
    folder: Path, *arguments: str, expect: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end, in ``folder`` with the store ``folder/store``."""
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=START_S,
        env=os.environ | variables,
    )
    assert done.returncode == expect, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "shardline"), "--store", "store", *arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run; the first ones up to ``build`` have been run there."""
    folder = tmp_path_factory.mktemp("cli")
    sizes = ("--users", "300", "--items", "2000")
    shardline(folder, "data", "synth", "--preset", "sharp", "--out", "data", *sizes)
    values = ("batch_size=512", "num_workers=1", "optimiser.warmup_steps=5")
    settings = [part for value in values for part in ("--set", f"training.{value}")]
    shardline(folder, *settings, "train", "--data", "data", "--epochs", "8")
    shardline(folder, "export", "--data", "data")
    kind = ("--set", "index.kind=ivf", "--set", "cluster.shards=2")
    built = shardline(folder, *kind, "build", "--in-process")
    assert "generation 1: 2,000 rows in 2 shards" in built.stdout
    return folder


def test_evaluate_prints_the_model_beside_popularity_and_the_ceilings(folder: Path) -> None:
    report = json.loads(shardline(folder, "evaluate", "--data", "data", "--json").stdout)
    assert report["model"]["recall@100"] > report["popularity"]["recall@100"]
    assert report["ceilings"]["oracle"]["means"]["recall@100"] > report["model"]["recall@100"]
    table = shardline(folder, "evaluate", "--data", "data").stdout
    assert "of ceiling" in table
    assert "popularity" in table


@contextlib.contextmanager
def asked_all_along(port: int) -> Iterator[list[httpx.Response]]:
    """What a client saw that asked without a pause; refused and broken connections are left out."""
    seen: list[httpx.Response] = []
    stopped = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as http:
            while not stopped.wait(ASK_EVERY_S):
                with contextlib.suppress(httpx.TransportError):
                    seen.append(http.get("/readyz"))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


def check_statuses(seen: list[httpx.Response]) -> None:
    """503 while there is no router, at the start and at the end, and nothing that a client gives
    up at."""
    for response in seen:
        if response.status_code != 200:
            assert response.status_code == 503, response.text
            assert response.headers["retry-after"] == "1"
            assert response.json()["code"] == "unavailable"
    statuses = [response.status_code for response in seen]
    assert 200 in statuses
    assert statuses[0] == statuses[-1] == 503


def test_serve_status_query_down(folder: Path) -> None:
    port = free_port()
    with asked_all_along(port) as seen:
        serve_status_query_down(folder, port)
    check_statuses(seen)


def serve_status_query_down(folder: Path, port: int) -> None:
    server = subprocess.Popen(
        command("serve", "--port", str(port)),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SHARDLINE_API_KEY": OTHER_KEY},
    )
    try:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if line.startswith("serving generation 1"):
                break
        assert f"http://127.0.0.1:{port}" in lines[-1], lines
        status = json.loads(shardline(folder, "status", "--json").stdout)
        assert [shard["connected"] for shard in status["shards"]] == [True, True]
        assert status["rows"] == 2000
        found = json.loads(
            shardline(folder, "query", "--user", "7", "--data", "data", "-k", "5", "--json").stdout
        )
        assert len(found["results"]) == 5
        assert found["coverage"]["rows_answered"] == 2000
        assert "results from generation 1" in shardline(folder, "query", "--item", "3").stdout
        check_environments(server.pid)
        check_keys(folder, f"http://127.0.0.1:{port}", lines)
        check_second_serve(folder, port)
        check_unknown_items(folder)
        assert "stopped" in shardline(folder, "down").stdout
        assert server.wait(timeout=START_S) == 0
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=START_S)
        server.stderr.close() if server.stderr is not None else None
    gone = shardline(folder, "status", expect=4)
    assert gone.stderr.startswith("error: ")
    assert "no cluster is serving this store" in gone.stderr


def check_second_serve(folder: Path, port: int) -> None:
    """It names the running cluster, and `doctor` takes that one's port for what it is."""
    for arguments in (("--port", str(port)), ()):
        refused = shardline(folder, "serve", *arguments, expect=4)
        assert f"served already, generation 1 at http://127.0.0.1:{port}" in refused.stderr
        assert "`shardline down`" in refused.stderr
    report = shardline(folder, "--set", f"cluster.http_port={port}", "doctor").stdout
    assert f"ok    port {port}: this store's cluster answers there, generation 1" in report


def check_unknown_items(folder: Path) -> None:
    """The known ones are answered, the others named; --nprobe is of use to this index."""
    some = shardline(folder, "query", "--item", "3", "--item", "999999", "--nprobe", "9", expect=3)
    assert "similar to item 3" in some.stdout
    assert some.stderr == "error: no item 999999 in generation 1\n"
    none = shardline(folder, "query", "--item", "999999", "--json", expect=3)
    assert json.loads(none.stdout)["results"] == []
    refused = shardline(folder, "query", "--vector", "[1]", expect=2)
    assert refused.stderr.startswith("error: --vector: wrong dimension")


def check_environments(pid: int) -> None:
    """No process of the cluster has inherited a key, nor HAProxy the token of Ray."""
    children = psutil.Process(pid).children(recursive=True)
    assert {"raylet", "haproxy"} <= set(map(name_of, children))
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # some live for a moment only
            environ = child.environ()
            assert OTHER_KEY not in environ.values(), child.cmdline()
            assert ("RAY_AUTH_TOKEN" in environ) <= (child.name() != "haproxy")


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def check_keys(folder: Path, url: str, lines: list[str]) -> None:
    """A key file was made and named; without a key of it there is no answer."""
    path = folder / "store" / "keys"
    assert f"made {path}, mode 600" in "".join(lines)
    assert path.stat().st_mode & 0o777 == 0o600
    key = shardline(folder, "keys", "show").stdout.strip()
    assert f"search:{key}" in path.read_text()
    assert key not in "".join(lines)
    refused = shardline(folder, "status", "--url", url, expect=2)
    assert "a key is needed" in refused.stderr
    refused = shardline(folder, "query", "--item", "3", expect=2, SHARDLINE_API_KEY="w" * 40)
    assert "not one of this cluster's keys" in refused.stderr
    shardline(folder, "status", "--url", url, SHARDLINE_API_KEY=key)
    shardline(folder, "status", "--url", url, "--key-file", str(path))
    assert "search" in shardline(folder, "keys", "list").stdout


def test_doctor_and_serve_name_a_damaged_file(folder: Path) -> None:
    index = folder / "store" / "generations" / "000001" / shard_folder(1) / INDEX_NAME
    whole = index.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    try:
        index.write_bytes(damaged)
        report = shardline(folder, "--set", "cluster.http_port=0", "doctor", expect=3)
        assert "FAIL  generation 1" in report.stdout
        assert str(index.relative_to(folder)) in report.stdout
        refused = shardline(folder, "--set", "cluster.http_port=0", "serve", expect=3)
        assert "wrong checksum" in refused.stderr
        assert f"{shard_folder(1)}/{INDEX_NAME}" in refused.stderr
        assert refused.stderr.endswith("; make a new one with `shardline build`\n")
    finally:
        index.write_bytes(whole)


def test_a_killed_server_is_cleaned_up_by_down(folder: Path) -> None:
    server = subprocess.Popen(
        command("--set", "cluster.http_port=0", "serve", "--insecure"),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if line.startswith("serving generation 1"):
            break
    assert any(line.startswith("INSECURE: no API key is asked for") for line in lines)
    url = json.loads((folder / "store" / "serving.json").read_text())["url"]
    assert '"connected": true' in shardline(folder, "status", "--url", url, "--json").stdout
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    server.stderr.close()
    out = shardline(folder, "down").stdout
    assert "left by a session that was killed" in out
    assert "nothing is serving this store" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("serve",), 3, "no live generation"),
        (("serve", "--generation", "7"), 3, "no generation 7"),
        (("build",), 3, "no embedding set"),
        (("evaluate", "--data", "nowhere"), 3, "nowhere"),
        (("--set", "index.nlits=4", "build"), 2, "index.nlits"),
        (("--set", "cluster.shards=0", "build"), 2, "cluster.shards"),
        (("-c", "nowhere.yaml", "build"), 3, "nowhere.yaml"),
        (("query", "--vector", "[1,"), 2, "--vector"),
        (("query",), 2, "exactly one of"),
        (("nonsense",), 2, "nonsense"),
        (("buidl",), 2, "Did you mean 'build'?"),
        (("--store", "/dev/null", "serve"), 3, "/dev/null: not a folder"),
    ],
)
def test_mistakes_end_in_one_line_and_an_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = shardline(tmp_path, *arguments, expect=code)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_fast_and_lists_every_command(tmp_path: Path) -> None:
    started = time.perf_counter()
    text = shardline(tmp_path, "--help").stdout
    assert time.perf_counter() - started < 5, "heavy imports are lazy; this is 0.2 s when idle"
    for name in ("data", "train", "evaluate", "export", "build", "serve", "status", "query"):
        assert f"  {name} " in text
