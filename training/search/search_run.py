"""Begins a search, or goes on with the one that a run folder holds.

What it refuses is refused before anything is trained or written. The search itself is
``training.search.search_loop``.
"""

import time
from collections.abc import Callable
from pathlib import Path

from shardline.shards.core.errors import ConfigError, DataError
from shardline.shards.core.files import MANIFEST_NAME
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.csr import Csr
from shardline.training.data.tables import Dataset, open_dataset
from shardline.training.features.infer import infer_config
from shardline.training.search.search_loop import (
    OnStageEvent,
    Say,
    SearchLoop,
    SearchResult,
    Together,
)
from shardline.training.search.search_state import (
    SEARCH,
    SearchState,
    check_same_search,
    load_state,
    state_path,
)


def search(
    config: TrainingConfig,
    data_folder: Path,
    run_folder: Path,
    *,
    minutes: float,
    sizes: bool = False,
    say: Say = lambda line: None,
    on_event: OnStageEvent | None = None,
    on_chosen: Callable[[SearchState, TrainingConfig], None] = lambda state, config: None,
    clock: Callable[[], float] = time.monotonic,
    together: Together | None = None,
) -> SearchResult:
    """Finds settings within ``minutes``, the last fit included; the run folder gets that fit.

    config: the base, which is the first trial. Goes on with a search that the folder holds.
    on_event: what trains now in this process, and a line of its log. on_chosen: called before the
    last fit, with its configuration. together: trains several trials at once; the last fit is
    alone. Nothing is begun that would not end in time, by the time of earlier epochs; the first
    epoch is trained in any case, and the last fit is never shortened.

    Raises:
        ConfigError: the base cannot be searched, or is not that of the folder's search; the search
            has ended. DataError: no validation split, or another dataset. As ``train``: of the
            base, whereas another candidate that cannot be trained is only out.
    """
    check_base(config, minutes)
    dataset = open_dataset(data_folder, keep=True)
    val = check_val(dataset)
    base = infer_config(config, dataset)
    # every rung must have been validated
    every = base.validation.model_copy(update={"every_epochs": 1})
    base = base.model_copy(update={"validation": every})
    if state_path(run_folder).exists():
        state = load_state(run_folder)
        check_same_search(run_folder, state, base, dataset.identity, sizes)
        if state.stage == "search" and (run_folder / MANIFEST_NAME).exists():
            raise ConfigError(
                f"{run_folder}: another run was trained there, before the search had ended",
                hint="move that run away, or search anew with another --run",
            )
        if state.stage == "done":
            raise ConfigError(
                f"{run_folder / SEARCH}: the search has ended",
                hint="--run names another folder for another search",
            )
        say(f"goes on with the search of {len(state.trials)} trials, {state.spent_s:.0f} s so far")
        state.minutes = minutes
    elif (run_folder / MANIFEST_NAME).exists():
        raise ConfigError(
            f"{run_folder}: holds a run already",
            hint="--run names another folder, also to what follows",
        )
    else:
        state = SearchState(
            base=base.model_dump(mode="json"),
            dataset=dataset.identity,
            sizes=sizes,
            minutes=minutes,
            val_users=min(base.validation.max_users, int((val.lengths > 0).sum())),
            epochs=base.epochs,
            least_rung=least_rung(base, len(dataset.positives("train").items)),
        )
    val_share = len(val.items) / len(dataset.positives("train").items)
    num_items = dataset.rows["items"]
    del dataset  # its tables are not needed while trials train
    run = SearchLoop(
        state=state,
        data_folder=data_folder,
        run_folder=run_folder,
        num_items=num_items,
        refit_factor=1 + val_share,
        say=say,
        on_event=on_event,
        clock=clock,
        together=together,
    )
    return run.to_the_end(on_chosen)


def check_base(config: TrainingConfig, minutes: float) -> None:
    """What a search refuses before it reads any data. Raises ConfigError."""
    if not minutes > 0:
        raise ConfigError("out of range", field="--minutes", expected="> 0", got=f"{minutes:g}")
    for field, value in (
        ("mining.start_epoch", config.mining.start_epoch - 1),
        ("loss.memory_size", config.loss.memory_size),
    ):
        if value:
            raise ConfigError(
                "trials have other epochs and batches than it is meant for",
                field=f"training.{field}",
                expected="left out",
                hint="search without it, then train -c best.yaml with it",
            )
    if config.num_workers > 1:
        raise ConfigError(
            "trials train in one process",
            field="num_workers",
            expected="1",
            got=str(config.num_workers),
            hint="search with one worker, then train -c best.yaml with several",
        )
    if "val" in config.fitted_splits:
        raise ConfigError(
            "trials are judged on the validation split",
            field="fit_splits",
            expected="train",
            got=config.fit_splits,
            hint="leave out --all: the last fit is of train and validation anyway",
        )


def least_rung(config: TrainingConfig, examples: int) -> int:
    """Epochs until the warm-up is over twice: before, trials differ by how fast they start."""
    steps = max(1, examples // config.batch_size)
    return max(1, -(-2 * config.optimiser.warmup_steps // steps))


def check_val(dataset: Dataset) -> Csr:
    """The validation items of every user; DataError where there is nothing to judge trials by."""
    val = dataset.positives("val")
    if not len(val.items):
        raise DataError(
            f"{dataset.path}: nothing to judge trials by",
            field="split",
            expected="rows of val",
            got="none",
            hint="import the data with --val-users and --val-per-user",
        )
    return val
