"""A shard takes its index over from another generation, while it serves: the rows which that one
has in the same range, with what was written here since.

So a new index gets into service where there is no memory for two generations (``shardline publish
--one-shard-at-a-time``). What is made is a main index like that of a compaction, and replicas
change over to it as to any other. Its codes have another template, so it brings that with it, and
later compactions go on with it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shardline.shards.core.errors import (
    InvalidInput,
    NotFound,
    Unavailable,
    VersionMismatch,
    WritesLost,
)
from shardline.shards.core.messages import Absence
from shardline.shards.index.spec import Device
from shardline.shards.live.attributes import decoded_schema
from shardline.shards.live.kept_segments import WithKept
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import newest_write
from shardline.shards.live.loading import Loaded, load_built
from shardline.shards.live.log_files import FILES
from shardline.shards.live.log_reader import history_of
from shardline.shards.live.log_segments import segment_names
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.state import apply
from shardline.shards.live.write_keys import WriteKeys
from shardline.shards.storage.generation import (
    GenerationManifest,
    OwnIndex,
    read_attributes,
    read_generation,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """source: the folder of the generation whose index it is to be. after_seq: how many writes of
    the shard are in the rows of that. token: as of ``OwnIndex``."""

    source: str
    after_seq: int
    token: str

    def to_json(self) -> str:
        """For the command line of a process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Takeover":
        """What ``to_json`` made."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeoverLook:
    """How far a replica is. token: of the index that it searches; None: its generation's.
    is_busy: it makes or loads a main index. failure: why the newest order failed that it had as
    primary. trouble: why it could not make, or use, a main index of late."""

    token: str | None
    is_busy: bool
    failure: Absence | None
    trouble: str | None


def check_takeover(
    folder: Path, manifest: GenerationManifest, source: Path, coming: GenerationManifest
) -> None:
    """Whether each shard of the generation in ``folder`` can take over that of ``source``.

    Raises:
        VersionMismatch: of another model, so that scores of two shards would not compare.
        InvalidInput: its rows are cut into other shards, it is for other devices, or its attributes
            have other types; or it has been written to itself.
    """
    about = f"generation {coming.generation} cannot go live one shard at a time"
    if coming.model_version != manifest.model_version:
        raise VersionMismatch(
            f"{about}: answers would mix two models meanwhile",
            expected=f"model version {manifest.model_version}",
            got=coming.model_version,
            hint="publish it as a whole, with room for both generations",
        )
    if (coming.dim, coming.metric) != (manifest.dim, manifest.metric):
        raise VersionMismatch(
            f"{about}: its vectors are others",
            expected=f"{manifest.dim} dimensions, {manifest.metric}",
            got=f"{coming.dim} dimensions, {coming.metric}",
        )
    if _cut(coming) != _cut(manifest):
        raise InvalidInput(
            f"{about}: its items are spread over the shards in another way",
            expected=f"{len(manifest.shards)} shards with the boundaries of the live generation",
            got=f"{len(coming.shards)} shards, {coming.partitioning}",
            hint="`shardline build --same-shards` cuts a generation as the live one is cut",
        )
    if coming.index.device is not manifest.index.device:
        raise InvalidInput(
            f"{about}: it is searched on another device",
            expected=str(manifest.index.device),
            got=str(coming.index.device),
        )
    for shard in range(len(manifest.shards)):
        own, theirs = (_columns(*each, shard) for each in ((folder, manifest), (source, coming)))
        if own != theirs:
            raise InvalidInput(
                f"{about}: its attributes are others",
                expected=_shown(own),
                got=_shown(theirs),
                hint="publish it as a whole, with room for both generations",
            )
        if newest_write(source, shard):
            raise InvalidInput(
                f"{about}: it has been written to, and its files lack that",
                hint="`shardline build --from-live --same-shards` makes a generation of what is "
                "live now",
            )


def load_takeover(
    generation: Path,
    manifest: GenerationManifest,
    shard: int,
    takeover: Takeover,
    *,
    until: int,
    keys: bytes,
) -> Loaded:
    """A shard of ``generation`` after write ``until``, with the index of another generation. In
    memory are that index and what was written since, on the CPU. keys: those of its primary after
    write ``until``, packed.

    Raises:
        WritesLost: the log does not go back to what the rows of that generation have.
        Unavailable: another primary is about to begin: not all of the log is certain.
        CorruptFile, NotFound: of the files, or the log. Else as ``check_takeover``.
    """
    source = Path(takeover.source)
    coming = read_generation(source)
    check_takeover(generation, manifest, source, coming)
    loaded = load_built(source, coming, shard, device=Device.CPU)
    live = live_folder(generation, shard)
    tail = LogTail(live, takeover.after_seq, WithKept(FILES))
    try:
        records = [each for each in tail.read_proven() if each.seq <= until]
    except NotFound as error:
        raise _lost(shard, takeover.after_seq, error.message) from error
    if tail.left_out:
        raise Unavailable(f"shard {shard}: another primary is about to begin")
    state, _ = apply(replace(loaded.state, seq=takeover.after_seq), records)
    if state.seq != until:
        raise _lost(shard, takeover.after_seq, f"write {state.seq} as the last")
    own = OwnIndex(generation=coming.generation, token=takeover.token, index=coming.index_of(shard))
    known = WriteKeys.unpack(keys, live)
    return replace(loaded, state=state, keys=known, own=own)


def check_log(generation: Path, shard: int, after_seq: int) -> None:
    """Whether the log of a shard goes back to a write, by the heads of its segments.

    Raises:
        WritesLost: it does not. CorruptFile, OSError: of the log.
    """
    live, files = live_folder(generation, shard), WithKept(FILES)
    try:
        names = segment_names(files.names(live))
    except FileNotFoundError:
        return  # never written to
    if not names:
        return
    oldest = history_of(live, names, after_seq + 1, {}, files)[0].name
    if oldest.first_seq > after_seq + 1:
        raise _lost(shard, after_seq, f"write {oldest.first_seq} as the first")


def _lost(shard: int, after_seq: int, got: str) -> WritesLost:
    return WritesLost(
        f"shard {shard}: writes from {after_seq + 1} on are needed, and not all in its log",
        got=got,
        hint="build a generation from today's rows: `shardline build --from-live --same-shards`; "
        "`live.keep_log_mib` is what the log keeps",
    )


def _cut(manifest: GenerationManifest) -> tuple[int, str, tuple[int, ...]]:
    return len(manifest.shards), manifest.partitioning, manifest.boundaries


def _columns(folder: Path, manifest: GenerationManifest, shard: int) -> dict[str, str]:
    """The attributes of a shard: names and types, the width of offsets aside, which depends on how
    much text a shard has."""
    table = read_attributes(folder, manifest, shard, verify=False)
    schema = [] if table is None else list(decoded_schema(table.schema))
    return {each.name: str(each.type).removeprefix("large_") for each in schema}


def _shown(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns.items()) or "none"
