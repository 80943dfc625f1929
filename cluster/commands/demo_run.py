"""The stages of ``demo`` in order, none simulated; their measurements become its figures."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shardline.bench.index import kinds as index_kinds
from shardline.bench.load.fleet import ask
from shardline.bench.load.http_bytes import EMPTY, Request, search_request
from shardline.cluster.build import build_generation, run_on_ray
from shardline.cluster.cli import Settings
from shardline.cluster.commands.build import plan_of
from shardline.cluster.commands.data_options import validated
from shardline.cluster.commands.demo_report import TARGETS, print_report
from shardline.cluster.commands.demo_text import stage_line, stay_lines
from shardline.cluster.commands.encoder_kinds import encoder_kinds
from shardline.cluster.commands.model import train_with_progress
from shardline.cluster.commands.remote import evaluate_cluster
from shardline.cluster.commands.serve import serving_cpus
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import StageProgress, print_warnings
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.machine import before_ray
from shardline.cluster.preflight.open_files import requests_in_flight
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Endpoint
from shardline.cluster.serving.going_live import make_live
from shardline.cluster.serving.ray_session import cores, ray_for
from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.messages import SearchParams
from shardline.shards.storage.embedding_set import EmbeddingSet
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.evaluation.ranking_metrics import DEFAULT_KS
from shardline.training.evaluation.user_queries import query_features
from shardline.training.export import export
from shardline.training.synthetic.generator import PRESETS, SynthConfig, add_ceilings, generate

# The towers suit the generator: bench/configs/sharp.yaml and docs/PERFORMANCE.md say why. Without
# the cache, because the latencies are those of the search.
DEMO_SETTINGS = {
    "training.num_workers": 2,
    "training.metric": "dot",
    "training.towers.query.hidden": [],
    "training.towers.query.features": [
        {"kind": "numeric", "column": "age"},
        {"kind": "categorical", "column": "gender"},
        {"kind": "categorical", "column": "country"},
        {"kind": "history", "pooling": "attention"},
    ],
    "training.towers.item.hidden": [],
    "training.epochs": 10,
    "training.validation.every_epochs": 10,
    "cluster.shards": 4,
    "router.cache_bytes": 0,
}
# The metrics ask for 1,000 items, ten times the k that the parameters are measured with.
DEEP_SEARCH = SearchParams(nprobe=256, rerank_factor=4)
KIND_QUERIES = 500
LOAD_RATE = 20.0  # requests per second
LOAD_REQUESTS = 400
LOAD_WARM_UP = 60
QUICK_SIZES = {"num_users": 2_000, "num_items": 10_000, "ceiling_users": 0}
QUICK_LOAD_REQUESTS = 60
QUICK_LOAD_WARM_UP = 20
TOP_K = 100


def run_demo(
    settings: Settings,
    *,
    preset: str,
    sizes: dict[str, int],
    report: Path,
    folder: Path,
    quick: bool,
    stay: bool,
    progress: StageProgress,
) -> dict[str, Any]:
    """Runs all steps in ``folder``; returns the figures, also printed and written to ``report``.

    ``sizes`` replace fields of the preset. ``quick``: small, and without what takes long. Ray is
    started here and has stopped at the return.
    """
    small = QUICK_SIZES if quick else {}
    synth = validated(SynthConfig, PRESETS[preset].model_dump() | small | sizes)
    settings.preferences.update(DEMO_SETTINGS)
    config = settings.config.model_copy(update={"store": folder / "store"})
    demo = Demo(config=config, folder=folder, progress=progress, quick=quick)
    dataset = demo.data(synth, preset)
    progress.note("starting Ray")
    needs = {"num_cpus": serving_cpus(config), "in_flight": requests_in_flight(config)}
    print_warnings(enforce(before_ray(needs["in_flight"])))
    with ray_for("local", **needs, verbose=settings.verbose) as ending:
        if settings.store_path is None:
            ending.also(partial(shutil.rmtree, folder, ignore_errors=True))
        embeddings = demo.model(dataset)
        demo.build(embeddings)
        with demo.served() as endpoint:
            demo.measure(endpoint, dataset)
            if not quick:  # what only compares comes after the first answers
                demo.kinds(dataset, embeddings)
                demo.ceilings(dataset, synth.ceiling_users)
            demo.finish(report)
            if stay:
                lines = stay_lines(endpoint.url, endpoint.key_file)
                ending.wait(partial(progress.note, "\n".join(lines)))
            progress.note("stopping HTTP, shards and Ray")
    return demo.figures


@dataclass(kw_only=True)
class Demo:
    """The stages in order; their measurements are collected in ``figures``."""

    config: ShardlineConfig
    folder: Path
    progress: StageProgress
    quick: bool
    figures: dict[str, Any] = field(default_factory=lambda: {"seconds": {}})
    started: float = field(default_factory=time.perf_counter)

    @property
    def store(self) -> Store:
        return Store(self.config.store)

    @property
    def load_requests(self) -> int:
        return QUICK_LOAD_REQUESTS if self.quick else LOAD_REQUESTS

    @property
    def load_warm_up(self) -> int:
        return QUICK_LOAD_WARM_UP if self.quick else LOAD_WARM_UP

    @property
    def run_folder(self) -> Path:
        return self.store.runs / "demo"

    def data(self, synth: SynthConfig, preset: str) -> Dataset:
        """Users, items and interactions."""
        with self._stage("data"):
            self.progress.note(
                f"{synth.num_users:,} users, {synth.num_items:,} items, preset {preset}"
            )
            dataset = generate(
                synth.model_copy(update={"ceiling_users": 0}),
                self.folder / "data",
                threads=cores(),
                progress=self.progress,
            )
        self.figures["data"] = {"preset": preset, **dataset.rows}
        return dataset

    def model(self, dataset: Dataset) -> EmbeddingSet:
        """Trains under Ray Train, then embeds every item."""
        with self._stage("train"):
            result = train_with_progress(
                self.config, dataset.path, self.run_folder, self.progress, resume=False
            )
        self.figures["training"] = asdict(result) | {"run_folder": None}
        with self._stage("export"):
            created_at = datetime.now(UTC).isoformat(timespec="seconds")
            return export(
                self.run_folder,
                dataset.path,
                self.store.root,
                created_at=created_at,
                progress=self.progress,
            )

    def kinds(self, dataset: Dataset, embeddings: EmbeddingSet) -> None:
        """Every kind of index over the item embeddings, searched with the users' embeddings."""
        with self._stage("index kinds"):
            vectors = np.concatenate([batch.vectors for batch in embeddings.batches()])
            scratch = self.folder / "kinds"
            scratch.mkdir()
            self.figures["index_kinds"] = [
                asdict(report)
                for report in index_kinds.compare(
                    vectors,
                    _user_vectors(embeddings, dataset, KIND_QUERIES),
                    scratch,
                    metric=embeddings.metric,
                    threads=cores(),
                    progress=self.progress,
                    note=self.progress.note,
                )
            ]

    def build(self, embeddings: EmbeddingSet) -> None:
        """Builds the live generation: one template, one index per shard."""
        with self._stage("build"):
            manifest = build_generation(
                self.store,
                embeddings.folder,
                plan_of(self.config),
                run_jobs=run_on_ray,
                progress=self.progress,
            )
            make_live(self.store, manifest.generation)
        self.figures["generation"] = {
            "index": manifest.index.model_dump(mode="json"),
            "shards": len(manifest.shards),
            "quality": manifest.quality,
        }

    @contextlib.contextmanager
    def served(self) -> Iterator[Endpoint]:
        """Serves on a free port for the length of the block."""
        cluster = self.config.cluster.model_copy(update={"http_port": 0})
        config = self.config.model_copy(update={"cluster": cluster})
        with contextlib.ExitStack() as stack:
            with self._stage("serve"):
                endpoint = stack.enter_context(serving(config, on_stage=self.progress.note))
            yield endpoint

    def measure(self, endpoint: Endpoint, dataset: Dataset) -> None:
        """Metrics of all test users and latencies of some, both through HTTP."""
        with self._stage("evaluate exactly"):
            exact = evaluate_exact(self.run_folder, dataset, progress=self.progress)
        with self._stage("evaluate over HTTP"), endpoint.address.client() as client:
            kinds = encoder_kinds(client)
            model = evaluate_cluster(
                client, dataset, "test", DEFAULT_KS, self.progress, params=DEEP_SEARCH
            )
            popularity = evaluate_baseline(
                Baseline.POPULARITY, dataset, split="test", ks=DEFAULT_KS, progress=self.progress
            )
        self.figures["metrics"] = {
            "users": model.users,
            "model": model.means,
            "exact": exact.means,
            "popularity": popularity.means,
            "ceilings": None,
            "nprobe": DEEP_SEARCH.nprobe,
            **TARGETS,
        }
        at = "recall@100"
        self.progress.note(
            f"{at} over HTTP {model.means[at]:.3f}, exactly {exact.means[at]:.3f}, "
            f"popularity {popularity.means[at]:.3f}"
        )
        with self._stage("latency"):
            rows = np.arange(min(self.load_requests, dataset.rows["users"]))
            requests = [
                search_request(
                    {"features": [features], "k": TOP_K, "min_coverage": 1.0},
                    endpoint.address.headers,
                )
                for features in query_features(dataset, kinds, rows, ("train", "val"))
            ]
            self.figures["http_ms"] = {
                "empty_request": self._load(endpoint, "empty requests", [EMPTY]),
                "search_by_features": self._load(endpoint, "searches", requests),
                "rate": LOAD_RATE,
                "k": TOP_K,
            }

    def ceilings(self, dataset: Dataset, users: int) -> None:
        """What the data allow; ``users`` 0 leaves them out."""
        with self._stage("ceilings"):
            if users:
                dataset = add_ceilings(dataset, users, progress=self.progress)
            self.figures["metrics"]["ceilings"] = dataset.ceilings

    def finish(self, report: Path) -> None:
        """Prints the tables and writes the report."""
        self.figures["seconds"]["all"] = round(time.perf_counter() - self.started, 1)
        files.write_json(report.resolve(), self.figures)
        print_report(self.figures)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.progress.note(stage_line(name, quick=self.quick))
        started = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - started, 1)
        self.figures["seconds"][name] = seconds
        self.progress.note(f"{name}: done in {seconds:g} s")

    def _load(self, endpoint: Endpoint, what: str, requests: list[Request]) -> dict[str, Any]:
        """Open loop; the requests start over when all were sent."""
        total = self.load_warm_up + self.load_requests
        self.progress.note(
            f"{total} {what} at {LOAD_RATE:g}/s, {total / LOAD_RATE:.0f} s; "
            f"the first {self.load_warm_up} do not count"
        )
        found, _ = ask(
            endpoint.url,
            requests,
            rate=LOAD_RATE,
            seconds=self.load_requests / LOAD_RATE,
            warm_up_s=self.load_warm_up / LOAD_RATE,
        )
        return asdict(found)


def _user_vectors(embeddings: EmbeddingSet, dataset: Dataset, count: int) -> Any:
    """(count, dim) query vectors of the first users, by the exported query encoder."""
    from shardline.router.encoder.query_encoder import QueryEncoder

    assert embeddings.encoder_folder is not None
    encoder = QueryEncoder.load(embeddings.encoder_folder)
    kinds = {feature["name"]: feature["kind"] for feature in encoder.features}
    rows = np.arange(min(count, dataset.rows["users"]))
    return encoder.encode(query_features(dataset, kinds, rows, ("train", "val")))
