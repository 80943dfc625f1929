"""One shard: item ids over a main index; answers search and fetch requests.

No sockets, threads or Ray here. A shard is used by one thread at a time.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardline.shards.core.errors import CorruptFile, InvalidInput, ShardlineError
from shardline.shards.core.messages import FetchReply, FetchRequest, SearchReply, SearchRequest
from shardline.shards.core.schema import EMPTY_ID, IdArray, check_ids, check_k
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.spec import Device
from shardline.shards.storage.generation import (
    INDEX_NAME,
    ITEM_IDS_NAME,
    GenerationManifest,
    read_generation,
    read_item_ids,
    shard_folder,
    verify_shard,
)


class Shard:
    """item_ids (n,) int64, ascending: the item of each local row of ``main``."""

    def __init__(self, *, shard: int, generation: int, main: MainIndex, item_ids: IdArray) -> None:
        assert main.rows == item_ids.size
        self.shard = shard
        self.generation = generation
        self._main = main
        # one slot more, so that row -1 of an empty result slot reads the empty id
        self._ids_by_row = np.append(item_ids, EMPTY_ID)

    @classmethod
    def load(cls, folder: Path, shard: int, *, device: Device | None = None) -> "Shard":
        """Verifies and reads one shard of a generation; ``device`` None means the manifest's.

        Raises:
            NotFound: no such generation or shard.
            CorruptFile: a file is missing, altered, or contradicts the manifest; named.
            NewerFormat: written by a version newer than this code.
        """
        manifest = read_generation(folder)
        entry = verify_shard(folder, manifest, shard)
        main = _load_main(folder, manifest, shard, device or manifest.index.device)
        ids_path = folder / shard_folder(shard) / ITEM_IDS_NAME
        return cls(
            shard=shard,
            generation=manifest.generation,
            main=main,
            item_ids=read_item_ids(ids_path, rows=entry.rows),
        )

    @property
    def rows(self) -> int:
        return self._main.rows

    @property
    def dim(self) -> int:
        return self._main.dim

    @property
    def _item_ids(self) -> IdArray:
        return self._ids_by_row[:-1]

    def describe(self) -> dict[str, Any]:
        return {"shard": self.shard, "generation": self.generation, **self._main.describe()}

    def search(self, request: SearchRequest) -> SearchReply:
        """The k best rows of each query, in answer order.

        Raises:
            InvalidInput: k, dimension or a search parameter out of range.
        """
        (reply,) = self.search_batch([request])
        if isinstance(reply, ShardlineError):
            raise reply
        return reply

    def search_batch(self, requests: Sequence[SearchRequest]) -> list[SearchReply | ShardlineError]:
        """One reply a request, in order; requests of equal k and params share one search.

        A request that is wrong gets its error in place of a reply and harms no other.
        """
        if len(requests) == 1:
            return [self._search_alone(requests[0])]
        replies: list[SearchReply | ShardlineError | None] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, request in enumerate(requests):
            try:
                self._check(request)
            except InvalidInput as error:
                replies[at] = error
            else:
                groups.setdefault((request.k, request.params), []).append(at)
        for members in groups.values():
            group = [requests[at] for at in members]
            try:
                answered: Sequence[SearchReply | ShardlineError] = self._search_together(group)
            except ShardlineError as error:
                answered = [error] * len(group)
            for at, reply in zip(members, answered, strict=True):
                replies[at] = reply
        return [reply for reply in replies if reply is not None]

    def fetch(self, request: FetchRequest) -> FetchReply:
        """The vectors of those ids that this shard holds, in the order asked for.

        As exact as ``MainIndex.reconstruct``: an index without exact copies gives approximations.

        Raises:
            InvalidInput: a negative id.
        """
        wanted = check_ids(request.item_ids)
        rows = np.searchsorted(self._item_ids, wanted)
        found = self._ids_by_row[rows] == wanted
        return FetchReply(
            item_ids=wanted[found], vectors=self._main.reconstruct(rows[found].astype(np.int64))
        )

    def _search_alone(self, request: SearchRequest) -> SearchReply | ShardlineError:
        try:
            self._check(request)
            (reply,) = self._search_together([request])
        except ShardlineError as error:
            return error
        return reply

    def _check(self, request: SearchRequest) -> None:
        check_k(request.k)
        if request.queries.shape[1] != self.dim:
            raise InvalidInput(
                "wrong dimension",
                field="queries",
                expected=str(self.dim),
                got=str(request.queries.shape[1]),
            )
        if len(request.queries) == 0:
            raise InvalidInput("empty batch", field="queries", expected="at least one query")

    def _search_together(self, group: Sequence[SearchRequest]) -> list[SearchReply]:
        """Requests of equal k and params, as one call to the index."""
        first = group[0]
        started = time.perf_counter()
        queries = first.queries
        if len(group) > 1:
            queries = np.concatenate([request.queries for request in group])
        scores, rows = self._main.search(queries, first.k, first.params)
        ids = self._ids_by_row[rows]
        search_ms = (time.perf_counter() - started) * 1e3
        if len(group) == 1:
            return [SearchReply(ids=ids, scores=scores, rows=self.rows, search_ms=search_ms)]
        replies = []
        start = 0
        for request in group:
            end = start + len(request.queries)
            replies.append(
                SearchReply(
                    ids=ids[start:end],
                    scores=scores[start:end],
                    rows=self.rows,
                    search_ms=search_ms,
                )
            )
            start = end
        return replies


def _load_main(folder: Path, manifest: GenerationManifest, shard: int, device: Device) -> MainIndex:
    path = folder / shard_folder(shard) / INDEX_NAME
    main = MainIndex.load(
        path, metric=manifest.metric, defaults=manifest.index.search_params, device=device
    )
    rows = manifest.shard_entry(shard).rows
    if main.rows != rows:
        raise CorruptFile(f"{path}: wrong row count", expected=str(rows), got=str(main.rows))
    if main.dim != manifest.dim:
        raise CorruptFile(f"{path}: wrong dimension", expected=str(manifest.dim), got=str(main.dim))
    return main
