"""``train``, ``export``: the model's part of the main job."""

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.train_tune import (
    DEFAULT_MINUTES,
    refuse_others,
    say_how_a_search_goes_on,
    tune_with_progress,
)
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.console import StageProgress, print_warnings
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.folders import check_writable, look_at
from shardline.cluster.preflight.machine import before_ray, check_store
from shardline.cluster.serving.ray_session import cores, ray_for
from shardline.shards.core.errors import ConfigError
from shardline.shards.core.files import MANIFEST_NAME
from shardline.training.data.tables import open_dataset
from shardline.training.export import export as export_embeddings
from shardline.training.loop.batches import FITTING_STEPS, fitting_batch
from shardline.training.loop.launch import TrainResult, check_folders
from shardline.training.loop.launch import train as train_model
from shardline.training.loop.run_plot import plot_run
from shardline.training.model.checkpoint import GO_ON, latest_state, open_run
from shardline.training.model.warm_start import describe_origin
from shardline.training.search.search_run import check_base
from shardline.training.search.search_state import state_path
from shardline.training.search.shape_defaults import shape_of, with_default, with_settings_of

data_option = click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder of the data set."
)
run_option = click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Folder of the run.  [default: <store>/runs/<name of the data set's folder>]",
)


unfinished_option = click.option(
    "--unfinished",
    is_flag=True,
    help="Take the best checkpoint so far of a training that has not ended.",
)


@click.command()
@data_option
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Folder to write.  [default: <store>/runs/<name of the data set's folder>]",
)
@click.option("--workers", type=int, help="Short for --set training.num_workers=N.")
@click.option("--epochs", type=int, help="Short for --set training.epochs=N.")
@click.option(
    "--mine-every", type=int, help="Short for --set training.mining.every_epochs=N; 0 for never."
)
@click.option(
    "--hard",
    type=click.Path(path_type=Path),
    help="Table of `mine` to start with, for training.loss.hard_negatives.",
)
@click.option(
    "--from",
    "warm",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Folder of an ended run whose best weights to start from: the same towers, new data or "
    "a new schedule. New ids get fresh vectors, lost ones are dropped; the optimiser starts anew.",
)
@click.option(
    "--all", "fit_all", is_flag=True, help="Short for --set training.fit_splits=train+val."
)
@click.option("--plot", is_flag=True, help="Draw the run's log into its training.png.")
@click.option("--resume", is_flag=True, help="Go on from the run's newest checkpoint.")
@click.option(
    "--tune",
    is_flag=True,
    help="Choose the settings on the validation split, then fit them on train and validation; "
    "repeated, it goes on.",
)
@click.option(
    "--minutes",
    type=float,
    help=f"Time for --tune, the last fit included.  [default: {DEFAULT_MINUTES:g}]",
)
@click.option("--tune-size", is_flag=True, help="Let --tune choose the dimension and layers too.")
@click.option(
    "--trials-at-once",
    type=click.IntRange(min=1),
    help="Trials that --tune trains at the same time: above 1 under Ray Tune, on this host or on "
    "the cluster of cluster.address, whose hosts share the run's folder.  [default: 1]",
)
@click.pass_obj
def train(
    settings: Settings,
    data: Path,
    run: Path | None,
    workers: int | None,
    epochs: int | None,
    mine_every: int | None,
    hard: Path | None,
    warm: Path | None,
    fit_all: bool,
    plot: bool,
    resume: bool,
    tune: bool,
    minutes: float | None,
    tune_size: bool,
    trials_at_once: int | None,
) -> None:
    """Train the two towers, data-parallel, with negatives gathered from every rank.

    Where the configuration says nothing of the model, its settings are chosen by the shape of the
    data (docs/TRAINING.md).
    """
    if tune:
        refuse_others(resume=resume, hard=hard, warm=warm, plot=plot)
    elif minutes is not None or tune_size or trials_at_once is not None:
        raise click.UsageError("--minutes, --tune-size, --trials-at-once are options of --tune")
    shorts = {
        "num_workers": workers,
        "epochs": epochs,
        "mining.every_epochs": mine_every,
        "fit_splits": "train+val" if fit_all else None,
    }
    for key, value in shorts.items():
        if value is not None:
            settings.extra_overrides.append(f"training.{key}={value}")
    run = run or default_run(settings, data)
    config = settings.config
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if tune:
        check_base(config.training, minutes)
    if not (tune and state_path(run).exists()):  # before Ray, which takes seconds to start
        check_folders(data, run, resume=resume, warm=warm)
    if not tune and not resume and state_path(run).exists():
        raise ConfigError(
            f"{run}: holds a search that has not ended",
            hint="train --tune goes on with it, --run names another folder, also to what follows",
        )
    checks = [check_writable("run", look_at(run))]
    at_once = trials_at_once or 1
    processes = max(config.training.num_workers, at_once)  # of training, under Ray if several
    if processes > 1 and config.cluster.address == "local":
        checks += before_ray(None)
    print_warnings(enforce(checks))
    config = with_left_out(config, data, run if resume else warm, is_same=resume)
    try:
        if tune:
            ray_ready = ray_for_training(config, processes, verbose=settings.verbose)
            with StageProgress() as progress, ray_ready:
                result = tune_with_progress(
                    config.training,
                    data,
                    run,
                    progress,
                    minutes=minutes,
                    sizes=tune_size,
                    at_once=at_once,
                )
            click.echo(describe_run(result))
            return
        ray_ready = ray_for_training(config, processes, verbose=settings.verbose)
        with StageProgress() as progress, ray_ready:
            result = train_with_progress(
                config, data, run, progress, resume=resume, hard=hard, warm=warm
            )
    except KeyboardInterrupt:
        if not (tune and say_how_a_search_goes_on(run)) and (run / MANIFEST_NAME).exists():
            say_how_to_go_on(run)
        raise
    click.echo(describe_run(result))
    if plot:
        click.echo(plot_run(result.run_folder))


@click.command()
@data_option
@run_option
@unfinished_option
@click.pass_obj
def export(settings: Settings, data: Path, run: Path | None, unfinished: bool) -> None:
    """Write the embeddings of all items, and the encoders, as an embedding set.

    With --unfinished the model's version ends in "-unfinished": in the embedding set, in what is
    built from it, and in every answer.
    """
    enforce([check_store(settings.store)])
    with StageProgress() as progress:
        embeddings = export_embeddings(
            run or default_run(settings, data),
            data,
            settings.store.root,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            unfinished=unfinished,
            progress=progress,
        )
    click.echo(
        f"{embeddings.folder}: {embeddings.rows:,} items x {embeddings.dim}, "
        f"model {embeddings.model_version}"
    )


def default_run(settings: Settings, data: Path) -> Path:
    """The run folder of a data set when no --run is given."""
    return settings.store.runs / data.resolve().name


def with_left_out(
    config: ShardlineConfig, data: Path, older: Path | None, *, is_same: bool
) -> ShardlineConfig:
    """The configuration with what its training section leaves out: of the run ``older``, all of it
    if it is the same run, or what the model is; without one chosen by the data's shape.

    Raises:
        NotFound, CorruptFile, NewerFormat: of that run.
    """
    if older is None:
        chosen = with_default(config.training, shape_of(open_dataset(data)))
    else:
        chosen = with_settings_of(config.training, open_run(older).config, whole=is_same)
    return config.model_copy(update={"training": chosen})


def ray_for_training(
    config: ShardlineConfig, processes: int, *, verbose: bool
) -> contextlib.AbstractContextManager[object]:
    """Starts Ray for several processes that train; does nothing for one, which is this one."""
    if processes == 1:
        return contextlib.nullcontext()
    num_cpus = max(cores(), processes + 1)
    return ray_for(config.cluster.address, num_cpus=num_cpus, verbose=verbose, in_flight=None)


def train_with_progress(
    config: ShardlineConfig,
    data: Path,
    run: Path,
    progress: StageProgress,
    *,
    resume: bool,
    hard: Path | None = None,
    warm: Path | None = None,
) -> TrainResult:
    """Trains a run, showing its log as a progress bar and a line per validation."""

    start: dict[str, float] = {}  # recall of the weights that a warm run begins with

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            progress("train", event["step"], event["total_steps"])
            progress.detail(
                f"epoch {event['epoch']}  loss {event['loss']:.3f}  "
                f"in-batch accuracy {event['in_batch_accuracy']:.3f}  "
                f"{event['examples_per_s']:,.0f} examples/s"
            )
        elif event["event"] == "validation":
            recall = next(name for name in event if name.startswith("recall@"))
            if event["epoch"] == 0:
                start[recall] = event[recall]
            progress.note(f"epoch {event['epoch']}: validation {recall} {event[recall]:.4f}")
        elif event["event"] == "mining":
            progress.note(
                f"epoch {event['epoch']}: mined in {event['seconds']:.1f} s, "
                f"{event['starved_share']:.1%} of users starved"
            )
        elif event["event"] == "warm_start":
            for line in describe_origin(event["origin"]):
                progress.note(line)
        elif event["event"] == "end":
            if event["early"]:
                progress.note(describe_early_stop(event))
        else:
            if event["world"] != event["world_before"]:
                progress.note(f"resumed with {event['world']} ranks, was {event['world_before']}")
            warn_of_few_steps(event, config.training.batch_size, progress)

    result = train_model(
        config.training, data, run, on_event=on_event, resume=resume, hard=hard, warm=warm
    )
    for recall, before in start.items():
        if result.best_value is not None and result.best_value < before:
            progress.note(
                f"warning: validation {recall} is {result.best_value:.4f}, and was {before:.4f} "
                "with the weights it started from: try a lower training.optimiser.learning_rate, "
                "or more epochs"
            )
    return result


def warn_of_few_steps(event: dict[str, Any], batch_size: int, progress: StageProgress) -> None:
    """Where the batch is so large for the data that the model learns little from them."""
    steps, examples = event["steps_per_epoch"], event["examples"]
    if steps < FITTING_STEPS:
        fitting = fitting_batch(examples, event["world"])
        progress.note(
            f"warning: an epoch has {steps} steps of {batch_size:,} and leaves "
            f"{examples - steps * batch_size:,} of {examples:,} interactions out; "
            f"try --set training.batch_size={fitting}"
        )


def say_how_to_go_on(run: Path) -> None:
    """Prints how to resume a run; nothing if Ctrl-C came after its training had ended."""
    state = latest_state(run)
    if state is None:
        click.echo(f"{run}: no checkpoint yet; {GO_ON}, from its first step", err=True)
    elif not state.has_ended(open_run(run).config):
        click.echo(f"{run}: not finished; {GO_ON} from its newest checkpoint", err=True)


def describe_run(result: TrainResult) -> str:
    """The run's folder and which epoch was kept, in one line."""
    kept = (
        f"epoch {result.best_epoch} is kept (best validation recall {result.best_value:.4f})"
        if result.best_value is not None
        else "nothing was validated, the last epoch is kept"
    )
    epochs = f"{result.epochs} of {result.max_epochs} epochs, {result.steps} steps"
    return f"{result.run_folder}: {epochs}; {kept}"


def describe_early_stop(event: dict[str, Any]) -> str:
    """Why a run has stopped before its last epoch, by the last line of its log."""
    return (
        f"stopped early after epoch {event['epoch']} of {event['epochs']}: {event['metric']} has "
        f"not risen in {event['validations_since_best']} validations since epoch "
        f"{event['kept_epoch']} ({event['best']:.4f}); training.validation.patience says when"
    )
