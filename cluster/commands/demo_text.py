"""The texts that ``demo`` prints. Imports nothing heavy, because it is imported at start-up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# name -> what it does; the order of the steps
STAGES = {
    "data": "users with hidden interests, items with attributes, interactions",
    "train": "two towers, data-parallel on Ray Train, whose processes take a while to start",
    "export": "every item through the item tower, and the query encoder",
    "build": "the served generation: one template, one index per shard",
    "serve": "shards and router as Ray actors, HTTP in front",
    "evaluate exactly": "every test user against every item, without an index",
    "evaluate over HTTP": "the same users by their features, through the shards; popularity beside",
    "latency": "empty requests, then single searches, at a fixed rate",
    "index kinds": "every kind of index over those vectors, compared",
    "ceilings": "what no model can beat on these data, because their hidden interests are known",
}
LEFT_OUT = ("index kinds", "ceilings")  # of a quick demo
USUAL_MINUTES = 5  # 4.7 measured on two cores, with the sizes of a preset


def opening(*, folder: Path, kept: bool, report: Path, quick: bool = False) -> list[str]:
    """What the demo will do, about how long it takes, and where files go."""
    stages = stages_of(quick=quick)
    size = (
        "2,000 users and 10,000 items take about a minute"
        if quick
        else "The usual 10,000 users and 100,000 items take about "
        f"{USUAL_MINUTES} minutes (--quick: one)"
    )
    fate = "kept" if kept else "removed at the end; --store FOLDER names one to keep"
    return [
        f"The whole main job on synthetic data, in {len(stages)} steps: {', '.join(stages)}.",
        f"{size} on two cores. Ctrl-C ends it at any time and cleans up.",
        f"Work folder: {folder} ({fate}). Figures: {report}.",
    ]


def stages_of(*, quick: bool) -> list[str]:
    """The names of the steps, in order."""
    return [name for name in STAGES if not (quick and name in LEFT_OUT)]


def stage_line(name: str, *, quick: bool = False) -> str:
    """The heading of a step: which it is, and what it does."""
    stages = stages_of(quick=quick)
    return f"[{stages.index(name) + 1}/{len(stages)}] {name}: {STAGES[name]}"


def stay_lines(url: str, key_file: str | None) -> list[str]:
    """Where the cluster answers, and a query to try."""
    key = "" if key_file is None else f" --key-file {key_file}"
    return [
        f"serving at {url} until Ctrl-C",
        f"try: shardline query --url {url}{key} --item 17",
    ]


def closing(figures: Mapping[str, Any], *, folder: Path, kept: bool, report: Path) -> list[str]:
    """What the demo showed, and what to try next."""
    metrics, http = figures["metrics"], figures["http_ms"]["search_by_features"]
    shown = f"Shown: over HTTP the model finds {metrics['model']['recall@100']:.1%}"
    ceiling = (metrics["ceilings"] or {}).get("best_estimate")
    best = f" ({ceiling['means']['recall@100']:.1%} is possible)" if ceiling else ""
    quick = "" if "index_kinds" in figures else "--quick "
    again = (
        [
            f"  shardline --store {folder / 'store'} serve    and, in another terminal:",
            f"  shardline --store {folder / 'store'} query --user 17 --data {folder / 'data'}",
        ]
        if kept
        else [
            f"  shardline demo {quick}--stay      the same, and serves until Ctrl-C",
            f"  shardline --store FOLDER demo {quick}      the same, and keeps what it makes",
        ]
    )
    return [
        f"{shown} of the held-out items among a hundred{best}; a search takes "
        f"{http['p50_ms']:.1f} ms at p50 over {figures['generation']['shards']} shards.",
        f"Figures: {report}, in {figures['seconds']['all'] / 60:.1f} minutes.",
        "Next:",
        *again,
        "  docs/QUICKSTART.md                each step as a command; docs/DATA.md: your own data",
    ]


def ended(folder: Path, *, kept: bool) -> str:
    """The last line, once everything has stopped."""
    if kept:
        left = f"{folder} is kept"
    elif folder.exists():
        left = f"{folder} could not be removed whole"
    else:
        left = f"{folder} is removed"
    return f"Router, shards and Ray have stopped, nothing was left running; {left}."
