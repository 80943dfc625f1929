"""Vectors of texts by a transformer, computed once and kept as a vector column of a data set.

Needs the extra ``text`` and a model in a local folder, as ``save_pretrained`` writes it; nothing is
fetched from anywhere and no code of the model's is run. Serving never runs the transformer: the
column is a numeric feature, of the item tower as a rule, since a query would have to bring its
vector along. Texts of queries are for the hashed n-grams of ``training.features.columns``.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from shardline.shards.core.errors import ConfigError, DataError, NotFound
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import ITEM_TO_ITEM, ITEMS, Dataset, vector_column
from shardline.training.features.columns import column_of, strings

TEXTS_PER_BATCH = 64
MAX_TOKENS = 128  # of a text; attention costs their square, and titles are short


class TextEncoder:
    """A transformer from a folder; mean of its last layer over a text's tokens."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises NotFound without a model there, ConfigError without the ``text`` extra."""
        if not (folder / "config.json").is_file():
            raise NotFound(
                f"{folder}: no model here",
                expected="config.json, model.safetensors and the tokenizer's files",
                hint="copy a model into a local folder; none is downloaded",
            )
        library = _transformers()
        try:
            self._tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = library.AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise NotFound(f"{folder}: not a model that can be loaded", got=str(error)) from error
        self._model = model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> FloatArray:
        """(n, width) float32, in order. Progress stage: ``texts``."""
        parts = [np.empty((0, self._model.config.hidden_size), np.float32)]
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = list(texts[start : start + TEXTS_PER_BATCH])
            tokens = self._tokenizer(
                batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self._device)
            states: Tensor = self._model(**tokens).last_hidden_state
            weights = tokens["attention_mask"][:, :, None].to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
            parts.append(mean.float().cpu().numpy())
            if progress is not None:
                progress("texts", start + len(batch), len(texts))
        return np.concatenate(parts)


def embed_items(
    dataset: Dataset,
    target: Path,
    *,
    column: str,
    name: str,
    model: Path,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Writes the data set to ``target`` with a vector column ``name`` of the items' texts, of users
    who are items too.

    Raises:
        DataError: ``column`` is missing or no text, or there is a column ``name`` already.
        NotFound, ConfigError: as ``TextEncoder``.
    """
    items = dataset.items()
    texts = strings(column_of(items, column, ITEMS), ITEMS, column)
    if name in items.column_names:
        raise DataError(
            "column occurs twice", field=f"{ITEMS}: {name}", hint="--name gives it another name"
        )
    vectors = TextEncoder(model, device).encode(texts.to_pylist(), progress)
    embedded = pa.chunked_array([vector_column(vectors)])
    users = dataset.users()
    parameters: dict[str, Any] = {"text_column": column, "text_model": model.name}
    if dataset.item_to_item:  # its users are its items, row by row
        users = users.append_column(name, embedded)
        parameters[ITEM_TO_ITEM] = True
    return write_dataset(
        target,
        users,
        items.append_column(name, embedded),
        dataset.interactions(),
        name=dataset.name,
        ceilings=dataset.ceilings,
        parameters=parameters,
        cut=dataset.cut,
        overwrite=overwrite,
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the transformers library is not installed",
            expected='the extra "text"',
            hint="pip install 'shardline[text]', or use a text feature, which hashes n-grams",
        ) from error
