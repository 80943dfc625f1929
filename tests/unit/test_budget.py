"""The waterfall by hand, through real generations of a tiny trained model, and by its command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shardline.cluster.build import BuildPlan, build_generation, run_here
from shardline.cluster.cli import cli
from shardline.cluster.commands.budget import measure_budget
from shardline.cluster.console import StageProgress
from shardline.cluster.store import Store
from shardline.shards.core.errors import CorruptFile, DataError, InvalidInput, NotFound
from shardline.shards.core.partition import Partitioning
from shardline.shards.core.recall import exact_scores, without_repeats
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.index.spec import IndexSpec
from shardline.training.data.csr import Csr
from shardline.training.data.table_writer import write_dataset
from shardline.training.data.tables import Dataset
from shardline.training.evaluation.budget import (
    BudgetStage,
    ExactRanking,
    recall_budget,
    waterfall,
)
from shardline.training.evaluation.evaluate import evaluate_exact
from shardline.training.evaluation.user_queries import EvaluationTask, evaluation_task
from shardline.training.export import export
from shardline.training.loop.run_rank import train_rank
from tests.engine import write_set
from tests.tiny import declared_run, tiny_config, tiny_dataset

KINDS = {
    "flat": {"kind": "flat"},
    "ivf": {"kind": "ivf", "nlist": 6, "nprobe": 1},
    "pq": {"kind": "pq", "m": 4, "nbits": 4},
    "ivfpq": {"kind": "ivfpq", "nlist": 4, "nprobe": 1, "m": 4, "nbits": 4, "rerank": "none"},
    "ivfpq-fs": {"kind": "ivfpq-fs", "nlist": 4, "nprobe": 1, "m": 8, "rerank": "fp16"},
    "hnsw": {"kind": "hnsw", "hnsw_m": 2, "ef_construction": 4, "ef_search": 20},
    "sq8": {"kind": "sq8"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path, Dataset]:
    folder = tmp_path_factory.mktemp("budget")
    dataset = tiny_dataset(folder / "data")
    config = tiny_config(epochs=3)
    train_rank(declared_run(folder / "run", config, dataset), torch.device("cpu"))
    store = Store(folder / "store")
    export(folder / "run", dataset.path, store.root, created_at="2026-01-01T00:00:00Z")
    for spec in KINDS.values():
        plan = BuildPlan(
            spec=IndexSpec(**spec), num_shards=2, partitioning=Partitioning.RANGE, threads=1
        )
        build_generation(store, store.newest_embeddings(), plan, run_jobs=run_here)
    store.set_current(1)
    return store, folder / "run", dataset


def budget_of(store: Store, dataset: Dataset, number: int | None, **changes: object) -> list:
    options = {"generation": number, "cluster": None, "max_users": None} | changes
    return measure_budget(store, dataset, "test", (5, 10), StageProgress(), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_of_each_kind(trained: tuple[Store, Path, Dataset], kind: str) -> None:
    store, run, dataset = trained
    results = budget_of(store, dataset, list(KINDS).index(kind) + 1)
    names = [result.name for result in results]
    reranked = ["re-ranked"] if kind == "ivfpq-fs" else []
    assert names == ["model", "codes", *reranked, "configured"]
    exact = evaluate_exact(run, dataset, ks=(5, 10))
    assert results[0].metrics.means == pytest.approx(exact.means, abs=1e-9)
    assert results[0].metrics.users == 40
    agreement = {result.name: result.agreement[10] for result in results}
    assert agreement["model"] == 1.0
    if kind in ("flat", "ivf", "hnsw"):
        assert agreement["codes"] == 1.0
    if kind in ("flat", "pq", "sq8"):
        assert agreement["configured"] == agreement["codes"]
    if kind in ("ivf", "ivfpq", "ivfpq-fs"):  # one list of a few
        assert agreement["configured"] < agreement[names[-2]]
    if kind in ("pq", "ivfpq"):
        assert agreement["codes"] < 1.0
    if reranked:
        assert agreement["re-ranked"] > agreement["codes"]
    steps = waterfall(results, 10)
    assert [step.recall for step in steps] == [r.metrics.means["recall@10"] for r in results]
    assert 1.0 + sum(step.change for step in steps) == pytest.approx(steps[-1].recall)


def test_the_live_generation_is_the_default(trained: tuple[Store, Path, Dataset]) -> None:
    store, _, dataset = trained
    results = budget_of(store, dataset, None, max_users=7)
    assert results[0].metrics.users == 7
    assert results[-1].about == "no knobs"


def test_what_is_missing_is_named(trained: tuple[Store, Path, Dataset], tmp_path: Path) -> None:
    store, _, dataset = trained
    with pytest.raises(NotFound):
        budget_of(store, dataset, 99)
    with pytest.raises(NotFound, match="shardline build"):
        budget_of(Store(tmp_path), dataset, None)
    with pytest.raises(InvalidInput, match="k: "):
        measure_budget(
            store, dataset, "test", (61,), StageProgress(),
            generation=1, cluster=None, max_users=None,
        )  # fmt: skip


def test_embeddings_that_are_gone_are_named(
    trained: tuple[Store, Path, Dataset], tmp_path: Path
) -> None:
    store, _, dataset = trained
    bare = Store(tmp_path)
    bare.generations.mkdir()
    bare.generation(1).symlink_to(store.generation(1), target_is_directory=True)
    with pytest.raises(NotFound, match="embedding set that the generation was built from is gone"):
        budget_of(bare, dataset, 1)


def test_an_altered_shard_is_refused(trained: tuple[Store, Path, Dataset], tmp_path: Path) -> None:
    store, _, dataset = trained
    shutil.copytree(store.root, tmp_path / "store")
    index = tmp_path / "store" / "generations" / "000001" / "shard-00001" / "index.faiss"
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(bytes(content))
    with pytest.raises(CorruptFile, match=r"index\.faiss"):
        budget_of(Store(tmp_path / "store"), dataset, 1)


def test_the_budget_by_hand() -> None:
    """Two users over items 0 to 5 with ids 10 to 60; user 0 knows item 0."""
    task = EvaluationTask(
        users=np.array([0, 1]),
        known=Csr(np.array([0, 1, 1]), np.array([0])),
        relevant=Csr(np.array([0, 2, 3]), np.array([1, 4, 2])),
        num_items=6,
        ks=(2,),
        segments=(),
        candidates=None,
    )
    exact = np.array([[10, 20, 50], [30, 40, 60]])
    poor = np.array([[20, 77, 10], [40, 60, -1]])  # 77 is no item of the dataset
    item_ids = np.arange(1, 7) * 10
    asked: list[int] = []

    def stage(name: str, answers: np.ndarray) -> BudgetStage:
        def ask(places: np.ndarray, k: int) -> np.ndarray:
            asked.append(k)
            return answers[places]

        return BudgetStage(name=name, about="", ask=ask)

    scores = [{10: 1.0, 20: 0.9, 50: 0.8, 30: 0.1}, {30: 0.9, 40: 0.8, 60: 0.7}]

    def score(places: np.ndarray, ids: np.ndarray) -> np.ndarray:
        rows = [
            [scores[place].get(item, -np.inf) for item in row.tolist()]
            for place, row in zip(places, ids, strict=True)
        ]
        return np.array(rows, np.float32)

    stages = [stage("exact", exact), stage("poor", poor)]
    found = recall_budget(stages, task, item_ids, score=score)
    assert asked == [3, 3]  # one more, for the known item
    first, second = waterfall(found, 2)
    assert (first.recall, first.change, first.agreement) == (1.0, 0.0, 1.0)
    # user 0 finds 20 of 20 and 50, user 1 nothing; they share 20, and 40, of four
    assert (second.recall, second.change, second.agreement) == (0.25, -0.75, 0.5)


def test_an_item_with_the_score_of_the_last_exact_one_agrees() -> None:
    task = EvaluationTask(
        users=np.array([0]),
        known=Csr(np.array([0, 0]), np.empty(0, np.int64)),
        relevant=Csr(np.array([0, 1]), np.array([0])),
        num_items=4,
        ks=(2,),
        segments=(),
        candidates=None,
    )
    answers = {"exact": [[0, 1]], "copies": [[2, 3]], "repeats": [[2, 2]]}
    stages = [
        BudgetStage(name=name, about="", ask=lambda places, k, found=found: np.array(found)[places])
        for name, found in answers.items()
    ]
    vectors = np.ones((4, 2), np.float32)  # all alike: any two are a right answer

    def score(places: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return exact_scores(vectors[places], vectors, without_repeats(ids), Metric.DOT)

    found = recall_budget(stages, task, np.arange(4), score=score)
    assert [stage.agreement[2] for stage in found] == [1.0, 1.0, 0.5]


def test_items_with_equal_vectors_agree_whichever_is_answered(tmp_path: Path) -> None:
    """Thirty copies of each of ten vectors: another copy agrees, another vector does not."""
    rng = np.random.default_rng(4)
    vectors = np.tile(normalise(rng.standard_normal((10, 6)).astype(np.float32)), (30, 1))
    corpus = write_set(tmp_path / "set", vectors, np.arange(300) * 3, metric=Metric.COSINE)
    queries = normalise(rng.standard_normal((4, 6)).astype(np.float32))
    exact = ExactRanking(queries, corpus)
    task = EvaluationTask(
        users=np.arange(4),
        known=Csr(np.arange(5), exact.ask(np.arange(4), 1)[:, 0] // 3),
        relevant=Csr(np.arange(5), np.arange(4)),
        num_items=300,
        ks=(5, 20),
        segments=(),
        candidates=None,
    )

    def other_copies(places: np.ndarray, k: int) -> np.ndarray:
        return (exact.ask(places, k) + 3 * 250) % 900  # 250 rows on, which are 25 copies

    def other_vectors(places: np.ndarray, k: int) -> np.ndarray:
        return (exact.ask(places, k) + 3) % 900

    def one_copy_repeated(places: np.ndarray, k: int) -> np.ndarray:
        answer = exact.ask(places, k)
        answer[:, 2:] = answer[:, 1:2]  # the first is known
        return answer

    asks = (exact.ask, other_copies, other_vectors)
    stages = [BudgetStage(name="", about="", ask=ask) for ask in asks]
    found = recall_budget(stages, task, np.arange(300) * 3, score=exact.score)
    assert [result.agreement for result in found] == [
        {5: 1.0, 20: 1.0}, {5: 1.0, 20: 1.0}, {5: 0.0, 20: 0.0},
    ]  # fmt: skip
    scored = exact.score(np.arange(4), one_copy_repeated(np.arange(4), 21))
    assert (np.isfinite(scored).sum(axis=1) == 2).all()
    assert np.isneginf(exact.score(np.arange(4), np.array([[-1, 1, 900]] * 4))).all()


def command(store: Store, run: Path, dataset: Dataset, *options: str) -> str:
    """What `shardline evaluate` prints."""
    arguments = ["--store", str(store.root), "evaluate", "--data", str(dataset.path)]
    where = [] if "--budget" in options else ["--run", str(run)]
    done = CliRunner().invoke(
        cli, [*arguments, *where, *options], catch_exceptions=False, standalone_mode=False
    )
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_command_prints_segments(trained: tuple[Store, Path, Dataset]) -> None:
    report = json.loads(command(*trained, "--segments", "--k", "5", "--json"))
    assert report["segments"].keys() == {"model", "popularity", "svd"}
    head = report["segments"]["model"]["head items"]
    assert head.keys() > {"users", "relevant", "recall@5", "ndcg@5"}
    assert report["segments"]["model"]["new users"] is None  # six train items each
    assert report["about"]["svd"].endswith("factors")
    parts = [p for n, p in report["segments"]["svd"].items() if p and n.endswith("items")]
    assert sum(part["relevant"] for part in parts) == 40
    table = command(*trained, "--segments", "--k", "5")
    assert "recall@5 by segment" in table
    assert "torso items" in table


def test_the_command_prints_a_waterfall(trained: tuple[Store, Path, Dataset]) -> None:
    options = ("--budget", "--generation", "5", "--k", "10")
    report = json.loads(command(*trained, *options, "--json"))
    assert [step["name"] for step in report["waterfall"]["recall@10"]] == [
        "model", "codes", "re-ranked", "configured",
    ]  # fmt: skip
    assert report["stages"][0]["agreement@10"] == 1.0
    table = command(*trained, *options)
    assert "all relevant items" in table
    assert "nprobe 1 of 4" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--generation", "1"), "a generation's files, a run, or a cluster"),  # --run is given
        (("--budget", "--segments"), "--budget ranks all items"),
        (("--candidates", "cold", "--segments"), "cold candidates are ranked exactly"),
    ],
)
def test_contradictions_are_refused(
    trained: tuple[Store, Path, Dataset], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        command(*trained, *options)


def test_an_empty_split_is_refused_by_every_way(
    trained: tuple[Store, Path, Dataset], tmp_path: Path
) -> None:
    store, run, dataset = trained
    bare = write_dataset(
        tmp_path / "d",
        dataset.users(),
        dataset.items(),
        dataset.interactions("train"),
        name="untested",
    )
    for options in (("--budget",), ("--candidates", "cold")):
        with pytest.raises((InvalidInput, DataError)):
            command(store, run, bare, *options)
    with pytest.raises(InvalidInput, match=r"nothing to measure.*no interactions in test"):
        evaluation_task(bare, "test")
