"""Two ranks under Ray Train, on a host of the rig: the gradients that each got, and where it ran.

    python -m tests.hosts.gradient_ranks FOLDER     FOLDER holds the runs of tests.gradients

Rank N writes rank-N.safetensors into every run's folder, and the name of its host into host-N.
"""

import socket
import sys
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from shardline.training import gather
from shardline.training.loop.ray_ranks import build_ranks
from tests.gradients import SETTINGS, losses_and_gradients
from tests.tiny import tiny_config

RANKS = 2


def main(folder: Path) -> None:
    ray.init(address="auto", log_to_driver=False)
    build_ranks(rank_entry, tiny_config(num_workers=RANKS), False, folder).fit()


def rank_entry(settings: dict[str, str]) -> None:
    folder = Path(settings["run_folder"])
    torch.set_num_threads(1)
    rank, world = gather.rank(), dist.get_world_size()
    (folder / f"host-{rank}").write_text(socket.gethostname())
    for name in SETTINGS:
        values = losses_and_gradients(folder / name, rank, world)
        save_file(values, folder / name / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
