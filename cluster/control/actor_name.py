"""The names of actors: the controller's, and those of shards, which say what is where."""

from dataclasses import dataclass

from shardline.shards.core.messages import ReplicaKey

CONTROLLER_NAME = "shardline-controller"
SHARD_ACTOR_PREFIX = "shardline-shard-"


@dataclass(frozen=True, slots=True)
class ActorName:
    """What the name of a shard actor says: replica, host, and cluster by a digest of its secret.

    An actor stays on its host for life, so that a restarted controller knows from the list of
    names alone what is where.
    """

    key: ReplicaKey
    digest: str
    node_id: str

    def __str__(self) -> str:
        return f"{SHARD_ACTOR_PREFIX}{self.key}-{self.digest}-{self.node_id}"

    @classmethod
    def parse(cls, name: str) -> "ActorName | None":
        """None for a name that is not a shard actor's."""
        parts = name.removeprefix(SHARD_ACTOR_PREFIX).split("-")
        if not name.startswith(SHARD_ACTOR_PREFIX) or len(parts) != 5:
            return None
        if not all(part.isdecimal() for part in parts[:3]):
            return None
        return cls(ReplicaKey(*map(int, parts[:3])), *parts[3:])
