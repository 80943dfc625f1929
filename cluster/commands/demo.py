"""``demo``: the whole main job on synthetic data, nothing simulated, figures at the end."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.bench_options import AT_LEAST_ONE, in_a_folder
from shardline.cluster.commands.demo_text import closing, ended, opening
from shardline.cluster.console import StageProgress

REPORT_NAME = "demo-report.json"
PRESET_NAMES = ("seed", "sharp")  # of training.synthetic.generator, which takes seconds to import


@click.command()
@click.option("--preset", type=click.Choice(PRESET_NAMES), default="sharp", show_default=True)
@click.option("--users", type=AT_LEAST_ONE, help="Users to make, instead of the preset's.")
@click.option("--items", type=AT_LEAST_ONE, help="Items to make, instead of the preset's.")
@click.option(
    "--quick",
    is_flag=True,
    help="In about a minute: 2,000 users, 10,000 items, no ceilings, no index kinds.",
)
@click.option("--stay", is_flag=True, help="Keep serving until Ctrl-C.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=in_a_folder,
    default=Path(REPORT_NAME),
    show_default=True,
    help="Where the figures go as JSON.",
)
@click.pass_obj
def demo(
    settings: Settings,
    preset: str,
    users: int | None,
    items: int | None,
    quick: bool,
    stay: bool,
    report: Path,
) -> None:
    """The whole main job: data, training, shards, HTTP queries; prints tables, then stops.

    Works in a temporary folder and removes it, unless --store names one to keep.
    """
    sizes = {"num_users": users, "num_items": items}
    kept = settings.store_path is not None
    with StageProgress() as progress, _work_folder(settings) as folder:
        for line in opening(folder=folder, kept=kept, report=report, quick=quick):
            progress.note(line)
        from shardline.cluster.commands.demo_run import run_demo

        figures = run_demo(
            settings,
            preset=preset,
            sizes={name: size for name, size in sizes.items() if size is not None},
            report=report,
            folder=folder,
            quick=quick,
            stay=stay,
            progress=progress,
        )
    for line in closing(figures, folder=folder, kept=kept, report=report):
        progress.note(line)
    progress.note(ended(folder, kept=kept))


@contextmanager
def _work_folder(settings: Settings) -> Iterator[Path]:
    """The store that was asked for, or a temporary folder removed at the end."""
    if settings.store_path is not None:
        settings.store_path.mkdir(parents=True, exist_ok=True)
        yield settings.store_path.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="shardline-demo."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
