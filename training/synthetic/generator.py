"""Synthetic data: users who pick items in proportion to exp(sharpness x noisy affinity).

User u has a hidden interest vector and item i an attribute vector, both standard normal. The
affinity is their dot product plus ``noise`` x N(0, 1), drawn afresh for each pair; u's items are
drawn one after the other, without replacement, with p proportional to exp(sharpness x affinity).
``training.synthetic.race`` does it, with w_i = exp(sharpness a_i . u) and c = sharpness x noise.

Every block of users has its own random stream, so a seed gives the same files whatever the number
of threads.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shardline.shards.core.files import write_manifest
from shardline.shards.core.progress import Progress
from shardline.shards.core.schema import FloatArray, IdArray
from shardline.training.data.splits import split_codes
from shardline.training.data.table_writer import dataset_writer, interaction_batch
from shardline.training.data.tables import (
    KIND,
    VERSION,
    Dataset,
    open_dataset,
    vector_column,
)
from shardline.training.synthetic.ceilings import HiddenModel, measure_ceilings
from shardline.training.synthetic.race import draw_items, noise_hazard

DIM = 10  # of interest and attribute vectors
END_OF_TIME = 1_000_000  # timestamps are below
BLOCK_USERS = 256  # users of one random stream
BLOCK_WEIGHTS = 1 << 23  # float32 weights in memory at a time and thread, 32 MiB

Observed = Literal["attributes", "interests"]


class SynthConfig(BaseModel):
    """What to generate. The defaults are the preset ``seed``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_users: int = Field(default=10_000, ge=1, description="users")
    num_items: int = Field(default=100_000, ge=1, description="items")
    interactions_per_user: int = Field(default=20, ge=1, description="different items per user")
    sharpness: float = Field(
        default=1.0, ge=0, le=8, description="how strongly affinity decides; 0 draws uniformly"
    )
    noise: float = Field(default=0.5, ge=0, description="std of the noise on each pair's affinity")
    seed: int = Field(default=42, ge=0, description="same seed, same files")
    test_per_user: int = Field(default=4, ge=0, description="last interactions of a user held out")
    val_users: int = Field(
        default=2000, ge=0, description="users whose last train interaction is val"
    )
    observe: tuple[Observed, ...] = Field(
        default=("attributes",), description="hidden vectors written as feature columns"
    )
    ceiling_users: int = Field(
        default=10_000, ge=0, description="users the ceilings are measured on; 0 leaves them out"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SynthConfig":
        if self.interactions_per_user > self.num_items:
            raise ValueError("interactions_per_user must not exceed num_items")
        if self.sharpness * self.noise > 4:
            raise ValueError("sharpness x noise must not exceed 4: noise would decide alone")
        return self


PRESETS: dict[str, SynthConfig] = {
    "seed": SynthConfig(sharpness=1.0, noise=0.5),
    "sharp": SynthConfig(sharpness=1.5, noise=0.25),
}


def generate(
    config: SynthConfig,
    target: Path,
    *,
    threads: int = 2,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Writes a dataset folder with its ceilings; memory is bounded by the tables of ids.

    Raises:
        DataError: the target exists and ``overwrite`` is not set.
    """
    user_seed, item_seed, sample_seed, *block_seeds = _seeds(config)
    users, interests = _users(config, np.random.default_rng(user_seed))
    items, attributes = _items(config, np.random.default_rng(item_seed))
    val_ids, watched = _sampled(config, np.random.default_rng(sample_seed))
    seen: list[IdArray] = []  # item rows of watched users, in order of time

    def batches() -> Iterator[pa.RecordBatch]:
        for start, block in _blocks(config, interests, attributes, block_seeds, threads):
            ids = np.arange(start, start + len(block.items))
            seen.append(block.items[np.isin(ids, watched)])
            yield _batch(config, np.repeat(ids, block.items.shape[1]), block, val_ids)
            if progress:
                progress("interactions", int(ids[-1]) + 1, config.num_users)

    parameters = {"generator": "synth", **config.model_dump(mode="json")}
    with dataset_writer(
        target, name="synthetic", parameters=parameters, overwrite=overwrite
    ) as writer:
        writer.users(users)
        writer.items(items)
        writer.interactions(batches())
        writer.oracle({"interest_vector": interests, "attribute_vector": attributes})
        train = config.interactions_per_user - config.test_per_user
        if len(watched) and config.test_per_user and train > 0:
            model = HiddenModel(interests[watched], attributes, config.sharpness)
            known, held_out = np.split(np.concatenate(seen), [train], axis=1)
            writer.ceilings = measure_ceilings(model, known, held_out, progress=progress)
    return open_dataset(target, verify=False)


def add_ceilings(dataset: Dataset, users: int, *, progress: Progress | None = None) -> Dataset:
    """The data set, generated without ceilings, with those of so many of its users.

    They are what ``generate`` would have given it.
    """
    told = dict(dataset.manifest["parameters"])
    config = SynthConfig.model_validate(
        {name: value for name, value in told.items() if name != "generator"}
        | {"ceiling_users": users}
    )
    _, watched = _sampled(config, np.random.default_rng(_seeds(config)[2]))
    hidden = dataset.oracle()
    assert hidden is not None
    model = HiddenModel(
        hidden["interest_vector"][watched], hidden["attribute_vector"], config.sharpness
    )
    known, held_out = (
        dataset.positives(*splits).take(watched).items.reshape(len(watched), -1)
        for splits in (("train", "val"), ("test",))
    )
    body = dataset.manifest | {
        "ceilings": measure_ceilings(model, known, held_out, progress=progress),
        "parameters": told | config.model_dump(mode="json"),
    }
    write_manifest(
        dataset.path,
        kind=KIND,
        version=VERSION,
        body={name: body[name] for name in ("name", "rows", "ceilings", "parameters", "files")},
    )
    return open_dataset(dataset.path, verify=False)


def _seeds(config: SynthConfig) -> list[np.random.SeedSequence]:
    """Those of users, items and samples, then one per block of users."""
    blocks = -(-config.num_users // BLOCK_USERS)
    return np.random.SeedSequence(config.seed).spawn(3 + blocks)


def _sampled(config: SynthConfig, rng: np.random.Generator) -> tuple[IdArray, IdArray]:
    """The users who have a val item, and those whom ceilings are measured on."""
    val_ids = _sample(config.num_users, config.val_users, rng)
    return val_ids, _sample(config.num_users, config.ceiling_users, rng)


def _sample(population: int, size: int, rng: np.random.Generator) -> IdArray:
    """(min(size, population),) int64, ascending."""
    return np.sort(rng.choice(population, min(size, population), replace=False))


@dataclass(frozen=True, slots=True)
class _Block:
    """Both (users, n) int64, each row ascending by (timestamp, item)."""

    items: IdArray
    times: IdArray


def _blocks(
    config: SynthConfig,
    interests: FloatArray,
    attributes: FloatArray,
    seeds: list[np.random.SeedSequence],
    threads: int,
) -> Iterator[tuple[int, _Block]]:
    """(first user, interactions) of each block of users in order; at most ``threads`` ahead."""
    hazard = noise_hazard(config.sharpness * config.noise)
    scaled = np.ascontiguousarray(attributes.T) * np.float32(config.sharpness)
    count = config.interactions_per_user
    step = max(1, BLOCK_WEIGHTS // config.num_items)

    def work(number: int) -> _Block:
        rng = np.random.default_rng(seeds[number])
        mine = interests[number * BLOCK_USERS : (number + 1) * BLOCK_USERS]
        parts = [
            draw_items(mine[at : at + step] @ scaled, count, hazard, rng)
            for at in range(0, len(mine), step)
        ]
        items = np.concatenate(parts)
        times = rng.integers(0, END_OF_TIME, items.shape)
        order = np.lexsort((items, times), axis=1)
        return _Block(
            np.take_along_axis(items, order, axis=1), np.take_along_axis(times, order, axis=1)
        )

    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(seeds), threads):
            numbers = range(first, min(first + threads, len(seeds)))
            for number, block in zip(numbers, pool.map(work, numbers), strict=True):
                yield number * BLOCK_USERS, block


def _batch(config: SynthConfig, users: IdArray, block: _Block, val_ids: IdArray) -> pa.RecordBatch:
    items, times = block.items.ravel(), block.times.ravel()
    codes = split_codes(users, items, times, test_per_user=config.test_per_user, val_ids=val_ids)
    return interaction_batch(users, items, times, codes)


def _users(config: SynthConfig, rng: np.random.Generator) -> tuple[pa.Table, FloatArray]:
    n = config.num_users
    columns = {
        "user_id": pa.array(np.arange(n)),
        "age": pa.array(rng.integers(18, 70, n), pa.int32()),
        "gender": pa.array(rng.choice(["M", "F", "O"], n)),
        "country": pa.array(rng.choice(["US", "UK", "CA", "AU"], n)),
    }
    interests = rng.standard_normal((n, DIM), dtype=np.float32)
    if "interests" in config.observe:
        columns["interest_vector"] = vector_column(interests)
    return pa.table(columns), interests


def _items(config: SynthConfig, rng: np.random.Generator) -> tuple[pa.Table, FloatArray]:
    n = config.num_items
    columns = {
        "item_id": pa.array(np.arange(n)),
        "category": pa.array(rng.integers(0, 20, n), pa.int32()),
        "price": pa.array(rng.exponential(30.0, n), pa.float32()),
        "rating": pa.array(rng.uniform(1.0, 5.0, n), pa.float32()),
    }
    attributes = rng.standard_normal((n, DIM), dtype=np.float32)
    if "attributes" in config.observe:
        columns["attribute_vector"] = vector_column(attributes)
    return pa.table(columns), attributes
