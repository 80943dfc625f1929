"""The orders by which the shards of the live generation take over the index of another."""

from shardline.cluster.rollover.mirror_start import Made, start_of
from shardline.cluster.store import Store
from shardline.shards.live.takeover import Takeover, check_log, check_takeover
from shardline.shards.storage.generation import read_generation


def takeovers(store: Store, live: int, generation: int, token: str) -> tuple[Takeover, ...]:
    """One per shard, in their order. token: as of ``OwnIndex``.

    Raises:
        VersionMismatch, InvalidInput: as ``check_takeover``.
        WritesLost: the rows of the live one have writes which those of the other may lack, and its
            logs do not have.
        NotFound, CorruptFile, NewerFormat, OSError: of the files.
    """
    folder, source = store.generation(live), store.generation(generation)
    manifest, coming = read_generation(folder), read_generation(source)
    check_takeover(folder, manifest, source, coming)
    start = start_of(None, Made.of(manifest), Made.of(coming), run="")
    for shard, seq in enumerate(start.seqs):
        check_log(folder, shard, seq)
    return tuple(Takeover(source=str(source), after_seq=seq, token=token) for seq in start.seqs)
