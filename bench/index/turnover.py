"""Recall of a shard whose rows are replaced and deleted, beside an index trained on what it holds.

Theory. A compaction copies the codes of rows that stay and encodes new ones with the template of
the generation, so it gives what a build with that template gives. What is lost against a fresh
build is what the template does not know of the rows that came: lists around centroids of other
rows, codes that fit their residuals less well. With rows of the same distribution that is next to
nothing. With rows of another one, here all centres of clusters or the whole surface exchanged, it
is the most that can be lost. Exact copies re-rank what the codes find, so the loss is that of rows
whose lists are not probed or whose codes rank them too low.

Every figure is recall@100 by score against the exact answer over the live rows, at the same search
parameters on both sides. Queries are further rows of the distribution that came last. ``imbalance``
is faiss's: so many times as many codes are scored per query as if all lists were of one length.

    python -m shardline.bench.index.turnover [--rows 100000] [--corpus manifold] [--nprobe 32]
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import click
import numpy as np

from shardline.bench.corpus import SEED, clusters_of
from shardline.bench.index.datasets import mnist_data
from shardline.bench.vectors import clustered, manifold
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.recall import exact_scores, recall_at_k
from shardline.shards.core.schema import EMPTY_ID, FloatArray, IdArray, Metric, normalise
from shardline.shards.index.exact import exact_top_k
from shardline.shards.index.main_index import MainIndex, set_search_threads
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexKind, IndexSpec
from shardline.shards.index.template import (
    build_shard_index,
    in_blocks,
    train_template,
    write_index,
)
from shardline.shards.live.compaction import write_index_of
from shardline.shards.live.live_rows import live_rows
from shardline.shards.live.records import Change, Delete, Record, Upsert
from shardline.shards.live.state import ShardState, apply

K = 100
QUERIES = 500
REPLACED, DELETED = 0.2, 0.1
TURNS = 4  # compactions in which all rows are replaced
LATENT = 16  # dimensions of the surface of ``manifold``
METRIC = Metric.COSINE
MNIST = Path("../shared/data/mnist784")
MNIST_STARTS = {0: 0, 2: 30_000, 3: 36_000, 4: 0}  # of the parts: each image is in one of 0, 2, 3
QUERY_PARTS = (1, 5)  # vectors that are asked; parts 0, 2, 3 and 4 are written one after the other

# (rows, part, drift) -> (rows, dim) float32 unit vectors: other ones of the same distribution for
# another part, of another distribution for another drift
Source = Callable[[int, int, int], FloatArray]


class Corpus(StrEnum):
    CLUSTERED = "clustered"
    MANIFOLD = "manifold"
    MNIST784 = "mnist784"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What was measured at one moment: ``recall`` of the shard, ``fresh`` of an index trained anew
    on its rows."""

    name: str
    rows: int
    in_delta: int
    recall: float
    fresh: float
    imbalance: float
    fresh_imbalance: float


def synthetic(corpus: Corpus, dim: int, whole: int) -> Source:
    """whole: rows of the shard."""

    def made(rows: int, part: int, drift: int) -> FloatArray:
        if corpus is Corpus.CLUSTERED:
            first_row = part * 2 * whole
            return clustered(rows, dim, clusters_of(whole), SEED + drift, first_row=first_row)
        return manifold(rows, dim, LATENT, SEED + drift, stream=part)

    return made


def mnist(folder: Path) -> Source:
    """Images as unit vectors; their mirror images are another distribution. Of 60,000 images there
    are enough for a shard of up to 26,000 rows.

    Raises: as ``mnist_data``.
    """
    data = mnist_data(folder, 2 * QUERIES)
    shuffled = data.vectors[np.random.default_rng(SEED).permutation(len(data.vectors))]

    def made(rows: int, part: int, drift: int) -> FloatArray:
        if part in QUERY_PARTS:
            start = QUERY_PARTS.index(part) * QUERIES
            chosen = data.queries[start : start + rows]
        else:
            start = MNIST_STARTS[part]
            chosen = shuffled[start : start + rows]
        images = chosen.reshape(rows, 28, 28)
        return normalise((images[:, :, ::-1] if drift else images).reshape(rows, -1))

    return made


class Catalogue:
    """A shard over ids (n,) int64, ascending, and vectors (n, dim) float32, in a folder."""

    def __init__(
        self, folder: Path, vectors: FloatArray, spec: IndexSpec, params: SearchParams
    ) -> None:
        self.ids, self.vectors = np.arange(len(vectors)), vectors
        self._folder, self._spec, self._params = folder, spec, params
        self._template = folder / "template.faiss"
        self._train(self._template)
        build_shard_index(self._template, in_blocks(vectors), self._index, threads=1)
        self.state = ShardState.of(self._loaded(), self.ids)

    def write(self, ids: IdArray, vectors: FloatArray, deleted: IdArray) -> None:
        """Upserts ids (m,) with vectors (m, dim), and deletes others."""
        order = np.argsort(ids)
        changes: list[Change] = [
            Delete(item_ids=deleted),
            Upsert(item_ids=ids[order], vectors=vectors[order], attributes=b""),
        ]
        first = self.state.seq + 1
        records = [
            Record(seq=first + number, epoch=1, key="", change=change)
            for number, change in enumerate(changes)
        ]
        self.state, _ = apply(self.state, records)
        stays = ~np.isin(self.ids, np.concatenate((ids, deleted)))
        every = np.concatenate((self.ids[stays], ids))
        order = np.argsort(every)
        self.ids = every[order]
        self.vectors = np.concatenate((self.vectors[stays], vectors))[order]

    def compact(self) -> None:
        rows = live_rows(self.state)
        write_index_of(self.state, rows, self._template, self._index, threads=1)
        self.state = ShardState.of(self._loaded(), rows.item_ids, seq=self.state.seq)

    def measure(self, name: str, queries: FloatArray) -> Line:
        """With an index trained on the live rows beside it."""
        template = self._folder / "fresh-template.faiss"
        self._train(template)
        build_shard_index(template, in_blocks(self.vectors), self._index, threads=1)
        fresh = ShardState.of(self._loaded(), self.ids)
        return Line(
            name=name,
            rows=len(self.ids),
            in_delta=self.state.delta.num_live,
            recall=self._recall(self.state, queries),
            fresh=self._recall(fresh, queries),
            imbalance=_imbalance(self.state.main),
            fresh_imbalance=_imbalance(fresh.main),
        )

    @property
    def _index(self) -> Path:
        return self._folder / "index.faiss"

    def _train(self, out: Path) -> None:
        resolved = resolve(
            self._spec, rows=len(self.vectors), dim=self.vectors.shape[1], metric=METRIC
        )
        chosen = np.random.default_rng(SEED).permutation(len(self.vectors))[: resolved.train_rows]
        sample = self.vectors[chosen]
        write_index(train_template(resolved, sample, metric=METRIC, seed=SEED, threads=1), out)

    def _loaded(self) -> MainIndex:
        return MainIndex.load(self._index, metric=METRIC, defaults=self._params)

    def _recall(self, state: ShardState, queries: FloatArray) -> float:
        exact = exact_top_k(queries, self.vectors, K, METRIC).scores
        found = state.search(queries, K, self._params).ids
        rows = np.where(found == EMPTY_ID, EMPTY_ID, np.searchsorted(self.ids, found))
        return recall_at_k(exact_scores(queries, self.vectors, rows, METRIC), exact)


def _imbalance(main: MainIndex) -> float:
    return float(main.layers.base.invlists.imbalance_factor()) if main.layers.is_ivf else 1.0


def measure(
    folder: Path, source: Source, rows: int, spec: IndexSpec, params: SearchParams
) -> list[Line]:
    """After a change of some rows, before and after its compaction; then with all rows replaced,
    by those of the same distribution and by those of another."""
    rng = np.random.default_rng(SEED)
    shard = Catalogue(folder, source(rows, 0, 0), spec, params)
    queries = source(QUERIES, QUERY_PARTS[0], 0)
    lines = [shard.measure("as built", queries)]
    chosen = rng.permutation(rows)
    replaced, deleted = np.split(chosen[: int((REPLACED + DELETED) * rows)], [int(REPLACED * rows)])
    shard.write(replaced, source(len(replaced), 2, 0), deleted)
    lines.append(shard.measure("20 % replaced, 10 % deleted", queries))
    shard.compact()
    lines.append(shard.measure("compacted", queries))
    for name, part, drift in (("all rows replaced", 3, 0), ("by another distribution", 4, 1)):
        coming, order = source(len(shard.ids), part, drift), rng.permutation(len(shard.ids))
        ids = shard.ids[order]
        for turn in range(TURNS):
            shard.write(ids[turn::TURNS], coming[turn::TURNS], np.empty(0, np.int64))
            shard.compact()
        lines.append(shard.measure(name, source(QUERIES, QUERY_PARTS[1], drift)))
    return lines


@click.command()
@click.option("--rows", default=100_000, help="Of the shard.")
@click.option("--dim", default=128, help="Of the vectors.")
@click.option("--corpus", type=click.Choice([*map(str, Corpus)]), default="clustered")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=MNIST, help="Of mnist784's files."
)
@click.option("--kind", type=click.Choice([*map(str, IndexKind)]), default="ivfpq-fs")
@click.option("--nprobe", default=16, help="Lists searched per query.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="File to write.")
def main(
    rows: int, dim: int, corpus: str, folder: Path, kind: str, nprobe: int, report: Path | None
) -> None:
    """Prints the table."""
    set_search_threads(1)
    spec, params = IndexSpec(kind=IndexKind(kind)), SearchParams(nprobe=nprobe, rerank_factor=4)
    chosen = Corpus(corpus)
    source = mnist(folder) if chosen is Corpus.MNIST784 else synthetic(chosen, dim, rows)
    with tempfile.TemporaryDirectory() as made_in:
        lines = measure(Path(made_in), source, rows, spec, params)
    click.echo(f"{corpus}, {rows:,} rows, {kind}, {params}, {QUERIES} queries, recall@{K}")
    click.echo("moment                       rows     in delta  recall  fresh   imbalance  fresh")
    for line in lines:
        click.echo(
            f"{line.name:<28} {line.rows:<8,} {line.in_delta:<9,} {line.recall:<7.4f} "
            f"{line.fresh:<7.4f} {line.imbalance:<10.2f} {line.fresh_imbalance:.2f}"
        )
    if report is not None:
        setup = {"corpus": corpus, "rows": rows, "kind": kind, "nprobe": nprobe}
        found = {"setup": setup, "lines": [asdict(line) for line in lines]}
        report.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
