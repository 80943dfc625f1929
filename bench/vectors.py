"""Synthetic corpora with a known difficulty.

Rows are made block by block, each block from its own generator, so that row i is the same whatever
part of the corpus is asked for and memory never exceeds what is kept.
"""

from collections.abc import Iterator

import numpy as np

from shardline.shards.core.schema import FloatArray, normalise

BLOCK_ROWS = 65_536
SPREAD = 0.6  # noise norm as a share of the centre's: clusters overlap, yet lists stay useful
MANIFOLD_HIDDEN = 64


def clustered(rows: int, dim: int, clusters: int, seed: int, *, first_row: int = 0) -> FloatArray:
    """(rows, dim) float32 unit vectors scattered around ``clusters`` random centres.

    ``first_row`` moves along the same endless corpus: rows beyond those indexed make good queries,
    because they come from the same clusters.
    """
    out = np.empty((rows, dim), dtype=np.float32)
    at = 0
    for block in clustered_blocks(rows, dim, clusters, seed, first_row=first_row):
        out[at : at + len(block)] = block
        at += len(block)
    return out


def clustered_blocks(
    rows: int, dim: int, clusters: int, seed: int, *, first_row: int = 0
) -> Iterator[FloatArray]:
    """The vectors of ``clustered`` as successive (m, dim) float32 blocks, m <= BLOCK_ROWS."""
    centres = normalise(_gaussian((seed, 0), (clusters, dim)))
    last_row = first_row + rows
    for number in range(first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS)):
        start = number * BLOCK_ROWS
        rng = np.random.default_rng((seed, 1, number))
        chosen = rng.integers(clusters, size=BLOCK_ROWS)
        noise = rng.standard_normal((BLOCK_ROWS, dim), dtype=np.float32)
        noise *= np.float32(SPREAD / np.sqrt(dim))
        block = normalise(centres[chosen] + noise)
        yield block[max(first_row - start, 0) : last_row - start]


def manifold(rows: int, dim: int, latent: int, seed: int, *, stream: int = 0) -> FloatArray:
    """(rows, dim) float32 unit vectors on a smooth ``latent``-dimensional surface, no clusters.

    The shape of a trained tower's output: a random two-layer network over Gaussian attributes.
    Another ``stream`` draws other rows of the same surface, for use as queries.
    """
    first = _gaussian((seed, 0), (latent, MANIFOLD_HIDDEN)) / np.float32(np.sqrt(latent))
    second = _gaussian((seed, 1), (MANIFOLD_HIDDEN, dim)) / np.float32(np.sqrt(MANIFOLD_HIDDEN))
    attributes = _gaussian((seed, 2, stream), (rows, latent))
    return normalise(np.tanh(attributes @ first) @ second)


def _gaussian(seed: tuple[int, ...], shape: tuple[int, int]) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
