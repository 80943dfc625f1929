"""Two checkouts side by side: the order of runs, ratios, and a whole run against a stand-in."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from shardline.bench.corpus import clustered_set
from shardline.bench.load.checkout import Checkout, fan_out_figures
from shardline.bench.load.compare import main, params_of, parse_params, write_vectors
from shardline.bench.load.pairs import BATCH, Bench, Side, comparison, order_of
from shardline.cluster.serving.endpoint import Address, is_alive
from shardline.cluster.serving.ray_session import free_port
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, NotFound, Unavailable
from shardline.shards.storage.foreign_vectors import read_foreign

# a project whose server answers nothing but /readyz, and ends with SIGTERM; it says what it was
# called with, and fails where the configuration says so
PROJECT = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

def main():
    words = sys.argv[1:]
    store = Path(words[words.index("--store") + 1])
    store.mkdir(parents=True, exist_ok=True)
    with (store / "calls").open("a") as calls:
        calls.write(json.dumps(words + [os.getcwd(), os.environ.get("SHARDLINE_STORE")]) + "\\n")
    if "broken=true" in words:
        sys.exit("error: broken as asked")
    if "build" in words:
        (store / "CURRENT").write_text("1")
    if "keys" in words:
        print("the-key")
    if "serve" in words:
        (store / "pid").write_text(str(os.getpid()))
        HTTPServer(("127.0.0.1", int(words[-1])), Handler).serve_forever()
"""
FANOUT = """
import json, sys
print("a table")
spaced = {"p50": float(sys.argv[-1])}
print(json.dumps({"fan_out_ms": {"in_a_row": {"p50": 0.5}, "spaced": spaced}}))
"""


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Checkout]:
    """A checkout from before the namespace."""
    folder = tmp_path / "old"
    for name, text in (("cluster/cli.py", PROJECT), ("bench/fanout.py", FANOUT)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        (folder / name).with_name("__init__.py").touch()
    yield Checkout(folder)


def calls(store: Path) -> list[list[str]]:
    return [json.loads(line) for line in (store / "calls").read_text().splitlines()]


def test_each_pair_begins_with_the_other_side() -> None:
    assert [order_of(pair) for pair in range(4)] == [(0, 1), (1, 0), (0, 1), (1, 0)]


def test_ratios_are_speeds_of_the_second_by_the_first_pair_by_pair() -> None:
    for samples, ratio in (([(1.0, 2.0)], 0.5), ([(3.0, 2.0)], 1.5), ([(4.0, 4.0)], 1.0)):
        assert comparison("p50", "ms", samples)["ratio"] == ratio, "twice the time, half the speed"
    found = comparison("peak", "queries/s", [(100.0, 200.0), (300.0, 150.0), (10.0, 11.0)])
    assert (found["first"], found["second"]) == (100, 150), "medians of each side"
    assert (found["ratio"], found["ratio_min"], found["ratio_max"]) == (1.1, 0.5, 2.0)
    assert found["samples"] == [(100.0, 200.0), (300.0, 150.0), (10.0, 11.0)]


def test_search_parameters_are_read_or_refused() -> None:
    assert parse_params("nprobe=16,rerank_factor=1") == {"nprobe": 16, "rerank_factor": 1}
    assert parse_params("own") == {}
    for text in ("nprobe", "nprobe=x", "", "nprobe=1=2"):
        with pytest.raises(InvalidInput, match="--params: not understood"):
            parse_params(text)


def test_there_is_one_difference_between_the_sides() -> None:
    assert params_of(Path("x"), ("nprobe=4",)) == ({"nprobe": 4}, {"nprobe": 4})
    assert params_of(None, ("nprobe=4", "own")) == ({"nprobe": 4}, {})
    for baseline, texts in ((Path("x"), ("own", "own")), (Path("x"), ()), (None, ("own",))):
        with pytest.raises(InvalidInput, match="two of them without --baseline, one with it"):
            params_of(baseline, texts)


def test_the_fan_out_is_read_whatever_its_version_calls_it() -> None:
    for name in ("in_a_row", "sequential"):
        figures = {name: {"p50": 0.4, "p99": 9}, "spaced": {"p50": 1.2, "p99": 9}}
        text = "╭ a table ╮\n" + json.dumps({"setup": {}, "fan_out_ms": figures}, indent=2)
        assert fan_out_figures(text) == {"sequential": 0.4, "spaced": 1.2}


def test_a_checkout_is_run_from_its_own_folder(old: Checkout) -> None:
    old.check()
    assert old.prefix == ""
    assert old.fan_out(count=10, rate=2.5) == {"sequential": 0.5, "spaced": 2.5}
    ours = Checkout(Path(__file__).resolve().parents[2])
    assert ours.prefix == "shardline."
    ours.check()
    assert len(ours.commit.rstrip("+")) == 12


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises((NotFound, Unavailable), match=str(tmp_path)):
        Checkout(tmp_path).check()
    with pytest.raises(NotFound, match="no fan-out benchmark"):
        Checkout(tmp_path).fan_out(count=10, rate=1)


def test_what_is_built_is_reused_by_the_same_commit_and_configuration(
    old: Checkout, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    settings = ("cluster.shards=2", "index.nlist=64")
    assert old.build(store, Path("v.parquet"), settings)
    assert not old.build(store, Path("v.parquet"), settings)
    (call,) = calls(store)
    overrides = ["--set", settings[0], "--set", settings[1]]
    assert call[:-2] == ["--store", str(store), *overrides, "build", "--vectors", "v.parquet"]
    assert call[-2:] == [str(old.folder), None], "its folder, and no store of ours"
    names = {
        old.store_name(10, 4, settings),
        old.store_name(10, 5, settings),
        old.store_name(10, 4, settings[:1]),
        Checkout(tmp_path).store_name(10, 4, settings),
    }
    assert len(names) == 4


def test_a_server_answers_within_the_block_and_is_gone_after_it(
    old: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDLINE_STORE", "/somewhere/else")
    store, port = tmp_path / "store", free_port()
    store.mkdir()
    with old.serving(store, ("router.cache_bytes=0",), port) as address:
        assert (address.url, address.key) == (f"http://127.0.0.1:{port}", "the-key")
        pid = int((store / "pid").read_text())
        assert is_alive(pid) and pid != os.getpid()
    assert not is_alive(pid)
    assert all(call[-1] is None for call in calls(store))


def test_a_server_that_does_not_start_says_why(old: Checkout, tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match=r"did not start.*error: broken as asked"),
        old.serving(tmp_path, ("broken=true",), free_port()),
    ):
        pass
    with pytest.raises(Unavailable, match="error: broken as asked"):
        old.build(tmp_path / "other", Path("v"), ("broken=true",))


@contextmanager
def endpoint(name: str, order: list[str], pause_s: float, status: int) -> Iterator[Side]:
    """Answers every search with this status, after a pause."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            order.append(name)
            time.sleep(pause_s)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = Address(f"http://127.0.0.1:{server.server_port}", "k")
        yield Side(name=name, checkout=Checkout(Path("x")), address=address, params={})
        server.shutdown()


def test_alternating_requests_tell_the_slower_side_and_count_what_failed() -> None:
    order: list[str] = []
    with endpoint("fast", order, 0.0, 200) as fast, endpoint("slow", order, 0.03, 503) as slow:
        queries = np.zeros((BATCH, 4), np.float32)
        bench = Bench(sides=(fast, slow), queries=queries, seconds=0.2, note=print)
        first, second = bench.alternating()
    assert first < 30 <= second
    assert order[:4] == ["fast", "slow", "slow", "fast"]
    assert (bench.failures["fast"], bench.failures["slow"]) == (0, order.count("slow"))


def test_the_vectors_are_a_file_that_every_version_reads(tmp_path: Path) -> None:
    corpus = clustered_set(Store(tmp_path), 500, 8, lambda *_: None)
    write_vectors(corpus, tmp_path / "v.parquet")
    read = list(read_foreign([tmp_path / "v.parquet"]))
    np.testing.assert_array_equal(np.concatenate([b.item_ids for b in read]), np.arange(500))
    np.testing.assert_array_equal(
        np.concatenate([batch.vectors for batch in read]),
        np.concatenate([batch.vectors for batch in corpus.batches()]),
    )
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_be_compared_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    shown = CliRunner().invoke(main, ["--params", "own", "--store", str(tmp_path / "store")])
    assert isinstance(shown.exception, InvalidInput)
    assert not (tmp_path / "store").exists()
