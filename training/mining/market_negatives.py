"""Hard negatives for an item-to-item model: other items of the item's own market.

Clicks of a session are nearly always in one market, so that negatives from everywhere teach markets
and little else (Grbovic & Cheng, KDD 2018, section 3.2). The lists go the way of mined negatives:
``train --hard`` with ``loss.hard_negatives``.
"""

import numpy as np
import pyarrow as pa

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import EMPTY_ID, EMPTY_SCORE, IdArray
from shardline.training.config.training_config import MiningConfig
from shardline.training.data.session_import import check_market
from shardline.training.data.tables import Dataset
from shardline.training.features.tied import own_items, with_own
from shardline.training.mining.candidates import Mined
from shardline.training.mining.hard_negatives import Origin


def market_negatives(dataset: Dataset, column: str, *, per_item: int, seed: int) -> Mined:
    """Of each user with something in train, who is an item, up to ``per_item`` random items that
    have the same value of the items' ``column``: not itself, nor its partners of train.

    An item without a market, or alone in it, has none.

    Raises:
        InvalidInput: no such column of items, or per_item < 1.
    """
    items = dataset.items()
    check_market(items, column)
    if per_item < 1:
        raise InvalidInput("out of range", field="per_item", expected=">= 1", got=str(per_item))
    markets = items[column].combine_chunks()
    if not pa.types.is_dictionary(markets.type):
        markets = markets.dictionary_encode()
    codes = markets.indices.fill_null(-1).to_numpy()
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(markets.dictionary) + 1))
    own, train = own_items(dataset), dataset.positives("train")
    users = np.flatnonzero(train.lengths)
    known = with_own(train, own).take(users)
    found = np.full((len(users), per_item), EMPTY_ID, dtype=np.int64)
    for place, user in enumerate(users):
        market = codes[own[user]] if own[user] >= 0 else -1
        if market < 0:
            continue
        others = order[bounds[market] : bounds[market + 1]]
        mine = known.items[known.indptr[place] : known.indptr[place + 1]]
        drawn = _drawn(others, mine, per_item, np.random.default_rng([seed, int(user)]))
        found[place, : len(drawn)] = drawn
    scores = np.where(found == EMPTY_ID, EMPTY_SCORE, 0.0).astype(np.float32)
    return Mined(users=users, items=found, scores=scores)


def market_origin(column: str, *, per_item: int, seed: int, created_at: str) -> Origin:
    """What the table says of itself: a market is no model."""
    return Origin(
        model_version=f"same {column}",
        fit_splits="train",
        generation=None,
        config=MiningConfig(per_user=per_item, range_max=max(100, per_item)),
        seed=seed,
        created_at=created_at,
    )


def _drawn(others: IdArray, known: IdArray, most: int, rng: np.random.Generator) -> IdArray:
    """Up to ``most`` of the others that are not known, without repetition."""
    # enough for as many as are wanted to be left, without looking at the whole market
    number = min(len(others), most + len(known))
    drawn = others[rng.choice(len(others), number, replace=False)]
    return drawn[~np.isin(drawn, known)][:most]
