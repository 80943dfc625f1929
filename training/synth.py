"""Synthetic data: users who pick items in proportion to exp(sharpness x noisy affinity).

User u has a hidden interest vector and item i an attribute vector, both standard normal. The
affinity is their dot product plus ``noise`` x N(0, 1), drawn afresh for each pair; u's items are
drawn one after the other, without replacement, with p proportional to exp(sharpness x affinity).

How it is drawn. Drawing without replacement is a race: item i arrives after a waiting time with
rate w_i exp(c N_i), where w_i = exp(sharpness a_i . u) and c = sharpness x noise, and the first
n arrivals are the sample (Efraimidis and Spirakis 2006). Seen without N_i, item i has the hazard

    h_i(t) = w_i r(t w_i),   r(x) = E[exp(c N - x e^(c N))] / E[exp(-x e^(c N))],

which only falls with t. So arrivals come from a Poisson process with the constant rates
h_i(t0) >= h_i(t), thinned by h_i(t) / h_i(t0) (Lewis and Shedler 1979): exact, yet one user costs
one exponential per item and a few dozen random numbers, instead of two random numbers per item.
Taken items leave the race, and a user still short of n starts a new round at the time reached.

Every block of users has its own random stream, so a seed gives the same files whatever the number
of threads.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shards.schema import FloatArray, IdArray
from training.ceilings import HiddenModel, measure_ceilings
from training.metrics import Progress
from training.splits import split_codes
from training.tables import (
    Dataset,
    dataset_writer,
    interaction_batch,
    open_dataset,
    vector_column,
)

DIM = 10  # of interest and attribute vectors
END_OF_TIME = 1_000_000  # timestamps are below
BLOCK_USERS = 256  # users of one random stream
BLOCK_WEIGHTS = 1 << 23  # float32 weights in memory at a time and thread, 32 MiB
ROUND_POINTS = 64  # arrivals drawn per user and round; 20 distinct items rarely need a second
CHUNK = 64  # items summed together, so that an arrival searches 64 weights and not all

Observed = Literal["attributes", "interests"]
Float64Array = NDArray[np.float64]


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


@dataclass(frozen=True, slots=True)
class Hazard:
    """log of h_i(t) / w_i as a function of log(t w_i), by table; constant when noise is 0."""

    grid: Float64Array
    log_ratio: Float64Array

    def __call__(self, log_x: Float64Array) -> Float64Array:
        return np.interp(log_x, self.grid, self.log_ratio)

    @property
    def at_start(self) -> float:
        """At t = 0, where it is largest: c^2 / 2."""
        return float(self.log_ratio[0])


def noise_hazard(c: float) -> Hazard:
    """The log hazard ratio of weights multiplied by exp(c N(0, 1)).

    Trapezoidal quadrature over N in [-40, 40]; the grid spans from where the ratio equals its limit
    exp(c^2 / 2) to 1e-7 to where no item is still waiting.
    """
    if c == 0:
        return Hazard(np.zeros(1), np.zeros(1))
    grid = np.linspace(-c * (c + 8.0) - 16.0, 6.0 * c + 6.0, 2000)
    normal = np.linspace(-40.0, 40.0, 1601)
    late = -0.5 * normal**2 - np.exp(grid[:, None] + c * normal)
    peak = late.max(axis=1, keepdims=True)
    waiting = np.exp(late - peak)
    ratio = (waiting * np.exp(c * normal)).sum(axis=1) / waiting.sum(axis=1)
    return Hazard(grid, np.log(ratio))


def draw_items(
    log_weights: FloatArray, count: int, hazard: Hazard, rng: np.random.Generator
) -> IdArray:
    """(n, count) int64: for each row of log weights (n, m), ``count`` items without replacement.

    In order of arrival. log_weights is overwritten.
    """
    picked = np.full((len(log_weights), count), -1, dtype=np.int64)
    have = np.zeros(len(log_weights), dtype=np.int64)
    peaks = log_weights.max(axis=1)
    log_weights -= peaks[:, None]  # time runs in units of 1 / the largest weight
    with np.errstate(under="ignore"):
        weights = np.exp(log_weights)
    items, waits = _arrivals(weights, rng)
    times = np.cumsum(waits, axis=1) * np.exp(-hazard.at_start)
    start = np.full(len(times), -np.inf)
    active = np.arange(len(log_weights))
    while True:
        logs = log_weights[active[:, None], items].astype(np.float64)
        log_ratio = hazard(np.log(times) + logs) - hazard(start[:, None] + logs)
        accepted = rng.random(items.shape) < np.exp(log_ratio)
        _take_new(items, accepted, picked, have, active)
        short = have[active] < count
        active, start = active[short], np.log(times[short, -1])
        if not len(active):
            return picked
        items, times = _next_round(log_weights, picked, active, start, hazard, rng)


def _next_round(
    log_weights: FloatArray,
    picked: IdArray,
    active: IdArray,
    start: Float64Array,
    hazard: Hazard,
    rng: np.random.Generator,
) -> tuple[IdArray, Float64Array]:
    """Arrivals of the users still short of items, at the rates that hold from ``start`` on."""
    logs = log_weights[active].astype(np.float64)
    rows, slots = np.nonzero(picked[active] >= 0)
    logs[rows, picked[active][rows, slots]] = -np.inf
    rates = logs + hazard(start[:, None] + logs)
    peaks = rates.max(axis=1, keepdims=True)
    items, waits = _arrivals(np.exp(rates - peaks), rng)
    return items, np.exp(start)[:, None] + np.cumsum(waits, axis=1) * np.exp(-peaks)


def _arrivals(
    weights: NDArray[np.floating[Any]], rng: np.random.Generator
) -> tuple[IdArray, Float64Array]:
    """(n, p) int64 items drawn with replacement, and the waiting time before each."""
    rows, count = weights.shape
    points = (rows, ROUND_POINTS)
    size = min(CHUNK, count)
    starts = np.arange(0, count, size)
    bounds = np.cumsum(np.add.reduceat(weights, starts, axis=1), axis=1, dtype=np.float64)
    totals = bounds[:, -1:]
    # one search for all rows: row r owns the interval [r, r + 1)
    edges = (bounds / totals + np.arange(rows)[:, None]).ravel()
    found = np.searchsorted(edges, (rng.random(points) + np.arange(rows)[:, None]).ravel(), "right")
    chunk = np.minimum(
        found.reshape(points) - np.arange(rows)[:, None] * len(starts), len(starts) - 1
    )
    columns = chunk[:, :, None] * size + np.arange(size)
    inside = weights[np.arange(rows)[:, None, None], np.minimum(columns, count - 1)]
    inside = np.cumsum(np.where(columns < count, inside, 0), axis=2, dtype=np.float64)
    target = rng.random(points) * inside[:, :, -1]
    items = chunk * size + (inside <= target[:, :, None]).sum(axis=2)
    return np.minimum(items, count - 1), rng.standard_exponential(points) / totals


def _take_new(
    items: IdArray,
    accepted: NDArray[np.bool_],
    picked: IdArray,
    have: IdArray,
    active: IdArray,
) -> None:
    """Adds each user's accepted arrivals to ``picked``: first ones, in order, until it is full."""
    width = items.shape[1]
    keys = np.where(accepted, items, -1 - np.arange(width))  # a rejected arrival equals no other
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    fresh = np.ones(items.shape, dtype=np.bool_)
    repeats = np.zeros(items.shape, dtype=np.bool_)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    np.put_along_axis(fresh, order, ~repeats, axis=1)
    fresh &= accepted
    slots = have[active][:, None] + np.cumsum(fresh, axis=1) - 1
    fresh &= slots < picked.shape[1]
    rows, columns = np.nonzero(fresh)
    picked[active[rows], slots[rows, columns]] = items[rows, columns]
    have[active] += fresh.sum(axis=1)


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
    user_seed, item_seed, sample_seed, *block_seeds = np.random.SeedSequence(config.seed).spawn(
        3 + -(-config.num_users // BLOCK_USERS)
    )
    users, interests = _users(config, np.random.default_rng(user_seed))
    items, attributes = _items(config, np.random.default_rng(item_seed))
    sample = np.random.default_rng(sample_seed)
    val_ids = _sample(config.num_users, config.val_users, sample)
    watched = _sample(config.num_users, config.ceiling_users, sample)
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
