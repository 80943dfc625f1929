"""When a run mines, and how hard: from which epoch on, and which ranks.

A model that has learned nothing yet finds negatives that are hard for nobody, and the nearest ones
are the likeliest to be false. So mined negatives may come in after some epochs of others
(``start_epoch``), and from deeper ranks first (``easy_ranks``, ``ramp_epochs``): a curriculum from
easy to hard (Bengio et al., Curriculum learning, ICML 2009).
"""

from shardline.training.config.training_config import MiningConfig


def mines_after(config: MiningConfig, epoch: int, *, has_lists: bool) -> bool:
    """Whether users are mined after ``epoch`` epochs, 0 before the first one.

    has_lists: whether there are lists for start_epoch already, as those of a table.
    """
    since = epoch - (config.start_epoch - 1)
    if not config.every_epochs or since < 0:
        return False
    return not has_lists if since == 0 else since % config.every_epochs == 0


def window(config: MiningConfig, epoch: int) -> MiningConfig:
    """The settings to mine with after ``epoch`` epochs: range_min and range_max shifted."""
    left = config.ramp_epochs - max(0, epoch - (config.start_epoch - 1))
    if left <= 0:
        return config
    shift = config.easy_ranks * left // config.ramp_epochs
    ranks = {"range_min": config.range_min + shift, "range_max": config.range_max + shift}
    return config.model_copy(update=ranks)
