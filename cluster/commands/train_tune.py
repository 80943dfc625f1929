"""``train --tune``: a search for the settings of a run, shown while it goes on."""

from pathlib import Path
from typing import Any

import click

from shardline.cluster.console import StageProgress, print_table
from shardline.shards.core.files import write_bytes
from shardline.training.config.training_config import TrainingConfig
from shardline.training.loop.launch import TrainResult
from shardline.training.search.search_loop import Together
from shardline.training.search.search_plot import plot_search
from shardline.training.search.search_report import (
    BEST,
    best_yaml,
    summary_line,
    trials_table,
    worth_table,
)
from shardline.training.search.search_run import search
from shardline.training.search.search_state import SEARCH, SearchState, state_path

DEFAULT_MINUTES = 20.0


def refuse_others(*, resume: bool, hard: Path | None, warm: Path | None, plot: bool) -> None:
    """Options that mean nothing to a search. Raises click.UsageError."""
    if resume:
        raise click.UsageError("--tune goes on by itself: leave out --resume")
    if hard is not None:
        raise click.UsageError("--tune mines by itself where that pays: leave out --hard")
    if warm is not None:
        raise click.UsageError("--tune begins with new weights: leave out --from")
    if plot:
        raise click.UsageError("--tune draws its own plot: leave out --plot")


def tune_with_progress(
    config: TrainingConfig,
    data: Path,
    run: Path,
    progress: StageProgress,
    *,
    minutes: float,
    sizes: bool,
    at_once: int = 1,
) -> TrainResult:
    """Searches, writes best.yaml and the plot, prints both tables; the last fit.

    at_once: trials that train at the same time; several need a connection to Ray.
    """

    def on_event(stage: str, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            progress(stage, event["step"], event["total_steps"])
            progress.detail(f"epoch {event['epoch']}  {event['examples_per_s']:,.0f} examples/s")

    def on_chosen(state: SearchState, chosen: TrainingConfig) -> None:
        path = run / SEARCH / BEST
        write_bytes(path, best_yaml(state, chosen).encode())
        progress.note(f"{path}; {plot_search(run, state)}")

    result = search(
        config,
        data,
        run,
        minutes=minutes,
        sizes=sizes,
        say=progress.note,
        on_event=on_event,
        on_chosen=on_chosen,
        together=_together(at_once),
    )
    for table in (trials_table(result.state), worth_table(result.state)):
        print_table(table.title, table.header, table.rows)
    click.echo(summary_line(result.state, result.config))
    return result.fitted


def _together(at_once: int) -> Together | None:
    if at_once == 1:
        return None
    # Ray Tune takes seconds to import
    from shardline.training.search.side_by_side import SideBySide

    return SideBySide(at_once=at_once)


def say_how_a_search_goes_on(run: Path) -> bool:
    """Prints how to go on with a search; whether there is one."""
    if not state_path(run).exists():
        return False
    click.echo(f"{run}: the search is not finished; repeat its command to go on", err=True)
    return True
