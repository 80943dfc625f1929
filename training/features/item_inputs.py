"""The item tower's inputs of a whole dataset: the columns of its items, and their audiences."""

from dataclasses import replace

from shardline.training.data.audiences import users_of_items
from shardline.training.data.tables import ITEMS, USERS, Dataset
from shardline.training.features.audience import Audience
from shardline.training.features.fitted import Block, FeatureSpace


def item_inputs(space: FeatureSpace, dataset: Dataset, splits: tuple[str, ...]) -> Block:
    """(items,) input rows in the order of the items table; audiences are of ``splits``.

    Raises:
        DataError: the items, or the users of an audience, lack a feature column.
    """
    block = space.item.encode(dataset.items(), ITEMS)
    return replace(block, audience=audience_of(space, dataset, splits))


def audience_of(space: FeatureSpace, dataset: Dataset, splits: tuple[str, ...]) -> Audience | None:
    """The users of every item over the splits; None where the item tower does not ask for them.

    Raises:
        DataError: the users lack their id.
    """
    feature = space.audience
    if feature is None:
        return None
    vocabulary = space.query.vocabularies[space.user_ids]
    return Audience.of(
        users_of_items(dataset, splits),
        vocabulary.encode(dataset.users(), USERS),
        longest=feature.max_length,
        user_column=space.user_ids,
        keep_target=feature.keep_target,
    )
