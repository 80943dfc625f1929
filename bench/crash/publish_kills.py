"""Kills during a publish or a rollback, while items are written: nothing acknowledged is lost.

    python -m shardline.bench.crash.publish_kills [--kills 12] [--seed S] [--rows 20000]

A cluster as in service serves one of two generations of the same items, cut into other shards. A
writer upserts and deletes items of its own all along. Each round changes to the other generation,
by ``publish`` or ``rollback``, and kills (SIGKILL) the controller, the mirror, or a shard's process
of either generation, at a random moment of it. The change may fail, and then the one before is
live; it must come to an end, the cluster be whole and writable afterwards, and every item that was
acknowledged be there, in its newest version. The first rounds are undisturbed: they say how long
one takes. Later publishes find the generation still loaded, unless a kill has ended it.
"""

import argparse
import json
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

from shardline.bench.corpus import clustered_set, generation_of
from shardline.bench.load.changes import COMMAND
from shardline.bench.load.processes import tree
from shardline.bench.load.writing import Writing
from shardline.cluster.build import run_here
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import load_config
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.endpoint import Endpoint
from shardline.cluster.serving.ray_session import cores, local_ray
from shardline.cluster.store import Store
from shardline.router.http.api_keys import Scope
from shardline.shards.core.errors import ShardlineError
from shardline.shards.core.partition import Partitioning

VICTIMS = ("controller", "mirror", "shard")  # roles of bench.load.processes
UNDISTURBED = 2  # rounds at the beginning: a publish and a rollback
MOST_ROUNDS = 4  # for each kill: some changes are over before it
ENDED_WITHIN_S = 240.0
WHOLE_WITHIN_S = 90.0
POLL_S = 0.05
SAID = 300  # characters of what a command that failed said


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One change. killed: a role, "" for none; after_s: from the command's beginning; live: the
    generation that serves after it."""

    what: str
    killed: str
    after_s: float
    seconds: float
    live: int
    said: str = ""


@dataclass(slots=True, kw_only=True)
class Kills:
    """The rounds of one cluster. pid: whose descendants it is. other: the generation to publish."""

    store: Path
    endpoint: Endpoint
    pid: int
    other: int
    writing: Writing
    rng: random.Random
    rounds: list[Round] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    _lasts_s: dict[str, float] = field(default_factory=dict)  # by command, as long as the last

    def run(self, kills: int, say: Callable[[str], None]) -> None:
        """Until so many were killed, or something was wrong."""
        victims = cycle(VICTIMS)
        for number in range(UNDISTURBED + MOST_ROUNDS * kills):
            victim = next(victims) if number >= UNDISTURBED else ""
            self._round(victim, self._words())
            say(str(self.rounds[-1]))
            self._wait_until_whole()
            self.writing.look(f"{self.rounds[-1].killed or 'nobody'} was killed")
            done = sum(bool(each.killed) for each in self.rounds)
            if self.violations or done == kills:
                return
        self.violations.append(f"{done} kills instead of {kills}: the changes were over before")

    def _words(self) -> tuple[str, ...]:
        """The command that makes the other generation live."""
        if self._live() == self.other:
            return ("rollback",)
        return ("publish", str(self.other), "--skip-gate", "a test of kills")

    def _round(self, victim: str, words: tuple[str, ...]) -> None:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "--store", str(self.store), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        after_s = self.rng.uniform(0, self._lasts_s.get(words[0], 0.0))
        killed = victim if victim and self._kill(victim, began + after_s, process) else ""
        after_s = time.monotonic() - began
        try:
            _, said = process.communicate(timeout=ENDED_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
            self.violations.append(f"{words[0]} did not end within {ENDED_WITHIN_S:g} s")
        seconds = time.monotonic() - began
        if not killed:
            self._lasts_s[words[0]] = seconds
        made = Round(
            what=words[0],
            killed=killed,
            after_s=round(after_s, 2),
            seconds=round(seconds, 1),
            live=self._live(),
            said=said.strip()[-SAID:] if process.returncode else "",
        )
        self.rounds.append(made)

    def _kill(self, role: str, at: float, change: subprocess.Popen[str]) -> bool:
        """Not before that moment, and once there is such a process; False: the change was over."""
        while change.poll() is None:
            found = [process for each, process in tree(self.pid) if each == role]
            if time.monotonic() >= at and found:
                with suppress(psutil.NoSuchProcess):
                    self.rng.choice(found).kill()
                    return True
            time.sleep(POLL_S)
        return False

    def _live(self) -> int:
        with self.endpoint.address.client() as client:
            return int(client.status()["generation"])

    def _wait_until_whole(self) -> None:
        """All rows are searched, and writes are acknowledged."""
        deadline = time.monotonic() + WHOLE_WITHIN_S
        writes = self.writing.journal.writes
        with self.endpoint.address.client() as client:
            while time.monotonic() < deadline:
                with suppress(ShardlineError):
                    is_whole = client.search(item_ids=[1], k=1).coverage.share == 1
                    if is_whole and self.writing.journal.writes > writes + 1:
                        return
                time.sleep(POLL_S)
        self.violations.append(f"not whole within {WHOLE_WITHIN_S:g} s after {self.rounds[-1]}")


def run(root: Path, *, kills: int, seed: int, rows: int, say: Callable[[str], None]) -> Any:
    """The report, ready for JSON; ``violations`` is empty if nothing was wrong."""
    store = Store(root)
    settings = [f"store={root}", "cluster.http_port=0", "cluster.shards=3"]
    config = load_config(None, settings)
    corpus = clustered_set(store, rows, 32, lambda *_: None)
    plan = plan_of(config, Partitioning.HASH_RANGE)
    old, new = (
        generation_of(store, corpus, each, run_jobs=run_here, progress=lambda *_: None).generation
        for each in (plan, replace(plan, num_shards=2))
    )
    store.set_current(old)
    with local_ray(num_cpus=cores()), serving(config) as endpoint:
        writing = Writing(
            address=endpoint.address_for(Scope.WRITE),
            dim=corpus.dim,
            model_version=corpus.model_version,
            rows_per_s=30.0,
        )
        killing = Kills(
            store=root,
            endpoint=endpoint,
            pid=endpoint.pid,
            other=new,
            writing=writing,
            rng=random.Random(seed),
        )
        writing.begin(0.0)
        try:
            killing.run(kills, say)
        finally:
            writing.stop()
        writing.end()
    written = writing.report()
    unanswered = sum(look["unanswered"] for look in written["looks"])
    wrong = {"lost": written["lost"], "returned": written["returned"], "unanswered": unanswered}
    return {
        "seed": seed,
        "rounds": [asdict(each) for each in killing.rounds],
        "writes": {name: found for name, found in written.items() if name != "timeline"},
        "violations": [
            *killing.violations,
            *written["violations"],
            *(f"{count} items {what}" for what, count in wrong.items() if count),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--rows", type=int, default=20_000)
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    say(f"seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="shardline-kills-") as folder:
        report = run(Path(folder), kills=args.kills, seed=args.seed, rows=args.rows, say=say)
    print(json.dumps(report, indent=2))  # noqa: T201
    sys.exit(1 if report["violations"] else 0)


if __name__ == "__main__":
    main()
