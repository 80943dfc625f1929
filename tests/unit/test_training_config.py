"""Illegal settings are refused by name before anything is loaded."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from training.config import TrainingConfig, differences


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 1}, "learning_rate"),
        ({"batch_size": 25, "num_workers": 2}, "batch_size 25 is not a multiple of num_workers 2"),
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"dim": 1}, "dim"),
        ({"loss": {"temperature": 0}}, "loss.temperature"),
        ({"loss": {"temperature": 2, "max_temperature": 1}}, "temperature 2.0 is outside"),
        ({"towers": {"item": {"features": [{"kind": "history"}]}}}, "query tower only"),
        ({"towers": {"item": {"features": []}}}, "at least one feature"),
        ({"towers": {"item": {"features": [{"kind": "text", "column": "t"}]}}}, "'text'"),
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
    theirs = TrainingConfig(loss={"logq": False}, num_workers=2, device="cpu").identity()
    assert differences(ours, theirs) == ["dim: 64, was 128", "loss.logq: True, was False"]
    assert differences(ours, ours) == []


def test_survives_json() -> None:
    config = TrainingConfig.model_validate(
        {"towers": {"query": {"features": [{"kind": "history"}, {"kind": "id", "column": "u"}]}}}
    )
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


def test_importing_it_loads_neither_torch_nor_arrow() -> None:
    code = (
        "import sys, training.config; sys.exit(sum(m in sys.modules for m in ('torch', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
