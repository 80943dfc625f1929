"""From the best checkpoint of a run to an embedding set with the encoders of queries and items.

``<store>/embeddings/<model_version>/``: every catalogue item's vector and attributes, sample
queries, and both towers as plain arrays (``training.exported_towers``). The version is a hash
of weights, features, configuration and catalogue: the same export twice has the same name, and a
catalogue that changed gets a set, and a query encoder with its histories, of its own. It need not
be the one trained on, as long as it has the feature columns.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from shardline.shards.core.encoder_files import (
    ITEM_ENCODER_FOLDER,
    QUERY_ENCODER_FOLDER,
    MappedArrays,
)
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray
from shardline.shards.storage.embedding_set import (
    EmbeddingSet,
    EmbeddingWriter,
    embedding_writer,
    open_embedding_set,
)
from shardline.shards.storage.vector_files import MAX_SAMPLE_QUERIES
from shardline.training.data.csr import Csr
from shardline.training.data.tables import INTERACTIONS, ITEMS, USERS, Dataset, open_dataset
from shardline.training.evaluation.user_queries import KNOWN_BEFORE, SAMPLE_SEED, sample_users
from shardline.training.exported_towers import (
    TiedTower,
    audience_rows,
    export_item_encoder,
    export_query_encoder,
    history_rows,
)
from shardline.training.features.item_inputs import audience_of
from shardline.training.model.checkpoint import Run, load_best
from shardline.training.model.encoding import BLOCK_ROWS, encode_items, encode_queries
from shardline.training.model.popularity import lengths_of, metric_of
from shardline.training.model.towers import TwoTower

VERSION_DIGITS = 12
EXPORT_FORMAT = 2  # 1 had no item encoder; raised, the same model is exported anew
CUT_OFF = "-unfinished"  # ends the version of a model whose training has not ended


def export(
    run_folder: Path,
    data_folder: Path,
    store: Path,
    *,
    created_at: str,
    unfinished: bool = False,
    progress: Progress | None = None,
) -> EmbeddingSet:
    """Writes the embedding set of the run's best model, or returns it if it is there already.

    created_at: ISO 8601 time, for the manifest. unfinished: also of a training that has not ended,
    which its version then says. Progress stage: ``export``.

    Raises:
        NotFound: no trained run, or no dataset. DataError: the training has not ended, or the
            items lack a feature column.
    """
    run, model = load_best(run_folder, unfinished=unfinished)
    dataset = open_dataset(data_folder, keep=True)
    version = model_version(run, model, dataset)
    target = store / "embeddings" / version
    if target.exists():
        return open_embedding_set(target, version=version)
    exponent = run.config.popularity_exponent
    with embedding_writer(
        target,
        model_version=version,
        dim=model.dim,
        metric=metric_of(exponent, run.config.metric),
        created_at=created_at,
        cut=dataset.cut,
    ) as writer:
        for name in (QUERY_ENCODER_FOLDER, ITEM_ENCODER_FOLDER):
            (writer.folder / name).mkdir()
        _export_items(run, model, dataset, writer, progress)
        export_query_encoder(
            run, model, version, writer.folder / QUERY_ENCODER_FOLDER, dataset.text_encoders
        )
        columns = dataset.items().schema.remove(0)
        export_item_encoder(run, model, version, columns, writer.folder / ITEM_ENCODER_FOLDER)
        queries = sample_queries(run, model, dataset)
        if len(queries):
            writer.queries(queries)
    return open_embedding_set(target, verify=False)


def model_version(run: Run, model: TwoTower, dataset: Dataset) -> str:
    """Twelve hex digits over weights, features, configuration and the items table.

    After them "-unfinished" where training has not ended: the name goes into the embedding set,
    the generation and every answer.
    """
    digest = hashlib.sha256()
    declared = {
        "format": EXPORT_FORMAT,
        "config": run.config.identity(),
        "space": run.space.to_json(),
        "items": dataset.checksum(ITEMS),
    }
    if run.config.popularity_exponent or run.space.audience is not None:
        declared["interactions"] = dataset.checksum(INTERACTIONS)
    if dataset.text_encoders:  # which router may serve it
        declared["text_encoders"] = dataset.text_encoders
    digest.update(json.dumps(declared, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()[:VERSION_DIGITS] + (CUT_OFF if run.cut_off else "")


def _export_items(
    run: Run, model: TwoTower, dataset: Dataset, writer: EmbeddingWriter, progress: Progress | None
) -> None:
    """Vector and attributes of every item and, for the encoders, its row of a history, its length
    and what its tower reads of its users.

    A block at a time: what is computed is never in memory as a whole.
    """
    items = dataset.items()
    lengths = lengths_of(dataset, run.config.fitted_splits, run.config.popularity_exponent)
    history = MappedArrays(writer.folder / QUERY_ENCODER_FOLDER, items.num_rows)
    popularity = MappedArrays(writer.folder / ITEM_ENCODER_FOLDER, items.num_rows)
    tied = TiedTower(model) if model.tied else None
    audiences = audience_of(run.space, dataset, run.config.fitted_splits)
    audience = MappedArrays(writer.folder / ITEM_ENCODER_FOLDER, items.num_rows)
    for start in range(0, items.num_rows, BLOCK_ROWS):
        table = items.slice(start, BLOCK_ROWS).combine_chunks()
        ids, block = table["item_id"].to_numpy(), run.space.item.encode(table, ITEMS)
        if audiences is not None:
            block = replace(block, audience=audiences.take(np.arange(start, start + len(block))))
            audience.write(start, {"audience.item_ids": ids, **audience_rows(model, block)})
        longer = lengths[start : start + len(block)]
        vectors = tied(block) if tied else encode_items(model, block) * longer[:, None]
        attributes = table.drop_columns(["item_id"]).to_batches()
        writer.append(ids, vectors, attributes[0] if attributes else None)
        if run.space.history is not None:
            history.write(start, {"history.item_ids": ids, **history_rows(model, block)})
        if run.config.popularity_exponent:
            popularity.write(start, {"popularity.item_ids": ids, "popularity.lengths": longer})
        if progress is not None:
            progress("export", start + len(block), items.num_rows)


@torch.no_grad()
def sample_queries(run: Run, model: TwoTower, dataset: Dataset) -> FloatArray:
    """(n, dim) float32 outputs of the query tower for at most MAX_SAMPLE_QUERIES validation users.

    Their history is train, so test plays no part. The same users at every call; none where nobody
    has a validation item.
    """
    users = np.flatnonzero(dataset.positives("val").lengths)
    if not len(users):
        return np.empty((0, model.dim), np.float32)
    users = sample_users(users, MAX_SAMPLE_QUERIES, np.random.default_rng(SAMPLE_SEED))
    past = dataset.positives(*KNOWN_BEFORE["val"]).take(users, model.history_length)
    seen, places = np.unique(past.items, return_inverse=True)  # a small part of a large catalogue
    items = run.space.item.encode(dataset.items().take(pa.array(seen)).combine_chunks(), ITEMS)
    inputs = run.space.query.encode(dataset.users().take(pa.array(users)).combine_chunks(), USERS)
    return encode_queries(model, inputs, Csr(past.indptr, places.astype(np.int64)), items)
