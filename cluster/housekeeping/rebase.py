"""A compaction's main index becomes the shard of its generation: what it has replaced can go then.

Readers of the generation's files alone, ``shardline batch`` say, see the shard as of that
compaction from then on. Its replicas load the newest compaction as before.
"""

import errno
import os
from dataclasses import replace
from pathlib import Path
from shutil import copyfile

from shardline.shards.core.files import staged_folder
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.mains import KEYS_NAME, compacted_seqs, main_folder, read_main
from shardline.shards.storage.generation import (
    ITEM_IDS_NAME,
    ShardEntry,
    read_generation,
    read_item_ids,
    shard_folder,
    write_generation,
)

CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}


def rebase(generation: Path, shard: int) -> bool:
    """Has the manifest list the files of the newest compaction; False: it does, or there is none.

    One process at a time: it changes the manifest. The files that are listed no more stay, for
    readers that have begun; ``removals`` finds them.

    Raises:
        CorruptFile, NotFound: of the manifest or the compaction. OSError: of the disk.
    """
    manifest, live = read_generation(generation), live_folder(generation, shard)
    seq = (compacted_seqs(live) or [0])[-1]
    name = f"{shard_folder(shard)}-{seq:020d}"
    if not seq or manifest.shard_entry(shard).folder == name:
        return False
    found = read_main(live, seq, generation=manifest.generation, shard=shard)
    listed = [file for file in found.files if file.name != KEYS_NAME]
    target = generation / name
    if not target.exists():  # or a process was killed before it changed the manifest
        with staged_folder(target) as staging:
            for file in listed:
                _link(main_folder(live, seq) / file.name, staging / file.name)
    item_ids = read_item_ids(target / ITEM_IDS_NAME, rows=found.rows)
    entry = ShardEntry(
        shard=shard,
        id_min=int(item_ids[0]),
        id_max=int(item_ids[-1]),
        rows=found.rows,
        files=tuple(replace(file, name=f"{name}/{file.name}", rows=found.rows) for file in listed),
        own=found.own,
    )
    shards = (*manifest.shards[:shard], entry, *manifest.shards[shard + 1 :])
    write_generation(generation, replace(manifest, shards=shards))
    return True


def _link(source: Path, target: Path) -> None:
    """The same file under another name, where the file system can; else a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
        copyfile(source, target)
