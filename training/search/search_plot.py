"""A search as a picture: recall of every trial by epochs, and what each choice was worth."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardline.shards.core.files import atomic_path
from shardline.training.search.choices import describe
from shardline.training.search.findings import effects
from shardline.training.search.search_state import SEARCH, SearchState

PLOT = "search.png"  # inside <run>/search
MOST_BARS = 30


def plot_search(run_folder: Path, state: SearchState) -> Path:
    """Writes search.png; returns its path."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    trials, worth = figure.subplots(1, 2)
    _draw_trials(trials, state)
    _draw_worth(worth, state)
    figure.suptitle(f"{state.dataset['name']}: {len(state.trials)} trials")
    path = run_folder / SEARCH / PLOT
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _draw_trials(axis: Axes, state: SearchState) -> None:
    named = {0: "black", state.best().number: "tab:red"}
    for trial in state.trials:
        points = sorted(trial.values.items())
        colour = named.get(trial.number)
        axis.plot(
            [epochs for epochs, _ in points],
            [recall for _, recall in points],
            marker="o",
            color=colour or "0.75",
            zorder=3 if colour else 2,
            label=describe(trial.changes) if colour else None,
        )
    axis.set_xlabel("epochs (rungs)")
    axis.set_title(f"best validation recall@{state.base_config.validation.k} so far")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_worth(axis: Axes, state: SearchState) -> None:
    found = effects(state)[:MOST_BARS]
    names = [f"{worth.setting} {worth.label}" for worth in found]
    axis.barh(names, [worth.effect for worth in found])
    axis.invert_yaxis()  # the highest on top
    axis.set_title("worth at the first rung, against the default")
    axis.grid(alpha=0.3, axis="x")
