"""Faults of files: damaged while the cluster runs, and read by a process that is killed for it.

A damaged file takes the place of the whole one in one step, as a restored or rotten one would: who
has the old file open or mapped keeps it.
"""

import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from shardline.shards.core.errors import CorruptFile, EncoderUnavailable, ShardlineError
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.mains import compacted_seqs, main_folder
from shardline.shards.storage.generation import shard_folder
from tests.chaos.faults import NO_PRIMARY, NO_ROUTER, UNNOTICED, Fault, Kind, is_gone, one_of
from tests.chaos.oracle import Finding, FindingKind, QueryKind
from tests.chaos.served import Served
from tests.chaos.windows import Allowance

PASSED_OVER_S = 15.0  # a shard looks at its own health every 5 s, and routers ask every second
Hurt = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def noise(content: bytes, rng: random.Random) -> bytes:
    """Random bytes of the same length."""
    return rng.randbytes(len(content))


HURTS: tuple[Hurt, ...] = (flipped, flipped, truncated, noise)


@dataclass(slots=True, kw_only=True)
class Damaged:
    """``path`` is damaged and a process killed that reads it when it comes back.

    At the end the file is made whole again, and the processes that ``again`` finds killed. The
    process must not come back as long as the file is damaged, but the rest of the cluster may.
    """

    path: Path
    hurt: Hurt
    rng: random.Random
    victim: psutil.Process
    held_s: float
    again: Callable[[], list[psutil.Process]] = list
    restores: bool = True
    check: Callable[[], bool] = lambda: True
    findings: list[Finding] = field(default_factory=list)
    _whole: bytes = b""
    _more: list[psutil.Process] = field(default_factory=list)

    def inject(self) -> None:
        self._whole = self.path.read_bytes()
        replace(self.path, self.hurt(self._whole, self.rng))
        self.victim.kill()

    def undo(self) -> None:
        if self.restores and self.path.parent.is_dir():  # a compaction may have removed it
            replace(self.path, self._whole)
        self._more = self.again()
        for process in self._more:
            process.kill()

    def is_whole(self) -> bool:
        return all(map(is_gone, (self.victim, *self._more))) and self.check()


def replace(path: Path, content: bytes) -> None:
    """Another file in the place of ``path``, with its mode."""
    other = path.with_name(f".{path.name}.chaos")
    other.write_bytes(content)
    other.chmod(path.stat().st_mode)
    other.replace(path)


def shard_file(served: Served, rng: random.Random) -> Fault:
    """A file of a random shard; its process loads it again, cannot, and says why."""
    folder = served.store.generation(served.store.current())
    shard = rng.randrange(len(sorted(folder.glob("shard-*"))))
    files = sorted(loaded_folder(folder, shard).iterdir())
    damaged = Damaged(
        path=rng.choice(files),
        hurt=rng.choice(HURTS),
        rng=rng,
        victim=served.shard(shard),
        held_s=rng.uniform(8, 12),  # the process has to come back and to fail
    )
    return SaysWhy(damaged, served, folder, shard)


class SaysWhy:
    """A damaged shard: ``status`` must say why it does not answer, or, where its process does
    without the file, that a repair is due, before the file is whole again."""

    def __init__(self, damaged: Damaged, served: Served, generation: Path, shard: int) -> None:
        self._damaged, self._served = damaged, served
        self._generation, self._shard = generation, shard
        self.held_s = damaged.held_s
        self.findings = damaged.findings

    def inject(self) -> None:
        self._damaged.inject()

    def undo(self) -> None:
        try:
            code = self._served.status()["shards"][self._shard]["code"]
        except ShardlineError:  # another fault at the same time: the router is away
            code = CorruptFile.code
        finally:
            is_read = loaded_folder(self._generation, self._shard) == self._damaged.path.parent
            is_said = not is_read or code == CorruptFile.code or self._is_passed_over()
            self._damaged.undo()
        if not is_said:
            text = f"{self._damaged.path.name} damaged: status says {code!r}"
            self.findings.append(Finding(kind=FindingKind.UNTRUTHFUL, text=text))

    def is_whole(self) -> bool:
        return self._damaged.is_whole()

    def _is_passed_over(self) -> bool:
        """Whether ``status`` names the folder as one that is not used. It hears of that within
        seconds."""
        until = time.monotonic() + PASSED_OVER_S
        while time.monotonic() < until:
            with suppress(ShardlineError):
                repairs = self._served.status()["repairs"]
                if any(str(self._damaged.path.parent) in each["text"] for each in repairs):
                    return True
            if loaded_folder(self._generation, self._shard) != self._damaged.path.parent:
                return True  # a newer compaction has come meanwhile
            time.sleep(0.5)
        return False


def loaded_folder(generation: Path, shard: int) -> Path:
    """Where a shard is loaded from: its newest compaction, or what was built."""
    live = live_folder(generation, shard)
    seqs = compacted_seqs(live)
    return main_folder(live, seqs[-1]) if seqs else generation / shard_folder(shard)


def encoder_file(served: Served, rng: random.Random) -> Fault:
    """A file of the query encoder; a router that starts must do without it."""
    folder = served.store.generation(served.store.current()) / "query_encoder"
    return Damaged(
        path=rng.choice(sorted(folder.iterdir())),
        hurt=rng.choice(HURTS),
        rng=rng,
        victim=one_of(served, "router", rng),
        held_s=ROUTER_GAP_S + 3,
        # a running router loads it within a minute, one that starts at once
        again=rng.choice((list, lambda: served.processes("router"))),
    )


def counter_file(served: Served, rng: random.Random) -> Fault:
    """The store's counter is damaged or older; the controller that reads it goes on from what
    others have, and writes it anew."""
    path = served.store.root / "counter.json"

    def is_written_anew() -> bool:
        try:
            counter = json.loads(path.read_bytes())["counter"]
            return isinstance(counter, int) and counter >= int(served.status()["version"])
        except (ValueError, KeyError, TypeError, ShardlineError):
            return False

    return Damaged(
        path=path,
        hurt=rng.choice((*HURTS, lambda content, rng: b'{"counter": 1}\n')),
        rng=rng,
        victim=one_of(served, "controller", rng),
        held_s=0,
        restores=False,
        check=is_written_anew,
    )


def current_file(served: Served, rng: random.Random) -> Fault:
    """CURRENT names no generation; the controller that starts waits until it does."""
    return Damaged(
        path=served.store.root / "CURRENT",
        hurt=rng.choice((*HURTS, lambda c, r: "٣\n".encode(), lambda c, r: b"999999\n")),
        rng=rng,
        victim=one_of(served, "controller", rng),
        held_s=rng.uniform(2, 6),
    )


def manifest_file(served: Served, rng: random.Random) -> Fault:
    """The generation's manifest; the shard that starts cannot check its files."""
    folder = served.store.generation(served.store.current())
    return Damaged(
        path=folder / "_manifest.json",
        hurt=rng.choice(HURTS),
        rng=rng,
        victim=one_of(served, "shard", rng),
        held_s=rng.uniform(2, 6),
    )


ROUTER_GAP_S = 20.0
# placed again after 1, 2, 4, 8 ... s: after 8 s of damage the next attempt is at most 8 s away
PLACED_AGAIN = Allowance(whole_within_s=45, partial=True, writes=NO_PRIMARY)

FILE_KINDS = (
    Kind(name="file of a shard damaged", allowance=PLACED_AGAIN, make=shard_file),
    Kind(name="manifest damaged", allowance=PLACED_AGAIN, make=manifest_file),
    Kind(
        name="query encoder damaged",
        allowance=Allowance(
            whole_within_s=75,
            errors=frozenset({EncoderUnavailable.code}),
            kinds=frozenset({QueryKind.FEATURES}),
        ),
        make=encoder_file,
        meanwhile=Allowance(
            whole_within_s=ROUTER_GAP_S,
            errors=NO_ROUTER.errors,
            errors_for_s=ROUTER_GAP_S,
            partial=True,
            writes=NO_ROUTER.writes,
        ),
    ),
    Kind(name="counter damaged", allowance=UNNOTICED, make=counter_file),
    Kind(name="CURRENT damaged", allowance=UNNOTICED, make=current_file),
)
