"""Hard-negative mining: examples/s through a running cluster, and what it changes in Recall.

Theory. Mining a user costs an embedding, a search of range_max and the known items deep, and the
choice among what was found. So beside the examples/s of exact mining in this process and through
the cluster stand the floors of the same run: the same batches with the queries embedded only, and
searched only. An example is one user mined.

The strategies are compared at equal optimiser steps from equal initial weights, seed by seed. The
lists come from the in-batch model of the first seed, whose own training is not counted as theirs.
Hard negatives alone are expected to lose (Huang et al., Embedding-based Retrieval in Facebook
Search, KDD 2020, section 6.1): a model that only sees items near the user never learns the rest.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardline.bench.training.variants import BASELINE, KS, STRATEGIES, trained, variant
from shardline.cluster.build import build_generation, run_on_ray
from shardline.cluster.commands.build import plan_of
from shardline.cluster.commands.mine import MiningReport, mine_run
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.ray_session import cores
from shardline.cluster.store import Store
from shardline.shards.core.schema import IdArray
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.evaluation.searchers import ExactSearch, Search, open_cluster
from shardline.training.export import export
from shardline.training.loop.launch import train
from shardline.training.mining.candidates import Mined, depth_of
from shardline.training.mining.hard_negatives import Origin, write_negatives
from shardline.training.mining.miner import build_miner
from shardline.training.model.checkpoint import load_best, open_data
from shardline.training.model.encoding import encode_queries

CREATED_AT = "2026-01-01T00:00:00+00:00"  # the same inputs give the same files
BENCH_STORE = "bench-mining"  # below the user's store, whose own runs stay as they are


def run(
    config: ShardlineConfig, data: Path, seeds: Sequence[int], progress: StageProgress
) -> dict[str, Any]:
    """Trains, mines, compares; Ray must be running. ``config.training`` is what all runs share."""
    store = Store(config.store.resolve() / BENCH_STORE)
    # the floor repeats the queries of mining: answers out of the router's cache are no searches
    router = config.router.model_copy(update={"cache_bytes": 0})
    config = config.model_copy(update={"store": store.root, "router": router})
    dataset = open_dataset(data)
    training = config.training
    base = store.runs / "base"
    progress.note(f"training {BASELINE}, seed {seeds[0]}")
    train(variant(training, {}, seeds[0]), data, base)
    mined, speed = _mining(config, store, dataset, base, progress)
    table = store.root / "hard-negatives"
    origin = Origin(
        model_version=speed["model_version"],
        fit_splits=training.fit_splits,
        generation=speed["generation"],
        config=training.mining,
        seed=0,
        created_at=CREATED_AT,
    )
    write_negatives(table, mined, dataset, origin)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in STRATEGIES}
    for number, (name, changes) in enumerate(STRATEGIES.items()):
        for seed in seeds:
            progress.note(f"training {name}, seed {seed}")
            folder = store.runs / f"{number}-{seed}"
            settings = variant(training, changes, seed)
            results[name].append(trained(settings, dataset, folder, table))
    return {
        "setup": {
            "dataset": dataset.name,
            "rows": dataset.rows,
            "epochs": training.epochs,
            "batch_size": training.batch_size,
            "mining": training.mining.model_dump(mode="json"),
            "shards": config.cluster.shards,
            "cores": cores(),
            "seeds": list(seeds),
        },
        "mining": speed,
        "strategies": results,
        "ceilings": dataset.ceilings,
    }


def print_report(report: dict[str, Any], out: Path | None) -> None:
    """Both tables, and the JSON after them (and in a file when asked)."""
    mining = report["mining"]
    rows = [
        (name, f"{mining[name]['examples_per_s']:,.0f}", _percent(mining[name]))
        for name in ("exact", "cluster", "embedding only", "exact search only", "cluster only")
    ]
    print_table("mining", ("", "examples/s", "starved"), rows)
    baseline = _means(report["strategies"][BASELINE])
    header = ("strategy", *baseline, "of in-batch", "seconds")
    lines = []
    for name, runs in report["strategies"].items():
        means, spread = _means(runs), _means(runs, np.std)
        cells = [f"{means[key]:.4f} ± {spread[key]:.4f}" for key in baseline]
        last = list(baseline)[-1]
        ratio = f"{means[last] / baseline[last]:.3f}"
        seconds = np.mean([each["seconds"] for each in runs])
        lines.append((name, *cells, ratio, f"{seconds:.0f}"))
    print_table(f"equal steps, {len(report['setup']['seeds'])} seeds", header, lines)
    text = json.dumps(report, indent=2)
    if out is not None:
        out.write_text(text + "\n")
    print(text)  # noqa: T201 - a benchmark ends in JSON


def _mining(
    config: ShardlineConfig, store: Store, dataset: Dataset, base: Path, progress: StageProgress
) -> tuple[Mined, dict[str, Any]]:
    """What the cluster mined, and the figures of both ways with their floors."""
    rules = config.training.mining
    embeddings = export(base, dataset.path, store.root, created_at=CREATED_AT)
    manifest = build_generation(store, embeddings.folder, plan_of(config), run_jobs=run_on_ray)
    exact, alone = mine_run(base, dataset, rules, 0, cluster=None, progress=progress)
    figures: dict[str, Any] = {"exact": _figures(alone)}
    with (
        serving(config, generation=manifest.generation, on_stage=progress.note) as endpoint,
        endpoint.address.client() as client,
    ):
        ids = dataset.item_ids
        search = open_cluster(client, ids, alone.model_version)
        mined, through = mine_run(
            base, dataset, rules, 0, cluster=endpoint.address, progress=progress
        )
        figures["cluster"] = _figures(through)
        figures |= _floors(base, rules, search)
    ours, theirs = _pairs(mined, dataset), _pairs(exact, dataset)
    figures |= {
        "model_version": through.model_version,
        "generation": through.generation,
        "index": manifest.index.factory,
        "nprobe": manifest.index.nprobe,
        "found_by_exact_too": round(float(np.isin(ours, theirs).mean()), 4),
    }
    return mined, figures


def _pairs(mined: Mined, dataset: Dataset) -> IdArray:
    """One number for each pair of a user and a negative."""
    lists = mined.lists(dataset.rows["users"])
    return lists.owners * dataset.rows["items"] + lists.items


def _floors(base: Path, rules: MiningConfig, cluster: Search) -> dict[str, dict[str, float]]:
    """examples/s of embedding alone, and of either search alone, over the blocks of mining."""
    _, model = load_best(base)
    data = open_data(base)
    miner = build_miner(model, data, rules, 0)
    blocks = miner.blocks()
    total = sum(len(users) for users in blocks)
    started = time.perf_counter()
    queries = [
        encode_queries(model, data.users.take(users), data.train.take(users), data.items)
        for users in blocks
    ]
    floors = {"embedding only": {"examples_per_s": total / (time.perf_counter() - started)}}
    depths = [depth_of(rules, miner.known.take(users)) for users in blocks]
    for name, search in (
        ("exact search only", ExactSearch(miner.item_vectors)),
        ("cluster only", cluster),
    ):
        started = time.perf_counter()
        # one request at a time: how much several in flight gain shows beside it
        for block, depth in zip(queries, depths, strict=True):
            search(block, depth)
        floors[name] = {"examples_per_s": total / (time.perf_counter() - started)}
    return floors


def _figures(report: MiningReport) -> dict[str, float]:
    return {
        "examples_per_s": report.examples_per_s,
        "starved_share": report.starved_share,
        "examples": report.examples,
        "negatives": report.negatives,
    }


def _means(runs: list[dict[str, Any]], reduce: Any = np.mean) -> dict[str, float]:
    return {f"recall@{k}": float(reduce([each[f"recall@{k}"] for each in runs])) for k in KS}


def _percent(figures: dict[str, float]) -> str:
    return f"{figures['starved_share']:.1%}" if "starved_share" in figures else ""
