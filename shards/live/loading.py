"""Reads a shard's state from the files of its generation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.spec import Device
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.mains import KEYS_NAME, compacted_seqs, main_folder, read_main
from shardline.shards.live.state import ShardState, apply
from shardline.shards.live.write_keys import WriteKeys
from shardline.shards.storage.generation import (
    ATTRIBUTES_NAME,
    INDEX_NAME,
    ITEM_IDS_NAME,
    GenerationManifest,
    read_attribute_file,
    read_attributes,
    read_item_ids,
    verify_shard,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A shard as files have it. keys: of writes in it; main_seq: how many its main index has."""

    state: ShardState
    keys: WriteKeys
    main_seq: int


def last_write(folder: Path, manifest: GenerationManifest, shard: int) -> int:
    """How many writes a shard's files hold: its newest compaction and its log, verified; no index
    is loaded. The log's last group is not counted while nobody can tell whether it holds:
    ``LogTail.read_proven``.

    Raises:
        CorruptFile, NotFound: a file is damaged or missing; named.
    """
    live = live_folder(folder, shard)

    def verified(seq: int) -> int:
        if seq:
            read_main(live, seq, generation=manifest.generation, shard=shard)
        return end_of_log(live, seq)

    return with_newest_main(live, verified)


def with_newest_main(live: Path, read: Callable[[int], int]) -> int:
    """What ``read`` returns for the writes in a shard's newest compaction, 0 without any. If a
    newer one comes meanwhile, its primary may remove what is being read: then it is read anew.

    Raises: as ``read``.
    """
    while True:
        seq = (compacted_seqs(live) or [0])[-1]
        try:
            return read(seq)
        except (CorruptFile, NotFound):
            if compacted_seqs(live)[-1:] in ([], [seq]):
                raise


def end_of_log(live: Path, after_seq: int) -> int:
    """The last write of a log, read from behind one. Raises: as ``LogTail.read_proven``."""
    tail = LogTail(live, after_seq=after_seq)
    tail.read_proven()
    return tail.seq


def load_newest(
    folder: Path, manifest: GenerationManifest, shard: int, *, device: Device | None = None
) -> Loaded:
    """Verifies and reads the newest compaction of a shard, or without any the shard as it was
    built; ``device`` None means the manifest's. The log has what came later.

    Raises: as ``load_state``.
    """
    live = live_folder(folder, shard)
    while True:
        seqs = compacted_seqs(live)
        if not seqs:
            state = load_state(folder, manifest, shard, device=device)
            return Loaded(state=state, keys=WriteKeys(), main_seq=0)
        try:
            return _load_compacted(folder, manifest, shard, seqs[-1], device)
        except (CorruptFile, NotFound):
            if compacted_seqs(live)[-1:] == seqs[-1:]:
                raise
            # a newer one is there, and what was being read has been removed


def load_caught_up(
    folder: Path,
    manifest: GenerationManifest,
    shard: int,
    *,
    device: Device | None = None,
    until: int | None = None,
) -> Loaded:
    """``load_newest``, with what the log has had since; up to write ``until``, None for all.

    Raises:
        NotFound: also if the log does not go back to the newest compaction. Else as ``load_state``.
    """
    live = live_folder(folder, shard)
    while True:
        loaded = load_newest(folder, manifest, shard, device=device)
        try:
            return caught_up(loaded, live, until=until)
        except NotFound:
            if compacted_seqs(live)[-1:] in ([], [loaded.main_seq]):
                raise
            # a newer one has come since, and the primary has trimmed its log


def caught_up(loaded: Loaded, live: Path, *, until: int | None = None) -> Loaded:
    """With what the log had when it was read, once; up to write ``until``, None for all. Writes
    may go on meanwhile: who follows the log reads those.

    Raises:
        CorruptFile, NotFound, OSError: as ``LogTail.read_proven``.
    """
    records = LogTail(live, after_seq=loaded.state.seq).read_proven()
    if until is not None:
        records = [record for record in records if record.seq <= until]
    state, applied = apply(loaded.state, records)
    for record, outcome in zip(records, applied, strict=True):
        loaded.keys.add(record, rows=outcome.rows, existed=outcome.existed)
    return replace(loaded, state=state)


def _load_compacted(
    folder: Path, manifest: GenerationManifest, shard: int, seq: int, device: Device | None
) -> Loaded:
    live = live_folder(folder, shard)
    made = read_main(live, seq, generation=manifest.generation, shard=shard)
    path = main_folder(live, seq)
    main = _load_main(path, manifest, made.rows, device or manifest.index.device)
    item_ids = read_item_ids(path / ITEM_IDS_NAME, rows=made.rows)
    table = read_attribute_file(path / ATTRIBUTES_NAME, rows=made.rows)
    state = ShardState.of(main, item_ids, ItemAttributes(table), seq=seq)
    keys = WriteKeys.unpack((path / KEYS_NAME).read_bytes(), path / KEYS_NAME)
    return Loaded(state=state, keys=keys, main_seq=seq)


def load_state(
    folder: Path, manifest: GenerationManifest, shard: int, *, device: Device | None = None
) -> ShardState:
    """Verifies and reads one shard as it was built, before any write; ``device`` None means the
    manifest's.

    Raises:
        NotFound: no such shard.
        CorruptFile: a file is missing, altered, or contradicts the manifest; named.
    """
    entry = verify_shard(folder, manifest, shard)
    main = _load_main(folder / entry.folder, manifest, entry.rows, device or manifest.index.device)
    item_ids = read_item_ids(folder / entry.folder / ITEM_IDS_NAME, rows=entry.rows)
    attributes = ItemAttributes(read_attributes(folder, manifest, shard, verify=False))
    return ShardState.of(main, item_ids, attributes)


def _load_main(folder: Path, manifest: GenerationManifest, rows: int, device: Device) -> MainIndex:
    path = folder / INDEX_NAME
    main = MainIndex.load(
        path, metric=manifest.metric, defaults=manifest.index.search_params, device=device
    )
    if main.rows != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(main.rows))
    if main.dim != manifest.dim:
        raise CorruptFile(f"{path}: wrong dimension", expected=str(manifest.dim), got=str(main.dim))
    return main
