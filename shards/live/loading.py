"""Reads a shard's state from the files of its generation.

The newest main index and the log behind it are the shard. Where that main index is damaged, the
one before it and the log are the same shard, if the log goes back to it (``_passed_over``): it is
trimmed only after its primary has verified and loaded the main index that has the writes, and of
what was trimmed ``live.keep_log_mib`` are kept.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.shards.index.gpu import check_room
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.spec import Device, ResolvedIndex
from shardline.shards.live.item_attributes import ItemAttributes
from shardline.shards.live.kept_segments import WithKept
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.log_files import FILES, LogFiles
from shardline.shards.live.log_tail import LogTail
from shardline.shards.live.mains import KEYS_NAME, compacted_seqs, main_folder, read_main
from shardline.shards.live.state import ShardState, apply
from shardline.shards.live.write_keys import WriteKeys
from shardline.shards.storage.generation import (
    ATTRIBUTES_NAME,
    INDEX_NAME,
    ITEM_IDS_NAME,
    TEMPLATE_NAME,
    GenerationManifest,
    OwnIndex,
    read_attribute_file,
    read_attributes,
    read_item_ids,
    shard_folder,
    shard_template,
    verify_shard,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A shard as files have it. keys: of writes in it; main_seq: how many its main index has.
    template: of its index. own: as of ``ShardEntry``. damaged: main indexes, ascending, that are
    newer, and damaged."""

    state: ShardState
    keys: WriteKeys
    main_seq: int
    template: Path
    own: OwnIndex | None = None
    damaged: tuple[int, ...] = ()


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
            return load_built(folder, manifest, shard, device=device)
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
    """The newest compaction of a shard, with what the log has had since; up to write ``until``,
    None for all. Writes may go on meanwhile: who follows the log reads those.

    If that compaction is damaged, the one before it with the log, where both are the same shard:
    ``damaged`` says so, and it is logged.

    Raises:
        NotFound: also if the log does not go back to the newest compaction. Else as ``load_state``.
        ConfigError: it is searched on a card, and there is none, or too little room on it.
    """
    _check_card(manifest, shard, device)
    live = live_folder(folder, shard)
    while True:
        newest = compacted_seqs(live)[-1:]
        try:
            loaded = load_newest(folder, manifest, shard, device=device)
        except CorruptFile as error:
            passed = _passed_over(folder, manifest, shard, device=device, until=until)
            if compacted_seqs(live)[-1:] != newest:
                continue  # a newer one has come since
            if passed is None:
                raise
            logger.error("shard %d: %s; the one before it is used, with the log", shard, error)
            return passed
        try:
            return _caught_up(loaded, live, until=until)[0]
        except NotFound:
            if compacted_seqs(live)[-1:] in ([], [loaded.main_seq]):
                raise
            # a newer one has come since, and the primary has trimmed its log


def _caught_up(
    loaded: Loaded, live: Path, *, until: int | None, files: LogFiles = FILES
) -> tuple[Loaded, int]:
    """With what the log had when it was read, once; and the last write that the log holds, be it
    certain or not.

    Raises:
        CorruptFile, NotFound, OSError: as ``LogTail.read_proven``.
    """
    tail = LogTail(live, loaded.state.seq, files)
    records = tail.read_proven()
    if until is not None:
        records = [record for record in records if record.seq <= until]
    state, applied = apply(loaded.state, records)
    for record, outcome in zip(records, applied, strict=True):
        loaded.keys.add(record, rows=outcome.rows, existed=outcome.existed)
    return replace(loaded, state=state), tail.seq + tail.left_out


def _passed_over(
    folder: Path,
    manifest: GenerationManifest,
    shard: int,
    *,
    device: Device | None,
    until: int | None,
) -> Loaded | None:
    """The shard without its newest compaction, which is damaged: from an older one, or as it was
    built, and the log, its kept segments among it. None: these do not have all that the damaged one
    was made of.

    They have if the log, whose groups are chained by checksums, goes from there to its last write;
    and if no index has been taken over meanwhile, whose rows the log does not have.
    """
    live = live_folder(folder, shard)
    seqs = compacted_seqs(live)
    own = own_of(live, seqs[-1], manifest, shard) if seqs else None
    # an erasure has put the files of a compaction in place of those that were built
    is_as_built = manifest.shard_entry(shard).folder == shard_folder(shard)
    older = [*seqs[-2::-1], *([0] if is_as_built and seqs else [])]
    for at, seq in enumerate(older):
        try:
            if seq:
                loaded = _load_compacted(folder, manifest, shard, seq, device)
            else:
                loaded = load_built(folder, manifest, shard, device=device)
            found, end = _caught_up(loaded, live, until=until, files=WithKept(FILES))
        except (CorruptFile, NotFound):
            continue
        if end < seqs[-1]:
            return None  # the log itself was cut
        if own is not None and own != loaded.own:
            return None
        return replace(found, damaged=tuple(seqs[len(seqs) - 1 - at :]))
    return None


def own_of(live: Path, seq: int, manifest: GenerationManifest, shard: int) -> OwnIndex | None:
    """Of a compaction; None: it has none, or its manifest cannot be read."""
    try:
        return read_main(live, seq, generation=manifest.generation, shard=shard, verify=False).own
    except (CorruptFile, NotFound):
        return None


def _load_compacted(
    folder: Path, manifest: GenerationManifest, shard: int, seq: int, device: Device | None
) -> Loaded:
    live = live_folder(folder, shard)
    made = read_main(live, seq, generation=manifest.generation, shard=shard)
    path = main_folder(live, seq)
    index = manifest.index if made.own is None else made.own.index
    main = _load_main(path, manifest, index, made.rows, device)
    item_ids = read_item_ids(path / ITEM_IDS_NAME, rows=made.rows)
    table = read_attribute_file(path / ATTRIBUTES_NAME, rows=made.rows)
    share = _share(manifest, shard)
    state = ShardState.of(main, item_ids, ItemAttributes(table), seq=seq, share=share)
    keys = WriteKeys.unpack((path / KEYS_NAME).read_bytes(), path / KEYS_NAME)
    template = (folder if made.own is None else path) / TEMPLATE_NAME
    return Loaded(state=state, keys=keys, main_seq=seq, template=template, own=made.own)


def load_built(
    folder: Path, manifest: GenerationManifest, shard: int, *, device: Device | None = None
) -> Loaded:
    """One shard as it was built, before any write. Raises: as ``load_state``."""
    state = load_state(folder, manifest, shard, device=device)
    entry = manifest.shard_entry(shard)
    template = shard_template(folder, entry)
    return Loaded(state=state, keys=WriteKeys(), main_seq=0, template=template, own=entry.own)


def load_state(
    folder: Path, manifest: GenerationManifest, shard: int, *, device: Device | None = None
) -> ShardState:
    """Verifies and reads one shard as it was built, before any write; ``device`` None means the
    manifest's.

    Raises:
        NotFound: no such shard.
        CorruptFile: a file is missing, altered, or contradicts the manifest; named.
    """
    _check_card(manifest, shard, device)
    entry = verify_shard(folder, manifest, shard)
    index = manifest.index_of(shard)
    main = _load_main(folder / entry.folder, manifest, index, entry.rows, device)
    item_ids = read_item_ids(folder / entry.folder / ITEM_IDS_NAME, rows=entry.rows)
    attributes = ItemAttributes(read_attributes(folder, manifest, shard, verify=False))
    return ShardState.of(main, item_ids, attributes, share=_share(manifest, shard))


def _check_card(manifest: GenerationManifest, shard: int, device: Device | None) -> None:
    """Raises ConfigError where the shard as it was built has no card, or no room on it: before
    its files are verified, which reads them."""
    if (device or manifest.index.device) is Device.CUDA:
        check_room(
            manifest.index_of(shard).factory,
            rows=manifest.shard_entry(shard).rows,
            dim=manifest.dim,
            metric=manifest.metric,
            card=manifest.index.card,
        )


def _share(manifest: GenerationManifest, shard: int) -> float:
    """Of the generation's rows those that the shard was built with."""
    return manifest.shard_entry(shard).rows / max(1, manifest.rows)


def _load_main(
    folder: Path,
    manifest: GenerationManifest,
    index: ResolvedIndex,
    rows: int,
    device: Device | None,
) -> MainIndex:
    path = folder / INDEX_NAME
    device, card = device or manifest.index.device, manifest.index.card
    if device is Device.CUDA:  # before gigabytes are read that it has no room for
        check_room(index.factory, rows=rows, dim=manifest.dim, metric=manifest.metric, card=card)
    main = MainIndex.load(
        path,
        metric=manifest.metric,
        defaults=index.search_params,
        device=device,
        card=card,
    )
    if main.rows != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(main.rows))
    if main.dim != manifest.dim:
        raise CorruptFile(f"{path}: wrong dimension", expected=str(manifest.dim), got=str(main.dim))
    return main
