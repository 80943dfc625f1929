"""Illegal settings are refused by name before anything is loaded."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from shardline.training.config.training_config import TrainingConfig, differences


def item_tower(*features: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"towers": {"item": {"features": list(features)} | settings}}


TEXT = {"kind": "text", "column": "title"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 1}, "learning_rate"),
        ({"batch_size": 25, "num_workers": 2}, "batch_size 25 is not a multiple of num_workers 2"),
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"dim": 1}, "dim"),
        ({"loss": {"temperature": 0}}, "loss.temperature"),
        ({"loss": {"temperature": 2, "max_temperature": 1}}, "temperature 2.0 is outside"),
        ({"loss": {"logq": True}}, "loss.logq"),
        ({"loss": {"strategy": "hard"}}, "loss.strategy"),
        ({"loss": {"strategy": "mixed", "hard_negatives": 0}}, "mixed contradicts hard_negatives"),
        ({"loss": {"strategy": "mixed", "in_batch": False}}, "mixed contradicts in_batch: False"),
        (
            {"loss": {"strategy": "offline-mined", "in_batch": True}},
            "offline-mined contradicts in_batch: True",
        ),
        ({"loss": {"in_batch": False}}, "nothing else gives negatives"),
        (
            {"loss": {"strategy": "offline-mined", "hard_share": 0}},
            "nothing else gives negatives",
        ),
        ({"loss": {"kind": "sigmoid", "hard_weight": 2}}, "which kind sigmoid has not"),
        ({"loss": {"hard_shared": True}}, "hard_shared needs hard_negatives"),
        ({"mining": {"start_epoch": 2}}, "start_epoch 2 needs loss.hard_negatives"),
        (
            {"mining": {"start_epoch": 4}, "epochs": 3, "loss": {"hard_negatives": 1}},
            "start_epoch 4 is after the last of 3 epochs",
        ),
        (
            {"mining": {"start_epoch": 2}, "loss": {"strategy": "offline-mined"}},
            "start_epoch 2 leaves the epochs before it without negatives: loss.in_batch is off",
        ),
        ({"mining": {"easy_ranks": 5}}, "easy_ranks 5 and ramp_epochs 0: each needs the other"),
        ({"mining": {"ramp_epochs": 2}}, "easy_ranks 0 and ramp_epochs 2: each needs the other"),
        (
            {"mining": {"easy_ranks": 5, "ramp_epochs": 2}},
            "easy_ranks needs every_epochs",
        ),
        (
            {"mining": {"easy_ranks": 2000, "ramp_epochs": 2, "every_epochs": 1}},
            "range_max 100 and easy_ranks 2000 exceed rank 2048",
        ),
        ({"loss": {"kind": "bsl", "symmetric": 0.5}}, "symmetric is a part of kind infonce"),
        ({"loss": {"kind": "sigmoid", "strategy": "batch-hard"}}, "batch_hard is a part of kind"),
        (
            {"loss": {"uniform_negatives": 5}, "num_workers": 2},
            "uniform_negatives 5 is not a multiple of num_workers 2",
        ),
        ({"towers": {"item": {"features": [{"kind": "history"}]}}}, "query tower only"),
        ({"towers": {"item": {"features": []}}}, "at least one feature"),
        (item_tower(TEXT | {"words": None}), "words and chars are both null"),
        (item_tower(TEXT | {"words": [2, 1]}), "the n-gram range [2, 1] is empty"),
        (item_tower(TEXT | {"chars": [0, 1]}), "chars.0"),
        (item_tower(TEXT | {"init_norm": 0}), "init_norm"),
        (item_tower({"kind": "id", "column": "i", "min_count": 0}), "min_count"),
        (item_tower(TEXT, projection="identity"), "needs hidden [], not [256, 128]"),
        (
            item_tower({"kind": "numeric", "column": "p"}, projection="identity", hidden=[]),
            "cannot add up numbers: ['p']",
        ),
        (item_tower(TEXT, dropout=0.1, hidden=[]), "dropout needs a hidden layer"),
        ({"towers": {"item": {"features": [{"kind": "image", "column": "t"}]}}}, "'image'"),
        (
            {"towers": {"item": {"features": [{"kind": "numeric", "column": "x", "dim": 4}]}}},
            "towers.item.features.0.numeric.dim",
        ),
        (
            {"towers": {"query": {"features": [{"kind": "id", "column": "a"}] * 2}}},
            "a column is listed twice",
        ),
        (
            {
                "towers": {
                    "query": {"features": [{"kind": "history", "column": c} for c in ("a", "b")]}
                }
            },
            "at most one history",
        ),
    ],
)
def test_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingConfig.model_validate(settings)
    assert words in str(caught.value)


def test_differences_name_settings_and_values() -> None:
    ours = TrainingConfig(dim=64).identity()
    theirs = TrainingConfig(loss={"logq": "none"}, num_workers=2, device="cpu").identity()
    assert differences(ours, theirs) == ["dim: 64, was 128", "loss.logq: standard, was none"]
    assert differences(ours, ours) == []


def test_survives_json() -> None:
    config = TrainingConfig.model_validate(
        {"towers": {"query": {"features": [{"kind": "history"}, {"kind": "id", "column": "u"}]}}}
    )
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


def test_importing_it_loads_neither_torch_nor_arrow() -> None:
    module = "shardline.training.config.training_config"
    code = f"import sys, {module}; sys.exit(sum(m in sys.modules for m in ('torch', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({}, (True, 0, 0, 0)),
        ({"strategy": "batch-hard"}, (True, 1, 0, 0)),
        ({"strategy": "batch-hard", "batch_hard": 4}, (True, 4, 0, 0)),
        ({"strategy": "offline-mined"}, (False, 0, 10, 0)),
        ({"strategy": "mixed"}, (True, 0, 10, 5)),
        ({"strategy": "mixed", "hard_negatives": 3, "batch_hard": 2}, (True, 2, 3, 5)),
    ],
)
def test_strategies_fill_in_fields_and_given_ones_win(
    given: dict[str, Any], filled: tuple[bool, int, int, int]
) -> None:
    loss = TrainingConfig.model_validate({"loss": given}).loss
    fields = (loss.in_batch, loss.batch_hard, loss.hard_negatives, loss.random_negatives)
    assert fields == filled
    assert type(loss).model_validate_json(loss.model_dump_json()) == loss
