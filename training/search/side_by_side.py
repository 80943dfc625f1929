"""Trials of a search trained side by side under Ray Tune, on one host or on a cluster.

Ray Tune places the trials of a rung, as many at once as were asked for, and trains one that is
killed again, from its checkpoint; which trials go on is decided by ``search_loop`` alone, so that a
search is the same wherever it trains, but for its time. Expects a caller that is connected to Ray.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayTaskError

from shardline.shards.core.errors import ShardlineError, Unavailable, last_line
from shardline.training.config.training_config import TrainingConfig
from shardline.training.search.search_loop import OnTrained
from shardline.training.search.trial_training import Trained, TrialJob, train_trial

RAY_FOLDER = "ray"  # beside the trials: what Ray Tune itself writes, while a rung is trained
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's own log says more
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search, which goes on when repeated
    "RAY_AIR_NEW_OUTPUT": "0",  # the new tables are printed at any verbosity
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """at_once: trials that train at the same time; each gets its share of the CPUs, and a GPU where
    the cluster has any and the configuration does not say cpu."""

    at_once: int

    def train(self, jobs: Sequence[TrialJob], search_folder: Path, on_trained: OnTrained) -> None:
        """Trains all of them, at least one; ``on_trained`` hears of each as it ends.

        Raises:
            ShardlineError, OSError: what a trial raised of these. Unavailable: the cluster has no
                room, or a trial was killed more often than max_failures.
        """
        cpus = self._cpus_of_each()
        by_number = {job.number: job for job in jobs}

        def hear(result: dict[str, Any]) -> None:
            found = result["trained"]
            on_trained(by_number[found["number"]], Trained(**found["outcome"]))

        folder = search_folder / RAY_FOLDER
        tuner = tune.Tuner(
            tune.with_resources(_entry, {"cpu": cpus, "gpu": self._gpus_of_each(jobs[0])}),
            param_space={"job": tune.grid_search([_packed(job, cpus) for job in jobs])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=self.at_once, trial_dirname_creator=_folder_of
            ),
            run_config=tune.RunConfig(
                name=RAY_FOLDER,
                storage_path=str(search_folder.resolve()),
                failure_config=tune.FailureConfig(max_failures=jobs[0].config.max_failures),
                callbacks=[_Hear(hear)],
                verbose=0,
            ),
        )
        try:
            with _environment(QUIET), _no_log("ray.tune"):
                found = tuner.fit()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for error in found.errors:
            raise _cause(error) from error

    def _cpus_of_each(self) -> int:
        have = int(ray.cluster_resources().get("CPU", 0))
        if have < self.at_once:
            raise Unavailable(
                "the Ray cluster has no room for so many trials at once",
                field="--trials-at-once",
                expected=f"<= {have}, its CPUs",
                got=str(self.at_once),
            )
        hosts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        return max(1, min(have // self.at_once, max(hosts)))

    def _gpus_of_each(self, job: TrialJob) -> int:
        has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
        return int(has_gpus and job.config.device != "cpu")


class _Hear(tune.Callback):  # type: ignore[misc]
    """Hands on what trials report."""

    def __init__(self, hear: Callable[[dict[str, Any]], None]) -> None:
        self._hear = hear

    def on_trial_result(self, *_: object, result: dict[str, Any], **__: object) -> None:
        self._hear(result)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune writes its callbacks down to go on with them, which we do not do."""
        return {}


def _folder_of(trial: Any) -> str:
    """Of a trial, for Ray Tune: the default has all of its settings in the name."""
    return str(trial.trial_id)


def _packed(job: TrialJob, cpus: int) -> dict[str, Any]:
    """A job as Ray Tune carries it; ``_entry`` reads it."""
    return {
        "number": job.number,
        "config": job.config.model_dump(mode="json"),
        # workers have another working directory
        "data_folder": str(job.data_folder.resolve()),
        "folder": str(job.folder.resolve()),
        "until": job.until,
        "may_be_refused": job.may_be_refused,
        "threads": cpus,
    }


def _entry(settings: dict[str, Any]) -> None:
    """What a Ray worker runs."""
    packed = settings["job"]
    folder = Path(packed["folder"])
    check_shared(folder)
    torch.set_num_threads(packed["threads"])
    job = TrialJob(
        number=packed["number"],
        config=TrainingConfig.model_validate(packed["config"]),
        data_folder=Path(packed["data_folder"]),
        folder=folder,
        until=packed["until"],
        may_be_refused=packed["may_be_refused"],
    )
    outcome = asdict(train_trial(job))
    tune.report({"trained": {"number": job.number, "outcome": outcome}})


def check_shared(folder: Path) -> None:
    """Whether this host has the folder of the trials, and may write there.

    Raises:
        Unavailable: it does not; names the host.
    """
    trials = folder.parent
    if not os.access(trials, os.W_OK):
        raise Unavailable(
            f"host {ray.util.get_node_ip_address()} does not share {trials}",
            expected="the folder of the host that the search was started on, to write in",
            hint="--run names a folder that every host mounts at the same path",
        )


def _cause(error: Exception) -> Exception:
    """What a trial itself raised, out of Ray's wrapping."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    cause = getattr(cause, "_base_exc", cause)
    if isinstance(cause, ShardlineError | OSError):
        return cause
    return Unavailable(
        "a trial failed", got=last_line(cause), hint="repeat the same command to go on"
    )


@contextmanager
def _no_log(name: str) -> Iterator[None]:
    """Without a library's messages: what has failed is raised."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for the time of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
