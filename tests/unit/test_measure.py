"""Metrics by segment, among candidates and over several ranks, against one process and loops."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.files import write_json
from shardline.training.data.csr import Csr
from shardline.training.data.segments import segments_of
from shardline.training.data.tables import open_dataset
from shardline.training.evaluation.baselines import Baseline, evaluate_baseline
from shardline.training.evaluation.measure import measure, shared
from shardline.training.evaluation.ranking import rank_exact
from shardline.training.evaluation.ranking_metrics import MetricResult
from shardline.training.evaluation.user_queries import EvaluationTask
from tests.tiny import tiny_dataset

USERS, ITEMS, KS = 30, 50, (3, 10)


def csr(lists: list[list[int]]) -> Csr:
    flat = np.array([item for items in lists for item in items], dtype=np.int64)
    return Csr(np.cumsum([0, *map(len, lists)]).astype(np.int64), flat)


def random_task(seed: int = 0) -> tuple[EvaluationTask, np.ndarray, np.ndarray]:
    """Users with 0 to 12 known items and 1 to 4 relevant ones; a fifth of the items is cold."""
    rng = np.random.default_rng(seed)
    warm, lists = rng.permutation(ITEMS)[: ITEMS * 4 // 5], []
    for _ in range(USERS):
        known = rng.choice(warm, rng.integers(0, 13), replace=False).tolist()
        rest = np.setdiff1d(np.arange(ITEMS), known)
        lists.append((known, rng.choice(rest, rng.integers(1, 5), replace=False).tolist()))
    known, relevant = (csr([pair[place] for pair in lists]) for place in (0, 1))
    task = EvaluationTask(
        users=np.arange(USERS),
        known=known,
        relevant=relevant,
        num_items=ITEMS,
        ks=KS,
        segments=segments_of(known, ITEMS),
        candidates=None,
    )
    queries, items = rng.standard_normal((2, max(USERS, ITEMS), 6)).astype(np.float32)
    return task, queries[:USERS], items[:ITEMS]


def lists_of(task: EvaluationTask, user: int) -> tuple[list[int], list[int]]:
    known, relevant = (
        part.items[part.indptr[user] : part.indptr[user + 1]].tolist()
        for part in (task.known, task.relevant)
    )
    return known, relevant


def test_segments_as_a_loop_says() -> None:
    task, queries, items = random_task()
    got = measure(queries, items, task)
    ranked, _ = rank_exact(queries, items, k=10, exclude=task.known)
    counts = np.bincount(task.known.items, minlength=ITEMS)
    assert got.users == USERS
    for name, holds in {
        "cold items": lambda user, item: counts[item] == 0,
        "head items": lambda user, item: task.segments[0].items[item],
        "new users": lambda user, item: not lists_of(task, user)[0],
        "regular users": lambda user, item: len(lists_of(task, user)[0]) >= 5,
    }.items():
        recalls, asked = [], 0
        for user in range(USERS):
            wanted = {item for item in lists_of(task, user)[1] if holds(user, item)}
            asked += len(wanted)
            if wanted:
                recalls.append(len(wanted & set(ranked[user].tolist())) / len(wanted))
        part = got.segments[name]
        assert part is not None
        assert (part.users, part.relevant) == (len(recalls), asked)
        assert part.means["recall@10"] == pytest.approx(np.mean(recalls), abs=1e-12)
    items_total = sum(p.relevant for n, p in got.segments.items() if "items" in n and p)
    assert items_total == got.relevant == len(task.relevant.items)


def test_a_segment_nobody_is_in_has_no_figures() -> None:
    task, queries, items = random_task()
    train = csr([list(range(6))] * USERS)
    task = dataclasses.replace(task, segments=segments_of(train, ITEMS))
    assert measure(queries, items, task).segments["new users"] is None


def test_candidates_are_ranked_among_themselves() -> None:
    task, queries, items = random_task(1)
    cold = np.flatnonzero(np.bincount(task.known.items, minlength=ITEMS) == 0)
    candidates = np.union1d(cold, [0, 1, 2])  # some of which users know
    task = dataclasses.replace(task, candidates=candidates, segments=(), ks=(3,))
    got = measure(queries, items, task)
    scores = np.where(np.isin(np.arange(ITEMS), candidates), queries @ items.T, -np.inf)
    recalls = []
    for user in range(USERS):
        known, wanted = lists_of(task, user)
        scores[user, known] = -np.inf
        top = [i for i in np.argsort(-scores[user])[:3] if scores[user, i] > -np.inf]
        recalls.append(len(set(top) & set(wanted)) / len(wanted))
    assert got.means["recall@3"] == pytest.approx(np.mean(recalls))


def as_json(result: MetricResult) -> dict:
    return dataclasses.asdict(result)


def one_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world
    )
    task, queries, items = random_task(2)
    mine = shared(task)
    results = {"all": measure(queries[mine.users], items, mine)}
    few = shared(dataclasses.replace(task, users=task.users[:1]))  # rank 1 has nobody
    results["few"] = measure(queries[few.users], items, few)
    dataset = open_dataset(folder / "data")
    for baseline in Baseline:
        results[baseline] = evaluate_baseline(baseline, dataset, ks=(5,), with_segments=True)
    write_json(folder / f"{rank}.json", {name: as_json(r) for name, r in results.items()})
    dist.destroy_process_group()


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data")
    task, queries, items = random_task(2)
    few = dataclasses.replace(task, users=task.users[:1])
    expected = {
        "all": measure(queries, items, task),
        "few": measure(queries[:1], items, few),
    } | {b: evaluate_baseline(b, dataset, ks=(5,), with_segments=True) for b in Baseline}
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(one_rank, args=(2, tmp_path), nprocs=2, start_method="forkserver")
    for rank in range(2):
        got = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, result in expected.items():
            assert flat(got[name]) == pytest.approx(flat(as_json(result)), abs=1e-12), name


def flat(value: dict, prefix: str = "") -> dict[str, float]:
    """Every number of a nested result by its path; None counts as -1."""
    out: dict[str, float] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            out |= flat(part, f"{prefix}{name}/")
        elif not isinstance(part, str):
            out[prefix + name] = -1.0 if part is None else part
    return out


def test_nothing_to_measure() -> None:
    task, queries, items = random_task()
    with pytest.raises(InvalidInput, match="nothing to measure"):
        measure(queries[:0], items, dataclasses.replace(task, users=task.users[:0]))
