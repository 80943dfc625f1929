"""Asks the hosts of a launcher file over ssh what they have, before `ray up`.

The options of ssh are those that Ray's launcher uses, so that what is reached here is reached
there: no known-hosts file, no password.
"""

import json
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardline.cluster.preflight import launch_probe
from shardline.cluster.preflight.launch_file import LaunchFile
from shardline.shards.core.errors import last_line

SSH_PORT = 22
CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 60.0
AT_ONCE = 16
SSH_FAILED = 255
NOT_FOUND = 127
LINE = 200  # characters of what a host has printed


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAnswer:
    """A host's answer (``launch_probe.answer_to``), and when it was asked and answered by our
    clock, in seconds since 1970. is_writer: it wrote the file that others look for."""

    address: str
    content: dict[str, Any]
    asked_s: float
    answered_s: float
    is_writer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NoAnswer:
    """step: "ssh" or "python3"."""

    address: str
    step: str
    reason: str


def ask_hosts_by_ssh(
    launch: LaunchFile, *, store: Path, probe: str, ports: Mapping[str, Sequence[tuple[str, int]]]
) -> list[ProbeAnswer | NoAnswer]:
    """One answer per host, in the order of the file. ports: that each host is to listen on.

    The first host that can writes the file ``probe`` into the store, the others look for it. Hosts
    that do not answer cost the time of one, however many they are.
    """

    def ask(address: str, *, writes: bool) -> ProbeAnswer | NoAnswer:
        question = {
            "store": str(store),
            "probe": probe,
            "writes": writes,
            "removes": False,
            "ports": ports[address],
            "reach": [[other, SSH_PORT] for other in launch.hosts if other != address],
        }
        return ask_by_ssh(launch, address, question)

    removal = {"store": str(store), "probe": probe, "writes": False, "removes": True}
    answers: dict[str, ProbeAnswer | NoAnswer] = {}
    writer: str | None = None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # first whether they answer at all, together: one by one each silent host costs its time-out
        found = pool.map(lambda address: ask_by_ssh(launch, address, removal), launch.hosts)
        for address, answer in zip(launch.hosts, found, strict=True):
            if isinstance(answer, NoAnswer):
                answers[address] = answer
        left = deque(address for address in launch.hosts if address not in answers)
        try:
            while left:
                address = left.popleft()
                answers[address] = answer = ask(address, writes=True)
                if isinstance(answer, ProbeAnswer) and answer.content["store"]["exists"]:
                    writer = address
                    if answer.content["store"]["errno"] is None:
                        break
            found = pool.map(lambda address: ask(address, writes=False), left)
            answers.update(zip(left, found, strict=True))
        finally:
            if writer is not None:
                ask_by_ssh(launch, writer, removal)
    return [answers[address] for address in launch.hosts]


def ask_by_ssh(
    launch: LaunchFile, address: str, question: dict[str, Any]
) -> ProbeAnswer | NoAnswer:
    """Sends the program and the question; what came back."""
    program = Path(launch_probe.__file__).read_text(encoding="utf-8")
    text = f"{program}\nmain({json.dumps(question)!r})\n"
    asked_s = time.time()
    try:
        done = subprocess.run(
            ssh_command(launch, address),
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return NoAnswer(address=address, step="ssh", reason="there is no `ssh` on this machine")
    except subprocess.TimeoutExpired:
        reason = f"nothing within {ANSWER_TIMEOUT_S:.0f} s"
        return NoAnswer(address=address, step="ssh", reason=reason)
    answered_s = time.time()
    if done.returncode == SSH_FAILED:
        return NoAnswer(address=address, step="ssh", reason=last_line(OSError(done.stderr)))
    try:
        content = json.loads(done.stdout.splitlines()[-1])
        if not isinstance(content, dict):
            raise TypeError
    except (ValueError, IndexError, TypeError):
        said = last_line(OSError(done.stderr or done.stdout))[:LINE]
        reason = "not installed" if done.returncode == NOT_FOUND else said
        return NoAnswer(address=address, step="python3", reason=reason)
    return ProbeAnswer(
        address=address,
        content=content,
        asked_s=asked_s,
        answered_s=answered_s,
        is_writer=bool(question["writes"]),
    )


def ssh_command(launch: LaunchFile, address: str) -> list[str]:
    """The command line that runs Python there, with the program on its standard input."""
    key = () if launch.key is None else ("-i", str(launch.key))
    return [
        "ssh",
        "-T",
        *("-o", "BatchMode=yes"),
        *("-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}"),
        *("-o", "StrictHostKeyChecking=no"),
        *("-o", "UserKnownHostsFile=/dev/null"),
        *("-o", "LogLevel=ERROR"),
        *("-o", "IdentitiesOnly=yes"),
        *key,
        f"{launch.user}@{address}",
        "python3 -",
    ]
