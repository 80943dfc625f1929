"""A real cluster, once a session: data, a trained model, three shards, HTTP. Checks for leaks."""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from shardline.cluster.build import build_generation, run_on_ray
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import ShardlineConfig, load_config
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Endpoint, is_alive
from shardline.cluster.serving.leftovers import SESSION_PREFIX
from shardline.cluster.serving.ray_session import local_ray
from shardline.cluster.store import Store
from shardline.router.client.sync_client import Client
from shardline.training.data.tables import Dataset
from shardline.training.export import export
from shardline.training.loop.launch import train
from shardline.training.synthetic.generator import PRESETS, generate

NUM_ITEMS = 3000
GONE_WITHIN_S = 10.0
# only searches with an experiment_key are part of it
EXPERIMENTS = (
    "[{name: probes, arms: [{name: control, share: 0.5},"
    " {name: few, share: 0.5, search: {params: {nprobe: 1, rerank_factor: 1}}}]}]"
)
SESSION = re.compile(rf"/{SESSION_PREFIX}([0-9]+)-")


@dataclass(frozen=True)
class Cluster:
    """What the session's cluster was made from, and where it answers."""

    config: ShardlineConfig
    store: Store
    dataset: Dataset
    run: Path
    endpoint: Endpoint

    @property
    def generation(self) -> Path:
        return self.store.generation(self.endpoint.generation)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No process of ours, no session folder, after the last test; what a test beside this one has
    just ended may take a moment to go."""
    before = our_traces()
    yield
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := our_traces() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == set()


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardlineConfig, Dataset, Path]:
    """A small data set and a model trained on it in this process."""
    root = tmp_path_factory.mktemp("job")
    config = load_config(
        None,
        [
            f"store={root / 'store'}",
            # the kind that `auto` takes beyond 20,000 rows; every list is searched and enough is
            # re-ranked, so that answers are exact
            "index.kind=ivfpq-fs",
            "index.nlist=16",
            "index.nprobe=16",
            "index.rerank=fp32",
            "index.rerank_factor=8",
            "cluster.shards=3",
            "cluster.http_port=0",
            "router.watch_interval_s=0.2",
            "quality.min_queries=1",
            f"router.experiments={EXPERIMENTS}",
            "training.num_workers=1",
            "training.epochs=2",
            "training.batch_size=1024",
        ],
    )
    synth = PRESETS["sharp"].model_copy(
        update={"num_users": 400, "num_items": NUM_ITEMS, "val_users": 100}
    )
    dataset = generate(synth, root / "data")
    run = root / "store" / "runs" / "small"
    train(config.training, dataset.path, run)
    return config, dataset, run


@pytest.fixture(scope="session")
def cluster(job: tuple[ShardlineConfig, Dataset, Path]) -> Iterator[Cluster]:
    """The session's cluster; a test that harms it waits until it is whole again."""
    config, dataset, run = job
    store = Store(config.store)
    embeddings = export(run, dataset.path, store.root, created_at="2026-01-01T00:00:00+00:00")
    with local_ray(num_cpus=4):
        manifest = build_generation(store, embeddings.folder, plan_of(config), run_jobs=run_on_ray)
        store.set_current(manifest.generation)
        with serving(config) as endpoint:
            yield Cluster(config, store, dataset, run, endpoint)


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.endpoint.address.client() as client:
        yield client


def our_traces() -> set[str]:
    """Session folders, and processes of sessions, whose owner is this process or is gone.

    A session's folder carries its owner's pid; another one on this machine has an owner that lives.
    """
    traces = {str(path): str(path) for path in Path(tempfile.gettempdir()).iterdir()}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            files = [file.path for file in process.open_files()]
            named = " ".join([*process.cmdline(), *files])
            traces[f"{process.name()} {process.pid}"] = named
    found = {name: SESSION.search(text) for name, text in traces.items()}
    owners = {name: int(match[1]) for name, match in found.items() if match is not None}
    return {name for name, pid in owners.items() if pid == os.getpid() or not is_alive(pid)}
