"""Two ranks on two hosts whose names resolve to nothing: gradients of one process; a host lost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.gradients import SETTINGS, assert_same_gradients, declare_runs, losses_and_gradients
from tests.hosts.gradient_ranks import RANKS
from tests.hosts.rig import STORE, Host, Rig, environment_folders, raised
from tests.tiny import tiny_config, tiny_dataset

CHECKOUT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(CHECKOUT),
    "PATH": f"{sys.prefix}/bin:$PATH",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "01234567" * 8,
    "RAY_USAGE_STATS_ENABLED": "0",
    # a silent host is dead after 12 s, as on a launched cluster
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
START = "ray start --num-cpus=2 --object-store-memory=100000000"
HEAD = "--head --include-dashboard=false --port=6379"
SHARDLINE = "python -m shardline.cluster.cli"
STEPS = 100
GONE_WITHIN_S = 60.0  # 12 s until Ray counts the host as dead; the rest is starting and ending


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with raised(2, [*environment_folders(), CHECKOUT]) as rig:
        tiny_dataset(rig.store / "data")
        head, other = rig.hosts
        here(head, f"{one_core(0)} {START} {HEAD} --node-ip-address={head.address}")
        join(head, other)
        yield rig


def join(head: Host, other: Host) -> None:
    options = f"--address={head.address}:6379 --node-ip-address={other.address}"
    here(other, f"{one_core(1)} {START} {options}")


def one_core(number: int) -> str:
    """One core for all of a host. Its ranks share its cores evenly: of two, a rank has both alone,
    and one beside another rank; with the number of threads the order of its sums changes."""
    cores = sorted(os.sched_getaffinity(0))
    return f"taskset -c {cores[number % len(cores)]}"


def here(host: Host, command: str, *, check: bool = True) -> str:
    """What a command of the checkout prints on a host, both streams."""
    return host.run(line_of(command), timeout_s=240, check=check).stdout


def line_of(command: str) -> str:
    exports = " ".join(f'{name}="{value}"' for name, value in ENVIRONMENT.items())
    return f"export {exports} && cd {CHECKOUT} && {command} 2>&1"


def train_command(*options: str) -> str:
    """A training run of STEPS steps by two ranks, with a checkpoint every 7."""
    settings = ["cluster.address=auto"]
    settings += [f"training.{key}={json.dumps(value)}" for key, value in SETTINGS_OF_RUN.items()]
    quoted = " ".join(f"--set '{setting}'" for setting in settings)
    return f"{SHARDLINE} {quoted} train --data {STORE}/data --workers 2 {' '.join(options)}"


SETTINGS_OF_RUN = {
    **tiny_config().model_dump(mode="json", include={"dim", "batch_size", "seed", "towers"}),
    "epochs": STEPS // 10,
    "validation": {"k": 10, "every_epochs": 5, "patience": 9},
    "checkpoint_every_steps": 7,
    "log_every_steps": 1,
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    log = run / "log.jsonl"
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert time.monotonic() < deadline, f"no step {step} in {log}"
        time.sleep(0.05)


def test_two_ranks_on_two_hosts_get_the_gradients_of_one_process(rig: Rig) -> None:
    for host in rig.hosts:  # which takes 20 s to find that nobody knows
        assert host.run(f"timeout 1 getent hosts {host.name}", check=False).stdout == ""
    declare_runs(rig.store / "gradients")
    here(rig.hosts[0], f"python -m tests.hosts.gradient_ranks {STORE}/gradients")
    hosts = {(rig.store / "gradients" / f"host-{rank}").read_text() for rank in range(RANKS)}
    assert hosts == {"host1", "host2"}
    for name in SETTINGS:
        folder = rig.store / "gradients" / name
        expected = losses_and_gradients(folder, 0, 1)
        for rank in range(RANKS):
            assert_same_gradients(load_file(folder / f"rank-{rank}.safetensors"), expected)


def test_a_run_folder_that_one_host_does_not_see_is_refused_by_name(rig: Rig) -> None:
    head, other = rig.hosts
    said = here(head, train_command("--run /tmp/run"), check=False)
    assert f"error: host {other.address} does not share the run folder /tmp/run" in said
    assert "no such run there" in said


def test_more_ranks_than_cpus_are_refused_at_once(rig: Rig) -> None:
    said = here(rig.hosts[0], train_command(f"--run {STORE}/many", "--workers 6"), check=False)
    assert "error: num_workers: not enough CPUs in the Ray cluster; expected 6" in said
    assert not (rig.store / "many").exists()


@pytest.mark.timeout(600)
def test_a_lost_host_ends_the_run_and_resume_goes_on_with_those_left(rig: Rig) -> None:
    head, other = rig.hosts
    here(head, train_command(f"--run {STORE}/whole"))
    whole = weights(rig.store / "whole")

    command = head.ssh(line_of(train_command(f"--run {STORE}/lost")))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        wait_for_step(rig.store / "lost", 16)
        other.power_off()
        printed, _ = running.communicate(timeout=GONE_WITHIN_S)
    assert "error: training failed" in printed
    assert "--resume goes on" in printed
    assert running.returncode == 4

    here(head, train_command(f"--run {STORE}/lost", "--resume"))
    for name, value in weights(rig.store / "lost").items():
        assert torch.equal(value, whole[name]), name

    other.power_on()
    join(head, other)
