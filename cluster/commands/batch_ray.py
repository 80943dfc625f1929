"""``batch`` on a Ray cluster that runs already: imported only there, because Ray takes a second."""

from shardline.cluster.batch.batch_report import BatchReport, timed_job
from shardline.cluster.batch.local_batch import BatchPlan
from shardline.cluster.batch.part_files import ClaimedFolder
from shardline.cluster.batch.ray_batch import run_on_ray
from shardline.cluster.commands.batch_progress import NotedProgress
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.serving.ray_session import ray_for


def answer_on(
    config: ShardlineConfig,
    plan: BatchPlan,
    claimed: ClaimedFolder,
    progress: NotedProgress,
    cpus: int | None,
) -> BatchReport:
    """The job on the Ray of ``cluster.address``. Raises Unavailable: none runs there."""
    with ray_for(config.cluster.address, num_cpus=0, in_flight=None):
        return answer_here(plan, claimed, progress, cpus)


def answer_here(
    plan: BatchPlan, claimed: ClaimedFolder, progress: NotedProgress, cpus: int | None
) -> BatchReport:
    """The job on the Ray that this process is connected to."""
    with timed_job(plan.job, claimed, progress, way="ray") as run:
        if run.todo:
            run_on_ray(plan, run.output, run.todo, run.parts, cpus=cpus)
            run.passes = 1
    return run.report
