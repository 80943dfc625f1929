"""The generations that are loaded, the live one and one beside it: plain data.

``fleet_rules`` has the rules.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from shardline.cluster.control.placement_state import Placement, ReplicaState
from shardline.shards.core.messages import ReplicaKey


class Role(StrEnum):
    """candidate: may become the live one. kept: was the live one, and is there to return to."""

    CANDIDATE = "candidate"
    KEPT = "kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The generation that is loaded beside the live one.

    is_mirrored: the writes of the live one are brought to it.
    """

    placement: Placement
    role: Role
    is_mirrored: bool = False

    @property
    def generation(self) -> int:
        return self.placement.table.generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """live: what routers are told of. Every number is from one counter of both."""

    live: Placement
    beside: Beside | None = None

    @property
    def counter(self) -> int:
        """The largest number given out, as a table version or an epoch."""
        return max(placement.counter for placement in self.placements)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The live one first."""
        return (self.live,) if self.beside is None else (self.live, self.beside.placement)

    def of(self, generation: int) -> Placement | None:
        """That generation's; None: it is not loaded."""
        for placement in self.placements:
            if placement.table.generation == generation:
                return placement
        return None

    def state(self, key: ReplicaKey) -> ReplicaState | None:
        """The replica's, of whichever generation; None: it is not placed."""
        placement = self.of(key.generation)
        return None if placement is None else placement.replicas.get(key)

    @property
    def states(self) -> Iterator[ReplicaState]:
        """Of every replica, those of the live generation first."""
        for placement in self.placements:
            yield from placement.replicas.values()


def reserved_by(placement: Placement) -> Mapping[str, tuple[float, float]]:
    """(CPUs, GPUs) of each host, by node id, that the replicas of a generation have."""
    rules = placement.rules
    if not rules.cpus and not rules.gpus:
        return {}
    counts: dict[str, int] = defaultdict(int)
    for state in placement.replicas.values():
        counts[state.node_id] += 1
    return {node: (count * rules.cpus, count * rules.gpus) for node, count in counts.items()}
