"""What happens beside the load: faults in their time, a look at the processes every second."""

from shardline.bench.load.faults import FaultRunner, Mark
from shardline.bench.load.processes import Sampler, Usage
from shardline.bench.load.scenarios import Step
from shardline.bench.load.target import Target

SAMPLE_S = 1.0  # between two looks at the processes


class Watch:
    """Of one step. ``tick`` is called all along, ``close`` in any case.

    ``shard`` is the one that faults hit. An endpoint of another machine has nothing to look at.
    """

    def __init__(self, target: Target, step: Step, *, warm_up_s: float, shard: int) -> None:
        self._warm_up_s = warm_up_s
        self._until = step.seconds
        self._address = target.address
        self._sampler = Sampler(target.pid) if target.pid is not None else None
        self._faults: FaultRunner | None = None
        self._next_look = 0.0
        if target.pid is not None and step.faults:
            self._faults = FaultRunner(pid=target.pid, shard=shard, addresses=self._addresses)
            self._faults.arm(step.faults, step.seconds)

    @property
    def marks(self) -> list[Mark]:
        return self._faults.marks if self._faults is not None else []

    def tick(self, elapsed: float) -> None:
        """``elapsed`` seconds since the first request was due, warm-up included."""
        at_s = elapsed - self._warm_up_s
        if at_s < 0 or at_s > self._until + SAMPLE_S:
            return
        if self._faults is not None:
            self._faults.tick(at_s)
        if at_s >= self._next_look:
            self.look(at_s)
            self._next_look = at_s + SAMPLE_S

    def look(self, at_s: float) -> None:
        if self._sampler is not None:
            self._sampler.look(at_s)

    def usage(self) -> list[Usage]:
        return self._sampler.usage() if self._sampler is not None else []

    def memory(self) -> list[tuple[float, dict[str, float]]]:
        return self._sampler.ticks if self._sampler is not None else []

    def close(self) -> None:
        if self._faults is not None:
            self._faults.close()

    def _addresses(self) -> dict[int, str | None]:
        with self._address.client() as client:
            return {shard["shard"]: shard["address"] for shard in client.status()["shards"]}
