"""Two ranks under Ray Train give what one process gives."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardline.shards.core.errors import ConfigError, DataError, Unavailable
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.loop.launch import train
from shardline.training.model.checkpoint import load_best
from shardline.training.search.side_by_side import SideBySide
from shardline.training.search.trial_training import Trained, TrialJob, train_trial
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


def test_trials_under_ray_tune_reach_what_they_reach_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rung by rung, from the checkpoint of the rung before; one that cannot be trained is out."""
    tiny_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    each_epoch = {"every_epochs": 1}
    configs = [
        tiny_config(validation=each_epoch),
        tiny_config(validation=each_epoch, batch_size=100_000),
    ]

    def jobs(folder: Path, until: int, count: int) -> list[TrialJob]:
        return [
            TrialJob(
                number=number,
                config=config,
                data_folder=Path("data"),
                folder=folder / "trials" / str(number),
                until=until,
                may_be_refused=True,
            )
            for number, config in enumerate(configs[:count])
        ]

    found: dict[int, list[Trained]] = {}
    lock = threading.Lock()  # whoever hears of them has what cannot be pickled

    def hear(job: TrialJob, trained: Trained) -> None:
        with lock:
            found.setdefault(job.number, []).append(trained)

    search_folder = tmp_path / "search"
    (search_folder / "trials").mkdir(parents=True)
    for until, count in ((1, 2), (2, 1)):
        SideBySide(at_once=2).train(jobs(search_folder, until, count), search_folder, hear)
    assert sorted(path.name for path in search_folder.iterdir()) == ["trials"]
    assert found[1][0].refused is not None and "batch" in found[1][0].refused
    (job,) = jobs(tmp_path / "here", 2, 1)
    first, second = found[job.number]
    assert (first.epochs, first.ended) == (1, False)
    assert replace(second, seconds=0.0) == replace(train_trial(job), seconds=0.0)
    assert second.seconds > 0
    with pytest.raises(Unavailable, match="no room for so many trials"):
        SideBySide(at_once=99).train(jobs(search_folder, 2, 1), search_folder, hear)
