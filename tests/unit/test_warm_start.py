"""A run that starts from another one: rows by value, everything else as it was; what is refused."""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from click.testing import CliRunner

from shardline.cluster.cli import cli
from shardline.shards.core.errors import ConfigError, DataError, NotFound
from shardline.training.config.training_config import TrainingConfig
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset
from shardline.training.features.fitted import FeatureSpace, fit
from shardline.training.loop.launch import train
from shardline.training.loop.run_rank import train_rank
from shardline.training.loop.runlog import Event, read_log
from shardline.training.loop.trainer import mined_lists
from shardline.training.model.checkpoint import load_best, load_parts, open_data, open_run
from shardline.training.model.towers import build_model
from shardline.training.model.warm_start import (
    TableGrowth,
    carried_space,
    carried_weights,
    open_warm_start,
)
from tests.people import people, tied_config
from tests.tiny import ITEM_IDS, NUM_USERS, USER_IDS, count_reads, tiny_config, tiny_dataset

NEW_USERS, NEW_ITEMS = (2, 1000), (101, 500, 501)  # ids that lie between and after the others
LOST_ITEMS = ITEM_IDS[[3, 40]]

TAGS = {"kind": "multi_valued", "column": "tags", "dim": 5}
TITLE = {"kind": "text", "column": "title", "buckets": 16}


def config_of(**changes: Any) -> TrainingConfig:
    """The tiny configuration, with tags and a text beside the other kinds of feature."""
    towers = tiny_config().towers.model_dump()
    towers["item"]["features"] += (TAGS, TITLE)
    return tiny_config(**({"towers": towers} | changes))


def with_tags(folder: Path, tags: list[str], dataset: Dataset) -> Dataset:
    """The same data; item i has the tags i and i + 1, and a title of them."""
    items = dataset.items()
    lists = [[tags[i % len(tags)], tags[(i + 1) % len(tags)]] for i in range(len(items))]
    items = items.append_column("tags", pa.array(lists))
    items = items.append_column("title", pa.array([" ".join(each) for each in lists]))
    return write_dataset(folder, dataset.users(), items, dataset.interactions(), name="tagged")


def grown(folder: Path, dataset: Dataset) -> Dataset:
    """A day later: two users and three items more, two items fewer, prices ten times as high."""
    users, items, lines = dataset.users(), dataset.items(), dataset.interactions()
    more = [
        row | {"user_id": user} for row, user in zip(users.to_pylist(), NEW_USERS, strict=False)
    ]
    users = pa.concat_tables([users, pa.Table.from_pylist(more, schema=users.schema)])
    added = [
        row | {"item_id": item} for row, item in zip(items.to_pylist(), NEW_ITEMS, strict=False)
    ]
    for row in added:
        row["tags"] = ["brand new", row["tags"][0]]
    items = pa.concat_tables([items, pa.Table.from_pylist(added, schema=items.schema)])
    items = items.filter(pc.invert(pc.is_in(items["item_id"], pa.array(LOST_ITEMS))))
    items = items.set_column(2, "price", pc.multiply(items["price"], 10.0))
    lines = lines.filter(pc.invert(pc.is_in(lines["item_id"], pa.array(LOST_ITEMS))))
    clicks = [
        {"user_id": user, "item_id": item, "timestamp": 99, "split": "train"}
        for user in (*NEW_USERS, int(USER_IDS[0]))
        for item in NEW_ITEMS
    ]
    lines = pa.concat_tables([lines, pa.Table.from_pylist(clicks, schema=lines.schema)])
    return write_dataset(folder, users, items, lines, name="tagged")


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A data set, and an ended run of it."""
    folder = tmp_path_factory.mktemp("older")
    dataset = with_tags(folder / "data", list("abcdefg"), tiny_dataset(folder / "tiny"))
    train(config_of(), dataset.path, folder / "run")
    return dataset, folder / "run"


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_log(run / "log.jsonl") if event["event"] == "step"]


def values_of(space: FeatureSpace) -> dict[str, list[Any]]:
    """Values of each table of vocabularies and tags by the name of its weights."""
    return {
        f"{tower}_rows.{kind}.{place}.weight": column.values
        for tower, columns in (("query", space.query), ("item", space.item))
        for kind, every in (("embeddings", columns.vocabularies), ("bags", columns.bags))
        for place, column in enumerate(every)
        if column.kind != "text"
    }


def test_known_values_keep_their_rows_and_all_else_is_taken(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = older
    config = config_of(seed=8)
    day = grown(tmp_path / "day", dataset)
    warm = open_warm_start(run)
    space = carried_space(fit(config, day), warm.run.space, run)
    weights, growth = carried_weights(config, space, warm)
    fresh = build_model(config, space).state_dict()
    before, now = values_of(warm.run.space), values_of(space)
    assert before.keys() == now.keys() and len(now) == 6
    for name, older_values in before.items():
        assert torch.equal(weights[name][0], warm.weights[name][0]), "unknown"
        for row, value in enumerate(now[name], start=1):
            known = value in older_values
            source = (
                warm.weights[name][1 + older_values.index(value)] if known else fresh[name][row]
            )
            assert torch.equal(weights[name][row], source), (name, value)
    for name in weights.keys() - before.keys() - {"log_temperature"}:
        assert torch.equal(weights[name], warm.weights[name]), name
    assert growth["query.user_id"] == TableGrowth(kept=NUM_USERS, new=2, dropped=0)
    trained = len(before["item_rows.embeddings.0.weight"])
    lost = len(set(before["item_rows.embeddings.0.weight"]) & set(LOST_ITEMS.tolist()))
    assert lost, "the test sees lost items"
    assert growth["item.item_id"] == TableGrowth(kept=trained - lost, new=3, dropped=lost)
    assert growth["item.tags"] == TableGrowth(kept=7, new=1, dropped=0)
    assert "item.title" not in growth
    model = build_model(config, space)
    model.load_state_dict(weights)  # every name and shape fits


def test_numbers_stay_scaled_as_the_weights_know_them(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = older
    day = grown(tmp_path / "day", dataset)
    fitted, before = fit(config_of(), day), open_run(run).space
    space = carried_space(fitted, before, run)
    assert fitted.item.standardisers[0].mean != before.item.standardisers[0].mean
    assert space.item.standardisers == before.item.standardisers
    train(config_of(epochs=1), day.path, tmp_path / "run", warm=run)
    assert open_run(tmp_path / "run").space == space


def test_it_starts_as_good_as_the_older_run_was(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = older
    ended = read_log(run / "log.jsonl")[-1]
    events: list[Event] = []
    result = train(config_of(), dataset.path, tmp_path / "warm", warm=run, on_event=events.append)
    assert [event["event"] for event in events[:3]] == ["start", "warm_start", "validation"]
    assert (events[2]["epoch"], events[2]["step"]) == (0, 0)
    assert events[2]["recall@10"] == ended["best"]
    assert result.epochs == 2, "validation of epoch 0 is not one of the run's own"
    origin = open_run(tmp_path / "warm").origin
    assert origin is not None and origin == events[1]["origin"]
    assert (origin["run"], origin["epoch"]) == (str(run.resolve()), ended["kept_epoch"])
    assert all(table["new"] == table["dropped"] == 0 for table in origin["tables"].values())
    assert open_run(run).origin is None
    assert losses(tmp_path / "warm")[0] < losses(run)[0] - 0.1
    parts = load_parts(tmp_path / "warm", result.steps)
    counts = {int(v) for name, v in parts["optimiser"].items() if name.endswith("/step")}
    assert counts == {20}, "the optimiser began anew"


@pytest.mark.parametrize(("learned", "expected"), [(True, 0.06), (False, 0.2)])
def test_a_learned_temperature_goes_on_within_its_limits(
    older: tuple[Dataset, Path], learned: bool, expected: float
) -> None:
    _, run = older
    loss = {
        "temperature": 0.2 if not learned else 0.05, "learn_temperature": learned,
        "max_temperature": 0.06 if learned else 1.0,
    }  # fmt: skip
    warm = open_warm_start(run)
    warm.weights["log_temperature"] = torch.tensor(0.3).log()
    config = config_of(loss=loss)
    weights, _ = carried_weights(config, warm.run.space, warm)
    assert weights["log_temperature"].exp().item() == pytest.approx(expected)


def test_the_first_negatives_are_mined_with_the_weights_taken_over(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = older
    mining = {"every_epochs": 1, "per_user": 4, "range_max": 20}
    config = config_of(epochs=1, loss={"hard_negatives": 2}, mining=mining)
    train(config, dataset.path, tmp_path / "warm", warm=run)
    used = load_parts(tmp_path / "warm", 10)["mined"]
    _, model = load_best(run)
    expected = mined_lists(model, open_data(tmp_path / "warm"), config, 0)
    np.testing.assert_array_equal(used["items"].numpy(), expected.items)
    train(config, dataset.path, tmp_path / "cold")
    assert used["items"].tolist() != load_parts(tmp_path / "cold", 10)["mined"]["items"].tolist()


@pytest.mark.parametrize("cut", [3, 16])
def test_a_warm_run_resumes_exactly_and_without_the_older_one(
    older: tuple[Dataset, Path], tmp_path: Path, cut: int
) -> None:
    """Cut before its first checkpoint, and after it."""
    dataset, run = older
    towers = {"query": {"hidden": [24, 12]}, "item": {"hidden": [24]}}  # features of the older run
    config = config_of(towers=towers, checkpoint_every_steps=5, log_every_steps=1)
    day = grown(tmp_path / "day", dataset)
    train(config, day.path, tmp_path / "whole", warm=run)

    def interrupt(event: Event) -> None:
        if event["event"] == "step" and event["step"] == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, day.path, tmp_path / "cut", warm=run, on_event=interrupt)
    assert (
        open_run(tmp_path / "cut").config.towers.item.features == config_of().towers.item.features
    )
    other = tmp_path / "other"
    train(config_of(seed=5), dataset.path, other)
    with pytest.raises(ConfigError, match=r"from: .*not started from .*other.*leave out --from"):
        train(config, day.path, tmp_path / "cut", warm=other, resume=True)
    with pytest.raises(ConfigError, match=r"from: .*expected no --from"):
        train(config_of(seed=5), dataset.path, other, warm=run, resume=True)
    again = None if cut == 3 else run
    result = train(config, day.path, tmp_path / "cut", warm=again, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for part, tensors in load_parts(tmp_path / "whole", result.steps).items():
        resumed = load_parts(tmp_path / "cut", result.steps)[part]
        assert all(torch.equal(value, resumed[name]) for name, value in tensors.items()), part


def changed_tower(name: str, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    towers = config_of().towers.model_dump()
    change(towers[name])
    return {"towers": towers}


def without_price(tower: dict[str, Any]) -> None:
    tower["features"] = [f for f in tower["features"] if f["column"] != "price"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 8}, r"training\.dim: .*another architecture; expected dim 16; got dim 8"),
        ({"metric": "dot"}, r"training\.metric: .*expected metric cosine; got metric dot"),
        (
            changed_tower("item", lambda tower: tower.update(hidden=[24, 24])),
            r"training\.towers\.item\.hidden: .*expected .*\[24\]; got .*\[24, 24\]",
        ),
        (
            changed_tower("item", without_price),
            r"towers\.item\.features\.price\.kind.*expected .*price\.kind numeric.*kind none",
        ),
        (
            changed_tower("query", lambda tower: tower["features"][0].update(dim=9)),
            r"towers\.query\.features\.user_id\.dim: .*user_id\.dim 4; got .*user_id\.dim 9",
        ),
        (
            changed_tower("query", lambda tower: tower["features"][4].update(pooling="sqrtn")),
            r"towers\.query\.features\.history\.pooling",
        ),
        (
            changed_tower("item", lambda tower: tower.update(features=tower["features"][::-1])),
            r"training\.towers\.item\.features: .*\['item_id', 'category', .*got .*\['title', ",
        ),
    ],
)
def test_another_architecture_is_refused_before_data_is_read(
    older: tuple[Dataset, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
) -> None:
    dataset, run = older
    reads = count_reads(monkeypatch)
    with pytest.raises(ConfigError, match=words):
        train(config_of(**changes), dataset.path, tmp_path / "run", warm=run)
    assert not reads
    assert not (tmp_path / "run").exists()


def test_settings_that_leave_the_weights_their_meaning_may_change(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = older

    def change(tower: dict[str, Any]) -> None:
        tower["dropout"] = 0.1
        tower["features"][0].update(min_count=2, init_norm=0.5)

    changes = changed_tower("item", change) | {"epochs": 1, "loss": {"kind": "bsl"}, "seed": 1}
    train(config_of(**changes), dataset.path, tmp_path / "run", warm=run)
    origin = open_run(tmp_path / "run").origin
    assert origin is not None and origin["tables"]["item.item_id"]["dropped"] > 0


def test_a_run_to_start_from_must_have_ended(older: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset, _ = older

    def interrupt(event: Event) -> None:
        if event["event"] == "validation":
            raise KeyboardInterrupt

    with pytest.raises(NotFound, match="no complete training run"):
        train(config_of(), dataset.path, tmp_path / "run", warm=tmp_path / "nowhere")
    with pytest.raises(KeyboardInterrupt):
        train(config_of(), dataset.path, tmp_path / "cut", on_event=interrupt)
    with pytest.raises(DataError, match=r"from: .*has not ended; .*got no checkpoint.*--resume"):
        train(config_of(), dataset.path, tmp_path / "run", warm=tmp_path / "cut")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("column", "make", "words"),
    [
        ("category", lambda c: pc.cast(c, pa.string()), r"category: .*expected int; got string"),
        (
            "price",
            lambda c: pc.cast(pc.cast(c, pa.int64(), safe=False), pa.timestamp("s")),
            r"price: .*expected a number; got a timestamp",
        ),
    ],
)
def test_a_column_of_another_type_is_refused(
    older: tuple[Dataset, Path], tmp_path: Path, column: str, make: Any, words: str
) -> None:
    dataset, run = older
    items = dataset.items()
    items = items.set_column(items.column_names.index(column), column, make(items[column]))
    other = write_dataset(
        tmp_path / "other", dataset.users(), items, dataset.interactions(), name="other"
    )
    with pytest.raises(DataError, match=words):
        train(config_of(), other.path, tmp_path / "run", warm=run)
    assert not (tmp_path / "run").exists()


def test_validation_on_what_the_older_run_was_fitted_on_is_refused(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, _ = older
    final = tmp_path / "final"
    train(config_of(epochs=1, fit_splits="train+val"), dataset.path, final)
    with pytest.raises(ConfigError, match=r"training\.fit_splits: .*validation would be too high"):
        train(config_of(), dataset.path, tmp_path / "run", warm=final)
    assert not (tmp_path / "run").exists()
    again = config_of(epochs=1, fit_splits="train+val")
    assert train(again, dataset.path, tmp_path / "run", warm=final).best_epoch is None


def test_ages_are_counted_from_the_newest_time_and_scaled_as_before(
    older: tuple[Dataset, Path],
) -> None:
    _, run = older
    space = open_run(run).space
    columns = space.item
    times = [replace(s, newest=100.0, vector=False) for s in columns.standardisers[:1]]
    later = [replace(s, newest=200.0, mean=[9.0], missing=True) for s in times]
    spaces = [
        replace(space, item=replace(columns, standardisers=tuple(scales)))
        for scales in (later, times)
    ]
    (found,) = carried_space(*spaces, run).item.standardisers
    assert found == replace(times[0], newest=200.0)


def test_the_command_says_what_was_taken_and_refuses_before_it_trains(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = older
    day = grown(tmp_path / "day", dataset)
    config = tmp_path / "config.yaml"
    config.write_text(f"training: {config_of(epochs=1).model_dump_json()}")
    train_day = ["--data", str(day.path), "--from", str(run), "--run", str(tmp_path / "run")]
    command = ["-c", str(config), "--store", str(tmp_path / "store")]
    refused = CliRunner().invoke(cli, [*command, "--set", "training.dim=8", "train", *train_day])
    assert isinstance(refused.exception, ConfigError)
    assert not (tmp_path / "run").exists()
    found = CliRunner().invoke(cli, [*command, "train", *train_day])
    assert found.exception is None, found.output
    lines = found.output
    assert f"weights of {run.resolve()}, epoch" in lines
    assert "the optimiser's moments start anew" in lines
    assert f"query.user_id: {NUM_USERS} values kept, 2 new, 0 dropped" in lines
    assert "item.tags: 7 values kept, 1 new, 0 dropped" in lines
    assert "epoch 0: validation recall@10" in lines
    plain = ["--store", str(tmp_path / "store"), "--set", "training.optimiser.learning_rate=1"]
    small = ["--set", "training.batch_size=24", "--set", "training.validation.k=10"]
    again = [*train_day[:-1], str(tmp_path / "again"), "--epochs", "1"]
    found = CliRunner().invoke(cli, [*plain, *small, "train", *again])
    assert found.exception is None, found.output
    declared, before = open_run(tmp_path / "again").config, open_run(run).config
    assert (declared.loss, declared.dim) == (before.loss, before.dim), "not said, so as before"
    assert "with the weights it started from: try a lower" in found.output


def test_tied_towers_start_warm_too(older: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset = people(tmp_path / "people")
    config = tied_config(epochs=1)
    first = train(config, dataset.path, tmp_path / "first")
    events: list[Event] = []
    train(config, dataset.path, tmp_path / "warm", warm=tmp_path / "first", on_event=events.append)
    recalls = [event for event in events if event["event"] == "validation"]
    name = next(key for key in recalls[0] if key.startswith("recall@"))
    assert recalls[0]["epoch"] == 0 and recalls[0][name] == first.best_value
    tables = events[1]["origin"]["tables"]
    assert tables and all(table.startswith("item.") for table in tables)
    with pytest.raises(ConfigError, match=r"training\.towers.*tied False"):
        train(config, dataset.path, tmp_path / "other", warm=older[1])


def test_audiences_start_warm_and_an_svd_start_does_not_undo_it(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, _ = older
    towers = config_of().towers.model_dump()
    towers["item"]["features"] += ({"kind": "audience", "max_length": 4},)
    config = config_of(towers=towers, epochs=1, id_start="svd")
    first = train(config, dataset.path, tmp_path / "first")
    events: list[Event] = []
    train(config, dataset.path, tmp_path / "warm", warm=tmp_path / "first", on_event=events.append)
    recalls = [event for event in events if event["event"] == "validation"]
    name = next(key for key in recalls[0] if key.startswith("recall@"))
    assert recalls[0]["epoch"] == 0
    assert recalls[0][name] == first.best_value
    with pytest.raises(ConfigError, match="audience"):
        train(config_of(), dataset.path, tmp_path / "other", warm=tmp_path / "first")


def one_rank(rank: int, world: int, run: Path) -> None:
    torch.set_num_threads(1)
    group = f"file://{run}/group"
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=world)
    train_rank(run, torch.device("cpu"))
    dist.destroy_process_group()


def test_two_ranks_start_with_the_same_weights_as_one(
    older: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, run = older
    day = grown(tmp_path / "day", dataset)

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    for name in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            train(config_of(), day.path, tmp_path / name, warm=run, on_event=stop)
    train_rank(tmp_path / "one", torch.device("cpu"))
    multiprocessing.set_forkserver_preload([__name__])
    ranks = (2, tmp_path / "two")
    mp.start_processes(one_rank, ranks, nprocs=2, start_method="forkserver")
    first, second = (
        [e["recall@10"] for e in read_log(tmp_path / name / "log.jsonl") if "recall@10" in e]
        for name in ("one", "two")
    )
    assert first == pytest.approx(second, abs=1e-9)
    ones, twos = (load_parts(tmp_path / name, 20)["model"] for name in ("one", "two"))
    for name, value in ones.items():
        torch.testing.assert_close(value, twos[name], rtol=1e-4, atol=1e-5)
