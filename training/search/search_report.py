"""What a search found: rows of its two tables, and the configuration as a file. Pure.

The file is what ``shardline -c best.yaml train`` takes.
"""

import math
from dataclasses import dataclass

import yaml

from shardline.training.config.training_config import TrainingConfig
from shardline.training.search.choices import describe
from shardline.training.search.findings import effects
from shardline.training.search.search_state import SearchState, Trial

BEST = "best.yaml"  # inside <run>/search


@dataclass(frozen=True, slots=True)
class SearchTable:
    """A table as texts: a title, the header, and rows of as many cells."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def trials_table(state: SearchState) -> SearchTable:
    """Every trial that was trained, the best first, its number starred."""
    tried = [trial for trial in state.trials if trial.epochs or trial.refused]
    order = sorted(tried, key=lambda t: (t.refused is not None, -(t.value or 0.0), t.number))
    best = state.best()
    rows = [_trial_row(trial, starred=trial is best) for trial in order]
    k = state.base_config.validation.k
    return SearchTable(
        f"Tried: {len(tried)} of them, by recall@{k} on validation (* the best)",
        ("what is changed", "trial", "epochs", f"recall@{k}", "seconds"),
        rows,
    )


def worth_table(state: SearchState) -> SearchTable:
    """Every choice that was tried, by what it added to recall after the first rung."""
    rows: list[tuple[str, ...]] = [
        (f"{worth.setting} {worth.label}", str(worth.trials), f"{worth.effect:+.4f}")
        for worth in effects(state)
    ]
    k = state.base_config.validation.k
    return SearchTable(
        f"What each choice was worth: recall@{k} against the default, at the first comparison",
        ("choice", "trials", "worth"),
        rows,
    )


def summary_line(state: SearchState, config: TrainingConfig) -> str:
    """The best beside the default: after as many epochs as both have, and at their best."""
    best, base = state.best(), state.trials[0]
    k = config.validation.k
    if best is base:
        return f"the default is the best: recall@{k} {base.value:.4f} on validation"
    both = max(best.values.keys() & base.values.keys())
    return (
        f"trial {best.number} ({describe(best.changes)}) is the best: recall@{k} {best.value:.4f} "
        f"on validation; at the comparison after {both} epochs {best.values[both]:.4f}, the "
        f"default {base.values[both]:.4f}; a recall over {state.val_users:,} users has a standard "
        f"error of up to {standard_error(best.value or 0.0, state.val_users):.4f}"
    )


def standard_error(recall: float, users: int) -> float:
    """Of a mean recall over so many users, at most: as if every user's were 0 or 1."""
    return math.sqrt(max(0.0, recall * (1 - recall)) / max(1, users))


def best_yaml(state: SearchState, config: TrainingConfig) -> str:
    """The chosen configuration as YAML, without placement, which is the machine's."""
    best = state.best()
    lines = [
        f"# shardline train --tune: {state.dataset['name']}, {describe(best.changes)}",
        f"# recall@{config.validation.k} on validation {best.value:.4f} of a model fitted on train",
        "# train --all fits it on train and validation, as the search did in the end",
    ]
    content = yaml.safe_dump({"training": config.identity()}, sort_keys=False)
    return "\n".join(lines) + "\n" + content


def _trial_row(trial: Trial, *, starred: bool) -> tuple[str, ...]:
    number = f"{'* ' if starred else ''}{trial.number}"
    recall = "out" if trial.refused or trial.value is None else f"{trial.value:.4f}"
    what = describe(trial.changes)
    if trial.refused:
        what += f" ({trial.refused})"
    return what, number, str(trial.epochs), recall, f"{trial.seconds:.0f}"
