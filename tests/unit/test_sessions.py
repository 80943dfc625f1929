"""Click sessions as pairs of items: against loops, and what item-to-item models learn from them."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from shardline.cluster.cli import cli
from shardline.shards.core.errors import DataError, InvalidInput
from shardline.training.data.csr import Csr
from shardline.training.data.session_import import SessionConfig, import_sessions
from shardline.training.data.sessions import Clicks, session_pairs, session_splits
from shardline.training.data.tables import open_dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.co_occurrence import co_occurrence_lists, evaluate_co_occurrence
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.loop.run_rank import train_rank
from shardline.training.mining.hard_negatives import load_hard
from tests.people import tied_config
from tests.tiny import declared_run, tiny_dataset

MARKETS, TASTES, ITEMS = 6, 6, 20  # a taste of a market has 20 items
SESSIONS, LENGTH = 1000, 5


def drawn_clicks(seed: int) -> Clicks:
    rng = np.random.default_rng(seed)
    sessions = rng.integers(0, 12, 60)
    return Clicks.of(
        sessions, rng.integers(0, 9, 60), rng.permutation(60) // 2, rng.random(60) < 0.1
    )


def slow_pairs(clicks: Clicks, codes: np.ndarray, window: int) -> Counter[tuple[int, int, int]]:
    """(split, asked, found) -> how often, by loops over all pairs of clicks."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for session in range(clicks.number):
        places = np.flatnonzero(clicks.sessions == session)
        code = int(codes[places[0]])
        booked = [place for place in places if clicks.booked[place]][-1:]
        for one, other in itertools.permutations(places, 2):
            near = abs(one - other) <= window
            pair = (code, int(clicks.items[one]), int(clicks.items[other]))
            if pair[1] == pair[2]:
                continue
            if code == 0 and (near or one in booked or other in booked):
                pairs[pair] += 1
            if code > 0 and other == one + 1:
                pairs[pair] += 1
    return pairs


@pytest.mark.parametrize("window", [1, 2, 40])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_against_loops(seed: int, window: int) -> None:
    clicks = drawn_clicks(seed)
    codes = session_splits(clicks, val_share=0.2, test_share=0.3)
    found = session_pairs(clicks, codes, window=window)
    keys = zip(found.codes.tolist(), found.asked.tolist(), found.found.tolist(), strict=True)
    assert dict(zip(keys, found.counts.tolist(), strict=True)) == slow_pairs(clicks, codes, window)
    assert set(found.codes.tolist()) == {0, 1, 2}


def test_sessions_come_in_the_order_of_their_last_clicks() -> None:
    clicks = Clicks.of(
        np.array([7, 3, 7, 3, 5]),
        np.array([1, 2, 3, 4, 5]),
        np.array([9, 8, 1, 2, 3]),
        np.zeros(5, np.bool_),
    )
    assert clicks.items.tolist() == [5, 4, 2, 3, 1]
    assert clicks.sessions.tolist() == [0, 1, 1, 2, 2]
    codes = session_splits(clicks, val_share=0.3, test_share=0.3)
    assert codes.tolist() == [0, 1, 1, 2, 2]


def test_the_time_of_a_pair_is_that_of_its_newest_click() -> None:
    clicks = Clicks.of(
        np.array([0, 0, 1, 1]),
        np.array([5, 6, 6, 5]),
        np.array([1, 2, 7, 8]),
        np.zeros(4, np.bool_),
    )
    found = session_pairs(clicks, np.zeros(4, np.int8), window=1)
    assert (found.times.tolist(), found.counts.tolist()) == ([8, 8], [2, 2])


def click_tables(folder: Path, seed: int = 0, *, strings: bool = False) -> Path:
    """Sessions that stay within one taste of one market; a third ends in a booking."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    number = MARKETS * TASTES * ITEMS
    names = [f"flat {i:04d}" for i in range(number)] if strings else list(range(number))
    markets = [f"city {i // (TASTES * ITEMS)}" for i in range(number)]
    order = rng.permutation(number)
    items = {"item_id": [names[i] for i in order], "city": [markets[i] for i in order]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    group = rng.integers(0, MARKETS * TASTES, SESSIONS)
    # within a taste some items are clicked much more than others
    within = np.minimum(rng.geometric(0.12, (SESSIONS, LENGTH)) - 1, ITEMS - 1)
    clicked = group[:, None] * ITEMS + within
    clicks = {
        "session_id": np.repeat(np.arange(SESSIONS), LENGTH),
        "item_id": [names[i] for i in clicked.ravel()],
        "timestamp": np.arange(SESSIONS * LENGTH),
        "booked": np.tile(np.arange(LENGTH) == LENGTH - 1, SESSIONS)
        & np.repeat(rng.random(SESSIONS) < 1 / 3, LENGTH),
    }
    pq.write_table(pa.table(clicks), folder / "interactions.parquet")
    return folder


def test_embeddings_of_sessions_beat_popularity_and_co_occurrence(tmp_path: Path) -> None:
    """Recall@20 of held-out next clicks, by tied towers and negatives of the same market."""
    source = click_tables(tmp_path / "source", strings=True)
    done = CliRunner().invoke(
        cli,
        [
            *("data", "sessions", "--source", str(source), "--out", str(tmp_path / "data")),
            *("--booked-column", "booked", "--market-column", "city", "--window", "2"),
            *("--negatives", str(tmp_path / "negatives"), "--json"),
        ],
    )
    assert done.exit_code == 0, done.output
    dataset = open_dataset(tmp_path / "data")
    assert dataset.item_to_item
    assert dataset.users()["original_id"].equals(dataset.items()["original_id"])
    towers = {
        "tied": True,
        "item": {
            "features": [{"kind": "id", "column": "item_id", "dim": 16, "init_norm": 0.15}],
            "hidden": [],
            "projection": "identity",
        },
    }
    config = tied_config(
        towers=towers,
        loss={"temperature": 0.2, "learn_temperature": False, "hard_negatives": 4},
        optimiser={"learning_rate": 0.03, "weight_decay": 0.01},
        batch_size=256,
        epochs=12,
        validation={"k": 20},
    )
    hard = load_hard(tmp_path / "negatives", dataset, fit_splits="train", per_row=4)
    run = declared_run(tmp_path / "run", config, dataset, hard=hard)
    train_rank(run, torch.device("cpu"))
    ours = evaluate_exact(run, dataset, ks=(20,)).means["recall@20"]
    popular = evaluate_baseline(Baseline.POPULARITY, dataset, ks=(20,)).means["recall@20"]
    together = evaluate_co_occurrence(dataset, ks=(20,)).means["recall@20"]
    print(f"recall@20: {ours:.3f}, co-occurrence {together:.3f}, popularity {popular:.3f}")
    assert ours > 1.05 * together > 5 * popular


def test_negatives_are_of_the_same_market_and_no_partners(tmp_path: Path) -> None:
    source = click_tables(tmp_path / "source")
    import_sessions(source, tmp_path / "data", SessionConfig())
    arguments = ["data", "sessions", "--source", str(source), "--out", str(tmp_path / "data")]
    arguments += ["--market-column", "city", "--negatives", str(tmp_path / "hard"), "--overwrite"]
    done = CliRunner().invoke(cli, [*arguments, "--per-item", "9"])
    assert done.exit_code == 0, done.output
    dataset = open_dataset(tmp_path / "data")
    lists = load_hard(tmp_path / "hard", dataset, fit_splits="train", per_row=9)
    train = dataset.positives("train")
    cities = dataset.items()["city"].to_pylist()
    asked = np.flatnonzero(train.lengths)
    assert (lists.lengths[asked] == 9).all() and lists.lengths.sum() == 9 * len(asked)
    for user in asked[:50]:
        mine = lists.items[lists.indptr[user] : lists.indptr[user + 1]].tolist()
        known = train.items[train.indptr[user] : train.indptr[user + 1]].tolist()
        assert len(set(mine)) == 9
        assert not set(mine) & {*known, user}  # users and items have the same rows here
        assert {cities[item] for item in mine} == {cities[user]}


def test_co_occurrence_ranks_by_counts_and_leaves_the_item_out() -> None:
    train = Csr(np.array([0, 4, 4]), np.array([3, 1, 0, 2]))
    weights = np.array([1.0, np.nan, 9.0, 5.0], np.float32)
    own = np.array([0, 1])
    lists = co_occurrence_lists(train, weights, np.array([0, 1]), own, 3)
    assert lists.tolist() == [[2, 1, 3], [-1, -1, -1]]
    assert co_occurrence_lists(train, None, np.array([0]), own, 2).tolist() == [[1, 2]]


def test_what_is_known_may_be_found_again_but_not_the_item_itself(tmp_path: Path) -> None:
    import_sessions(click_tables(tmp_path / "source"), tmp_path / "data", SessionConfig())
    dataset = open_dataset(tmp_path / "data")
    repeated = {
        tuple(row.values()) for row in dataset.interactions("train").select(PAIR).to_pylist()
    } & {tuple(row.values()) for row in dataset.interactions("test").select(PAIR).to_pylist()}
    assert repeated
    number = MARKETS * TASTES * ITEMS
    found = evaluate_baseline(Baseline.POPULARITY, dataset, ks=(number,))
    assert found.means[f"recall@{number}"] == 1.0  # nothing that is wanted was left out


PAIR = ["user_id", "item_id"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"session_column": "visit"}, "visit: missing column"),
        ({"booked_column": "sold"}, "sold: missing column"),
        ({"val_share": 0.45, "test_share": 0.5}, None),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    source = click_tables(tmp_path / "source")
    if message is None:
        with pytest.raises(ValidationError, match="leave no session to train on"):
            SessionConfig(val_share=0.5, test_share=0.5)
        import_sessions(source, tmp_path / "out", SessionConfig(**changes))
        return
    with pytest.raises(DataError, match=message):
        import_sessions(source, tmp_path / "out", SessionConfig(**changes))
    assert not (tmp_path / "out").exists()


def test_sessions_without_a_pair_and_options_that_go_together(tmp_path: Path) -> None:
    source = tmp_path / "clicks.parquet"
    pq.write_table(
        pa.table({"session_id": [1, 2, 2], "item_id": [5, 6, 6], "timestamp": [1, 2, 3]}), source
    )
    with pytest.raises(DataError, match=r"no pair to train on.*got 2 sessions of 3 clicks"):
        import_sessions(source, tmp_path / "out", SessionConfig(test_share=0, val_share=0))
    arguments = ["data", "sessions", "--source", str(source), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*arguments, "--market-column", "city"])
    assert isinstance(done.exception, InvalidInput)
    assert "expected both, or neither" in str(done.exception)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidInput, match="co-occurrence is of pairs of items"):
        evaluate_co_occurrence(tiny_dataset(tmp_path / "tiny"))


def test_a_market_that_is_no_column_leaves_nothing_behind(tmp_path: Path) -> None:
    source = click_tables(tmp_path / "source")
    arguments = ["data", "sessions", "--source", str(source), "--out", str(tmp_path / "out")]
    arguments += ["--market-column", "town", "--negatives", str(tmp_path / "negatives")]
    done = CliRunner().invoke(cli, arguments)
    assert isinstance(done.exception, InvalidInput)
    assert "no such column of items; expected city; got town" in str(done.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_report_says_what_was_read(tmp_path: Path) -> None:
    source = click_tables(tmp_path / "source")
    config = SessionConfig(booked_column="booked")
    report = import_sessions(source, tmp_path / "data", config)
    assert (report.sessions, report.clicks, report.items) == (1000, 5000, 720)
    assert 250 < report.booked < 420
    written = open_dataset(tmp_path / "data").interactions()
    assert sum(report.pairs.values()) == len(written)
    assert json.loads(json.dumps(report.pairs))["train"] > report.pairs["test"] > 0
    assert report.warnings == []
