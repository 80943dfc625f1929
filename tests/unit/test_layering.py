"""Who may import whom (docs/ARCHITECTURE.md), held as data: packages, not modules."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("cluster", "router", "shards", "training", "bench")

# folder -> what of other folders its modules may import; a package stands for all below it
ALLOWED = {
    "shards": (),
    "router": (
        *("shards.core", "shards.text", "shards.wire"),
        *("shards.process.memory", "shards.process.ray_metrics"),
    ),
    "training": ("shards.core", "shards.storage", "shards.text", "router.client"),
    "cluster": ("router", "shards", "training.config"),
    "bench": FOLDERS,
}
# the command line composes everything; it reaches for the heavy parts when a command runs
CLI = "cluster/commands/"
# package -> packages of its own folder that it may import, besides the folder's own modules
BELOW = {
    "shards/core": (),
    "shards/index": ("core",),
    "shards/storage": ("core", "index"),
    "shards/filters": ("core",),
    "shards/live": ("core", "filters", "index", "storage"),
    "shards/text": ("core",),
    "shards/wire": ("core",),
    "shards/server": ("core", "filters", "index", "live", "storage", "wire"),
    "shards/process": ("core", "filters", "index", "live", "server", "storage"),
    "router/client": (),
    "router/encoder": (),
    "router/experiments": (),
    "router/fanout": ("encoder",),
    "router/http": ("experiments", "lists", "rearrange"),
    "router/lists": (),
    "router/rearrange": ("fanout",),
    "router/serve": ("http",),
    "router/text": ("fanout",),
    "training/config": (),
    "training/data": (),
    "training/features": ("config", "data"),
    "training/model": ("config", "data", "features"),
    "training/loss": ("config", "data"),
    "training/evaluation": ("data", "features", "model"),
    "training/mining": ("config", "data", "evaluation", "features", "model"),
    "training/loop": (
        *("config", "data", "evaluation", "features"),
        *("loss", "mining", "model"),
    ),
    "training/search": ("config", "data", "features", "loop", "model"),
    "training/synthetic": ("data", "evaluation"),
    "cluster/backup": ("rollover",),
    "cluster/batch": (),
    "cluster/control": ("rollover",),
    "cluster/housekeeping": ("backup", "control", "serving"),
    "cluster/planner": ("preflight",),
    "cluster/preflight": (),
    "cluster/rollover": ("batch",),
    "cluster/serving": ("control", "preflight", "rollover"),
    "cluster/tuner": (),
}

# library -> the only places that may import it
CONFINED = {
    "faiss": ("shards/index/", "bench/"),
    "ray": (
        "cluster/",
        "router/serve/",
        "shards/process/",
        "training/loop/launch.py",
        "training/loop/process_group.py",
        "training/loop/ray_ranks.py",
        "training/search/side_by_side.py",
    ),
    "torch": ("training/", "bench/"),
    "fastapi": ("router/http/",),
    "httptools": ("router/client/",),
    "starlette": ("router/http/", "router/serve/"),
    "matplotlib": (
        *("bench/plots.py", "training/loop/run_plot.py"),
        "training/search/search_plot.py",
    ),
    "rich": ("cluster/", "bench/"),
    "click": ("cluster/cli.py", "cluster/commands/", "bench/"),
}
# names that several modules have on purpose: a command is called as the part that it runs
SHARED_NAMES = ("__init__",)


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


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


def refusal(place: str, name: str) -> str | None:
    """Why the module at ``place`` may not import ``name``; None where it may."""
    top = name.split(".")[0]
    if top in FOLDERS:
        return "by its bare name: everything of ours is imported as shardline...."
    if top in CONFINED and not place.startswith(CONFINED[top]):
        return f"{top} is confined to {', '.join(CONFINED[top])}"
    if top != "shardline" or name == "shardline":
        return None
    folder, package = place.split("/")[0], place.rpartition("/")[0]
    target, _, rest = name.removeprefix("shardline.").partition(".")
    if target != folder:
        allowed = FOLDERS if place.startswith(CLI) else ALLOWED[folder]
        inside = permitted(f"{target}.{rest}".rstrip("."), allowed)
        return None if inside else f"{folder} may import {', '.join(allowed) or 'nothing of ours'}"
    other = rest.split(".")[0]
    is_package = bool(other) and (ROOT / folder / other).is_dir()
    if is_package and package in BELOW and f"{folder}/{other}" != package:
        return None if other in BELOW[package] else f"{package} lies below {folder}/{other}"
    return None


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    refused = {name: why for name in imports_of(path) if (why := refusal(place, name))}
    assert not refused


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_import_by_the_same_names(path: Path) -> None:
    assert [name for name in imports_of(path) if name.split(".")[0] in FOLDERS] == []


def test_no_two_modules_share_a_name() -> None:
    names = Counter(
        path.stem for path in modules() if not path.relative_to(ROOT).as_posix().startswith(CLI)
    )
    twice = {name for name, count in names.items() if count > 1 and name not in SHARED_NAMES}
    assert twice == set()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("training/export.py", "shardline.router.fanout.fanout"),
        ("router/service.py", "shardline.shards.server.shard"),
        ("cluster/build.py", "shardline.training.loop.run_rank"),
        ("cluster/build.py", "shards.core.errors"),
        ("shards/core/schema.py", "shardline.shards.index.spec"),
        ("training/data/tables.py", "shardline.training.features.columns"),
        ("router/merge.py", "faiss"),
    ],
)
def test_the_rules_refuse_what_they_should(place: str, name: str) -> None:
    assert refusal(place, name) is not None


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("router/service.py", "shardline.shards.core.errors.InvalidInput"),
        ("cluster/build.py", "shardline.training.config.training_config.TrainingConfig"),
        ("cluster/commands/mine.py", "shardline.training.mining.miner"),
        ("training/loop/trainer.py", "shardline.training.gather"),
    ],
)
def test_the_rules_permit_what_they_should(place: str, name: str) -> None:
    assert refusal(place, name) is None
