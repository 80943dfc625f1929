"""Recall on the val split while a model trains, shared by the ranks."""

import numpy as np
import torch
import torch.distributed as dist

from shardline.training import gather
from shardline.training.config.training_config import TrainingConfig
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.evaluation.ranking_metrics import score_lists
from shardline.training.evaluation.user_queries import sample_users
from shardline.training.loop.batches import Sampler
from shardline.training.model.encoding import encode_items_sharded, encode_queries
from shardline.training.model.popularity import item_lengths
from shardline.training.model.towers import TwoTower


def validation_recall(model: TwoTower, sampler: Sampler, config: TrainingConfig) -> float:
    """Recall@k on the val split over the whole corpus, train items left out of the ranking.

    The users are the same each time; every rank embeds its share of the items and ranks its share
    of the users.
    """
    data, settings = sampler.data, config.validation
    users = np.flatnonzero(data.val.lengths)
    rng = np.random.default_rng([config.seed, settings.max_users])
    users = sample_users(users, settings.max_users, rng)[sampler.rank :: sampler.world]
    model.eval()
    train = data.train.take(users)
    queries = encode_queries(model, data.users.take(users), train, data.items)
    vectors = encode_items_sharded(model, data.items)  # a rank without users takes part in it too
    vectors = vectors * item_lengths(data.item_counts(), config.popularity_exponent)[:, None]
    total = torch.zeros(2, dtype=torch.float64)
    if len(users):
        k = min(settings.k, len(data.items))
        ranked = rank_exact(queries, vectors, k=k, exclude=data.not_shown(users)).ids
        recall = score_lists(ranked, data.val.take(users), (k,)).values[f"recall@{k}"]
        total = torch.tensor([recall.sum(), len(recall)], dtype=torch.float64)
    total = total.to(model.log_temperature.device)
    if gather.world_size() > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])
