"""Who may import whom (docs/ARCHITECTURE.md), held as data."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "router", "shards", "training", "bench")

# package -> modules of ours it may import besides its own
ALLOWED = {
    "shards": (),
    "router": (
        "shards.errors",
        "shards.files",
        "shards.handshake",
        "shards.local_socket",
        "shards.metrics",
        "shards.ngrams",
        "shards.ray_metrics",
        "shards.schema",
        "shards.settle",
        "shards.types",
        "shards.wire",
    ),
    "training": (
        "router.client",
        "shards.embeddings",
        "shards.errors",
        "shards.files",
        "shards.ngrams",
        "shards.schema",
    ),
    "cluster": ("router", "shards", "training.config"),
    "bench": PACKAGES,
}
# the command line composes everything; it reaches for the heavy parts when a command runs
CLI = ("cluster/commands/",)

# library -> the only places that may import it
CONFINED = {
    "faiss": ("shards/index_", "shards/main_index", "shards/gpu", "shards/actor", "bench/"),
    "ray": (
        "cluster/",
        "router/app.py",
        "shards/actor.py",
        "shards/ray_metrics.py",
        "training/launch.py",
    ),
    "torch": ("training/", "bench/"),
    "fastapi": ("router/",),
    "starlette": ("router/",),
    "matplotlib": ("bench/plots.py", "training/plot.py"),
    "rich": ("cluster/", "bench/"),
    "click": ("cluster/cli.py", "cluster/commands/", "bench/"),
}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def permitted(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether a dotted name is an allowed module, something in one, or a parent of one."""
    return any(
        name == module or name.startswith(f"{module}.") or module.startswith(f"{name}.")
        for module in allowed
    )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    package = place.split("/")[0]
    allowed = ALLOWED[package] if not place.startswith(CLI) else PACKAGES
    for name in imports_of(path):
        top = name.split(".")[0]
        if top in PACKAGES and top != package:
            assert permitted(name, allowed), f"{place} may not import {name}"
        if top in CONFINED:
            assert place.startswith(CONFINED[top]), f"{place} may not import {top}"


def test_the_rules_refuse_what_they_should() -> None:
    assert not permitted("router.fanout", ALLOWED["training"])
    assert not permitted("shards.shard", ALLOWED["router"])
    assert permitted("shards.errors.InvalidInput", ALLOWED["router"])
    assert permitted("training.config.TrainingConfig", ALLOWED["cluster"])
    assert not permitted("training.loop", ALLOWED["cluster"])
