"""Two ranks under Ray Train give what one process gives."""

from pathlib import Path

import pytest
import torch

from shardline.shards.core.errors import ConfigError, DataError
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.loop.launch import train
from shardline.training.model.checkpoint import load_best
from tests.tiny import tiny_config, tiny_dataset

# Ray Train brings up Ray Data's context, which warns about the defaults of its own settings
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    pytest.mark.usefixtures("private_ray"),
]


def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    events: list[dict] = []
    two = train(tiny_config(num_workers=2), dataset.path, tmp_path / "two", on_event=events.append)
    one = train(tiny_config(), dataset.path, tmp_path / "one")
    assert (two.epochs, two.steps) == (one.epochs, one.steps) == (2, 20)
    assert [event["step"] for event in events if event["event"] == "step"] == [10, 20]

    # the same batches and gradients, so the same weights but for the order of float additions
    (_, expected), (_, found) = load_best(one.run_folder), load_best(two.run_folder)
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-3, atol=1e-3)
    recall = evaluate_exact(two.run_folder, dataset, ks=(10,)).means["recall@10"]
    assert recall == pytest.approx(
        evaluate_exact(one.run_folder, dataset, ks=(10,)).means["recall@10"], abs=0.05
    )

    with pytest.raises(ConfigError, match="holds a run already"):
        train(tiny_config(num_workers=2), dataset.path, tmp_path / "two")
    with pytest.raises(DataError, match="another dataset"):
        other = tiny_dataset(tmp_path / "other", seed=1)
        train(tiny_config(num_workers=2), other.path, tmp_path / "two", resume=True)
