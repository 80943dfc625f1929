"""What the demo says of its targets, which of them the data allow, and what it trains."""

from pathlib import Path
from typing import Any

import pytest

from shardline.cluster.commands.demo_report import TARGETS, target_note
from shardline.cluster.commands.demo_run import DEMO_SETTINGS
from shardline.cluster.config import load_config

SHARP_FILE = Path(__file__).parents[2] / "bench/configs/sharp.yaml"

# means of the oracle on both presets at their usual sizes (docs/PERFORMANCE.md)
SHARP = {"recall@10": 0.426, "recall@100": 0.726, "recall@1000": 0.919}
SHARP |= {"mrr": 0.663, "ndcg@100": 0.522}


def metrics(oracle: dict[str, float]) -> dict[str, Any]:
    return {"ceilings": {"oracle": {"means": oracle}, "best_estimate": {"means": oracle}}}


def test_where_all_targets_can_be_reached_it_says_where_they_come_from() -> None:
    note = target_note(metrics(SHARP), preset="sharp")
    assert note is not None
    assert "set for the preset seed" in note
    assert "on data of the preset sharp compare with the best estimate" in note


@pytest.mark.parametrize("name", TARGETS["target"])
def test_targets_above_the_oracle_are_named(name: str) -> None:
    oracle = SHARP | {name: TARGETS["target"][name] - 0.01}
    note = target_note(metrics(oracle), preset="seed")
    assert note is not None
    assert note.startswith(f"targets: {name} cannot be reached on data of the preset seed")


def test_without_ceilings_there_are_no_targets_to_speak_of() -> None:
    assert target_note({"ceilings": None}, preset="sharp") is None


def test_the_demo_trains_what_the_documented_configuration_does() -> None:
    documented = load_config(SHARP_FILE).training
    demo = load_config(preferences=DEMO_SETTINGS).training
    assert demo.model_copy(update={"num_workers": documented.num_workers}) == documented
    assert documented != load_config().training
