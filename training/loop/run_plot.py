"""A run's log as a picture: loss, accuracy and recall, logits, optimiser, speed."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardline.shards.core.files import atomic_path
from shardline.training.loop.runlog import LOG, Event, read_log

PLOT = "training.png"  # inside the run folder
# panel title -> fields of step lines drawn in it
PANELS = (
    ("loss", ("loss",)),
    ("in-batch accuracy", ("in_batch_accuracy",)),
    ("mean logits", ("positive_logit", "negative_logit")),
    ("temperature", ("temperature",)),
    ("gradient norm", ("gradient_norm",)),
    ("learning rate", ("learning_rate",)),
    ("masked share", ("masked_share",)),
    ("examples/s", ("examples_per_s",)),
)
COLUMNS = 3


def plot_run(run_folder: Path) -> Path:
    """Writes training.png into the run folder, from its log; returns its path.

    Raises:
        NotFound, CorruptFile: as ``read_log``.
    """
    events = read_log(run_folder / LOG)
    rows = -(-(len(PANELS) + 1) // COLUMNS)
    figure = Figure(figsize=(4.5 * COLUMNS, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS).ravel()
    steps = [event for event in events if event["event"] == "step"]
    for axis, (title, fields) in zip(axes, PANELS, strict=False):
        _draw(axis, title, fields, steps)
    _draw_recall(axes[len(PANELS)], [e for e in events if e["event"] == "validation"])
    figure.suptitle(f"{run_folder.name}: {steps[-1]['step'] if steps else 0} steps")
    path = run_folder / PLOT
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _draw(axis: Axes, title: str, fields: tuple[str, ...], steps: list[Event]) -> None:
    for field in fields:
        points = [(event["step"], event[field]) for event in steps if field in event]
        axis.plot([x for x, _ in points], [y for _, y in points], linewidth=1, label=field)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    if len(fields) > 1:
        axis.legend()


def _draw_recall(axis: Axes, validations: list[Event]) -> None:
    names = sorted({name for event in validations for name in event if name.startswith("recall@")})
    for name in names:
        points = [(event["step"], event[name]) for event in validations if name in event]
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axis.set_title(f"validation {', '.join(names)}" if names else "no validation")
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
