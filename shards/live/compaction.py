"""Compaction: a shard's main index and what was written since, as a new main index.

    python -m shardline.shards.live.compaction <generation's folder> <shard> <last write> \
        [<Takeover as JSON>, keys on stdin]

A function of files: it reads the newest main index and the log, and writes ``main-<seq>``
(``mains``), seq being the last write that it has read. The template is not trained again: codes
mean what they did, and those of rows that stay are copied; unless the shard takes the index of
another generation over (``takeover``). Whoever serves the
shard goes on meanwhile, in a process of its own, and changes over when the folder is complete
(``changeover``).
"""

import ctypes
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfile

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import InvalidInput, ShardlineError, Unavailable
from shardline.shards.core.files import remove_abandoned, staged_folder
from shardline.shards.index.compacted import NEW, build_compacted_index
from shardline.shards.index.spec import Device
from shardline.shards.live.attributes import with_written
from shardline.shards.live.live_folder import live_folder
from shardline.shards.live.live_rows import LiveRows, live_rows
from shardline.shards.live.loading import Loaded, load_caught_up, own_of
from shardline.shards.live.mains import (
    KEYS_NAME,
    compacted_seqs,
    main_folder,
    put_aside,
    write_main,
)
from shardline.shards.live.state import ShardState
from shardline.shards.live.takeover import Takeover, load_takeover
from shardline.shards.storage.generation import (
    ATTRIBUTES_NAME,
    INDEX_NAME,
    ITEM_IDS_NAME,
    TEMPLATE_NAME,
    GenerationManifest,
    read_generation,
    write_attributes,
    write_item_ids,
)

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# It runs while nothing else does (SCHED_IDLE). Beside a process that is merely nice, whoever wakes
# up waits for the rest of its time slice, 1.3 ms instead of .1 ms in the middle, and a search wakes
# up several processes, one after the other. On a machine that is never idle it would not end: after
# PATIENCE_S it is begun again at this niceness.
NICENESS = 10
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Compacted:
    """seq: of the folder that is complete now; rows in it."""

    seq: int
    rows: int


def compact(
    generation: Path,
    shard: int,
    *,
    until: int | None = None,
    threads: int = 1,
    takeover: Takeover | None = None,
    keys: bytes = b"",
) -> Compacted:
    """Writes ``main-<seq>`` of a shard, of all that is in its log now; ``until``: the last write
    that has been acknowledged, beyond which nothing of the log is certain to stay. A newer main
    index that is damaged is put aside, where the shard is whole without it. takeover, keys: as of
    ``load_takeover``; None: it keeps its index.

    Holds the shard's index, the new one, the delta and all attributes in memory. Works on the CPU,
    whatever the shard is served from.

    Raises:
        InvalidInput: no row is left: an index needs one.
        CorruptFile, NotFound: of the shard's files or its log. OSError: of the disk. Else as
        ``load_takeover``.
    """
    manifest = read_generation(generation)
    live = live_folder(generation, shard)
    if takeover is None:
        loaded = load_caught_up(generation, manifest, shard, device=Device.CPU, until=until)
    else:
        assert until is not None
        loaded = load_takeover(generation, manifest, shard, takeover, until=until, keys=keys)
    state = loaded.state
    rows = live_rows(state)
    if not len(rows.item_ids):
        raise InvalidInput("every item of the shard is deleted: nothing to index")
    if state.seq in compacted_seqs(live) and state.seq not in loaded.damaged:
        return Compacted(state.seq, len(rows.item_ids))
    for seq in loaded.damaged:
        aside = put_aside(live, seq)
        logger.error("shard %d: a damaged main index was put aside: %s", shard, aside)
    remove_abandoned(live, "main-*")  # by compactions that were killed
    try:
        with staged_folder(main_folder(live, state.seq)) as folder:
            _write(folder, manifest, loaded, rows, shard=shard, threads=threads)
            if takeover is None:
                _check_not_taken_over(live, manifest, shard, loaded)
    except OSError:
        if state.seq not in compacted_seqs(live):
            raise
        # another compaction, begun by the primary before, has ended at the same write meanwhile
    return Compacted(state.seq, len(rows.item_ids))


def _check_not_taken_over(
    live: Path, manifest: GenerationManifest, shard: int, loaded: Loaded
) -> None:
    """Raises Unavailable: the shard has taken another index over since its own was loaded here,
    and would go back to that."""
    newest = (compacted_seqs(live) or [0])[-1]
    is_newer = newest > loaded.main_seq and newest not in loaded.damaged
    if is_newer and own_of(live, newest, manifest, shard) != loaded.own:
        raise Unavailable("the shard has taken over another index meanwhile")


def _write(
    folder: Path,
    manifest: GenerationManifest,
    loaded: Loaded,
    rows: LiveRows,
    *,
    shard: int,
    threads: int,
) -> None:
    """All files of a main index, the manifest last."""
    state, item_ids = loaded.state, rows.item_ids
    write_index_of(state, rows, loaded.template, folder / INDEX_NAME, threads=threads)
    if loaded.own is not None:
        copyfile(loaded.template, folder / TEMPLATE_NAME)
    write_item_ids(folder / ITEM_IDS_NAME, item_ids)
    write_attributes(folder / ATTRIBUTES_NAME, attributes_of_rows(state, rows))
    (folder / KEYS_NAME).write_bytes(loaded.keys.pack())
    write_main(
        folder,
        generation=manifest.generation,
        shard=shard,
        seq=state.seq,
        rows=len(item_ids),
        own=loaded.own,
    )


def write_index_of(
    state: ShardState, rows: LiveRows, template: Path, out: Path, *, threads: int
) -> None:
    """Writes the index of ``rows`` of a state, in their order.

    Raises: as ``build_compacted_index``.
    """
    source = np.where(rows.in_main, rows.rows, NEW)
    new = state.delta.vectors_of(rows.rows[~rows.in_main])
    build_compacted_index(template, state.main, source, new, out, threads=threads)


def attributes_of_rows(state: ShardState, rows: LiveRows) -> pa.Table:
    """The columns of ``rows``, in their order; none where the shard has no attributes."""
    stored = state.attributes.table
    if stored is None:
        return pa.table({})
    packed = [state.delta.attributes_of(row) for row in rows.rows[~rows.in_main].tolist()]
    table = with_written(stored, packed)
    at = rows.rows.copy()
    at[~rows.in_main] = stored.num_rows + np.arange(len(packed))
    return table.take(pa.array(at))


def _end_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends: nobody else would."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == 1:
        sys.exit("whoever started the compaction has ended")


def main() -> None:
    generation, shard, until, *takeover = sys.argv[1:]
    os.nice(NICENESS)
    _end_with_parent()
    work = partial(compact, Path(generation), int(shard), until=int(until))
    if takeover:
        (order,) = takeover
        work = partial(work, takeover=Takeover.from_json(order), keys=sys.stdin.buffer.read())
    run = partial(_run, work, int(shard))
    code = None if takeover else _ended_when_idle(run)  # somebody waits for a takeover
    if code is None:
        code = run()
    sys.exit(code)


def _ended_when_idle(run: Callable[[], int]) -> int | None:
    """The exit code of ``run`` in a child that runs while nothing else does; None if that has not
    ended within PATIENCE_S, and has been killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _end_with_parent()
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            code = run()
        except Exception:  # noqa: BLE001  a bug: nobody else would show it
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    ended = os.pidfd_open(child)
    is_over = bool(select.select([ended], [], [], PATIENCE_S)[0])
    os.close(ended)
    if not is_over:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if is_over else None


def _run(work: Callable[[], object], shard: int) -> int:
    """The exit code, after a line on stderr, for the log, and one on stdout, for who started it, if
    it failed."""
    try:
        work()
    except (ShardlineError, OSError) as error:
        print(f"compaction of shard {shard}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        told = {"code": getattr(error, "code", Unavailable.code), "text": str(error)}
        print(json.dumps(told), flush=True)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    main()
