"""What a search has found so far: the configuration to fit, what each choice was worth. Pure."""

from shardline.training.config.training_config import TrainingConfig
from shardline.training.search.choices import SearchSpace
from shardline.training.search.search_state import SearchState
from shardline.training.search.worth import Worth, worths


def final_config(state: SearchState, space: SearchSpace) -> TrainingConfig:
    """The best trial's configuration, with the epochs to train for on train alone or with val.

    Where the trial was trained to its end these are the epochs of its best validation.
    """
    best = state.best()
    config = space.config(best.changes)
    assert config is not None, "a trial has a configuration"
    epochs = best.best_epoch if best.ended and best.best_epoch else config.epochs
    return config.model_copy(update={"epochs": epochs})


def first_rung(state: SearchState) -> list[tuple[dict[str, str], float]]:
    """(changes, recall) of each trial after the epochs of the first rung."""
    epochs = state.ladder[0]
    return [
        (trial.changes, trial.values[epochs]) for trial in state.trials if epochs in trial.values
    ]


def effects(state: SearchState) -> list[Worth]:
    """What each choice was worth after the first rung; none before the base was there."""
    judged = first_rung(state)
    return worths(judged) if any(not changes for changes, _ in judged) else []
