"""Whole tables through the trained towers, in blocks, without gradient."""

import numpy as np
import torch

from shardline.shards.core.schema import FloatArray
from shardline.training import gather
from shardline.training.data.csr import Csr
from shardline.training.features.fitted import Block
from shardline.training.model.towers import Inputs, QueryInputs, TwoTower

BLOCK_ROWS = 8192  # rows encoded at a time; bounds the activations to some tens of MB
SHARED_ROWS = 1024  # of a block that one rank encodes; small, so that the ranks' shares are even


@torch.no_grad()
def encode_items(model: TwoTower, items: Block) -> FloatArray:
    """(n, dim) float32, of length one under cosine, in the order of the rows."""
    device = model.log_temperature.device
    parts = [model.encode_items(Inputs.of(block, device)).cpu().numpy() for block in _blocks(items)]
    return np.concatenate([np.empty((0, model.dim), np.float32), *parts])


def encode_items_sharded(model: TwoTower, items: Block) -> FloatArray:
    """``encode_items`` on every rank, of which each has encoded its share; a collective.

    A rank takes every W-th block of rows. The blocks are the same for any number of ranks, because
    the rounding of a matrix product depends on its shape.
    """
    starts = range(0, len(items), SHARED_ROWS)
    share = -(-len(starts) // gather.world_size())
    local = torch.zeros((share, SHARED_ROWS, model.dim))
    for place, start in enumerate(starts[gather.rank() :: gather.world_size()]):
        rows = np.arange(start, min(start + SHARED_ROWS, len(items)))
        local[place, : len(rows)] = torch.from_numpy(encode_items(model, items.take(rows)))
    gathered = gather.gather_interleaved(local.to(model.log_temperature.device)).cpu()
    vectors: FloatArray = gathered.reshape(-1, model.dim)[: len(items)].numpy()
    return vectors


@torch.no_grad()
def encode_queries(model: TwoTower, users: Block, history: Csr, items: Block) -> FloatArray:
    """(n, dim) float32, of length one under cosine. history: item rows of each user, oldest first.

    Only the newest items that the model's history takes are used.
    """
    items = items.alone()
    parts = []
    for start in range(0, len(users), BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, len(users)))
        past = history.take(rows, model.history_length)
        inputs = QueryInputs.of(
            users.take(rows), items.take(past.items), past.lengths, model.log_temperature.device
        )
        parts.append(model.encode_queries(inputs).cpu().numpy())
    return np.concatenate([np.empty((0, model.dim), np.float32), *parts])


def _blocks(block: Block) -> list[Block]:
    starts = range(0, len(block), BLOCK_ROWS)
    return [block.take(np.arange(s, min(s + BLOCK_ROWS, len(block)))) for s in starts]
