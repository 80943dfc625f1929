"""How much a build is about to write, from what is known before it."""

from pathlib import Path

from shardline.shards.index.spec import ResolvedIndex
from shardline.shards.index.template import bytes_to_come
from shardline.shards.storage.embedding_set import EmbeddingSet

ID_BYTES = 8
FLOAT_BYTES = 4
ROW_NUMBER_BYTES = 16  # what graphs and lists keep per row besides links and codes


def build_bytes(corpus: EmbeddingSet, index: ResolvedIndex, num_shards: int) -> int:
    """The most that a generation and the rows on their way to its shards take at once.

    The rows are copied to a file per shard, each removed once its shard is built.
    """
    copied = sum(file.bytes for file in corpus.files)
    plain_bytes = corpus.rows * (FLOAT_BYTES * corpus.dim + ID_BYTES)
    attributes = max(0, copied - plain_bytes)
    per_row = bytes_to_come(index, dim=corpus.dim, metric=corpus.metric) + ID_BYTES
    if index.nlist or index.ef_construction:
        per_row += ROW_NUMBER_BYTES
    centroids = (index.nlist or 0) * corpus.dim * FLOAT_BYTES * (num_shards + 1)
    copied_whole = (corpus.encoder_folder, corpus.item_encoder_folder, corpus.queries_file)
    beside = sum(map(_size, copied_whole))
    return int(copied + attributes + corpus.rows * per_row + centroids + beside)


def _size(path: Path | None) -> int:
    """Of a file, or of every file below a folder; None: nothing."""
    if path is None:
        return 0
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in paths if each.is_file())
