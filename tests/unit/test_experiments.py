"""Experiments: which key gets which arm, what an arm's settings do, and which are refused."""

import contextlib
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from shardline.cluster.config import load_config
from shardline.router.experiments.assignment import ARM_HEADER, Experiments, point_of
from shardline.router.experiments.experiment_config import ArmConfig, ExperimentConfig
from shardline.router.http.api import create_app
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.errors import ConfigError, InvalidInput
from shardline.shards.core.messages import SearchParams, SearchRequest
from shardline.shards.core.metrics import ARM_RECALL, ARM_REQUEST_MS, ARM_REQUESTS
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import SECRET, make_rows, make_table, running_shards

DIM = 8
KEYS = 100_000


def experiment(name: str, /, **arms: tuple[float, dict[str, Any]]) -> ExperimentConfig:
    return ExperimentConfig(
        name=name,
        arms=tuple(
            ArmConfig(name=arm, share=share, search=search) for arm, (share, search) in arms.items()
        ),
    )


NPROBE = experiment("probes", control=(0.5, {}), few=(0.5, {"params": {"nprobe": 2}}))
DEPTH = experiment("depth", ten=(0.9, {"k": 10}), five=(0.1, {"k": 5}))


def by_arm(experiments: Experiments, name: str, count: int = KEYS) -> list[str]:
    return [dict(experiments.arms_of(f"user-{n}"))[name] for n in range(count)]


# Assignment


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.3, 0.5), (0.98, 0.01, 0.01)])
def test_arms_get_their_shares_of_the_keys(shares: tuple[float, ...]) -> None:
    names = [f"arm{n}" for n in range(len(shares))]
    given = experiment("x", **{n: (s, {}) for n, s in zip(names, shares, strict=True)})
    got = by_arm(Experiments([given]), "x")
    counts = np.array([got.count(name) for name in names])
    wanted = np.array(shares) * KEYS
    chi_square = ((counts - wanted) ** 2 / wanted).sum()
    assert chi_square < 13.8, "the .001 quantile of two degrees of freedom; keys are fixed"


def test_points_are_even_and_independent_across_experiments() -> None:
    points = np.array([[point_of(name, f"user-{n}") for name in "ab"] for n in range(20_000)])
    assert points.min() >= 0 and points.max() < 1
    cells, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=10)
    assert ((cells - 200) ** 2 / 200).sum() < 149, "the .001 quantile of 99 degrees of freedom"


def test_a_key_keeps_its_arm() -> None:
    """Values that must stay for ever: another hash would move the users of every experiment."""
    assert [round(point_of("probes", key), 6) for key in ("", "user-1", "ü")] == [
        0.454962,
        0.469678,
        0.811237,
    ]
    assert by_arm(Experiments([NPROBE]), "probes", 8) == by_arm(
        Experiments([DEPTH, NPROBE]), "probes", 8
    )


def test_an_arm_that_is_added_at_the_end_takes_keys_of_the_arm_before_alone() -> None:
    before = by_arm(Experiments([experiment("x", a=(0.5, {}), b=(0.5, {}))]), "x", 5000)
    after = by_arm(Experiments([experiment("x", a=(0.5, {}), b=(0.2, {}), c=(0.3, {}))]), "x", 5000)
    moved = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert moved == {("b", "c")}


def test_shares_that_sum_to_one_but_for_rounding_leave_no_key_without_an_arm() -> None:
    arms = {f"a{n}": (1 / 3 - 3e-7, {}) for n in range(3)}
    assert set(by_arm(Experiments([experiment("x", **arms)]), "x", 1000)) == set(arms)


# Headers and fields


def test_a_header_names_arms() -> None:
    made = Experiments([NPROBE, DEPTH])
    assert made.parsed("probes=few") == {"probes": "few"}
    assert made.parsed(" depth = five, probes=few ") == {"depth": "five", "probes": "few"}
    for bad in ("", "probes", "probes=", "other=few", "probes=five", "probes=few,probes=few"):
        with pytest.raises(InvalidInput) as caught:
            made.parsed(bad)
        assert caught.value.field == ARM_HEADER
        assert caught.value.expected and caught.value.got


def test_without_a_key_only_what_the_header_names_is_assigned() -> None:
    made = Experiments([NPROBE, DEPTH])
    assert made.assign(None, {}) == ()
    assert made.assign(None, {"depth": "five"}) == (("depth", "five"),)
    hashed = dict(made.assign("user-1", {}))
    assert dict(made.assign("user-1", {"depth": "five"})) == {**hashed, "depth": "five"}


PARTS = experiment(
    "parts", only=(1.0, {"params": {"nprobe": 3, "rerank_factor": 2}, "k": 7, "exact": False})
)
MORE = experiment("more", only=(1.0, {"params": {"ef_search": 9}}))


@pytest.mark.parametrize(
    ("given", "params", "is_whole"),
    [
        ({}, {"nprobe": 3, "rerank_factor": 2, "ef_search": 9}, True),
        ({"params": None, "k": None}, {"nprobe": 3, "rerank_factor": 2, "ef_search": 9}, True),
        (
            {"params": {"nprobe": 1}},
            {"nprobe": 1, "rerank_factor": 2, "ef_search": 9},
            False,
        ),
        ({"params": {"ef_search": 1}}, {"nprobe": 3, "rerank_factor": 2, "ef_search": 1}, False),
        ({"params": "x"}, "x", False),
    ],
)
def test_what_a_request_gives_itself_stays(given: Any, params: Any, is_whole: bool) -> None:
    made = Experiments([PARTS, MORE])
    arms = made.arms_of("anybody")
    whole, found = made.filled(given, arms)
    assert whole["params"] == params
    assert (whole["k"], whole["exact"]) == (7, False)
    assert found == is_whole
    assert made.filled({"k": 3}, arms) == (
        {"k": 3, "exact": False, "params": {"nprobe": 3, "rerank_factor": 2, "ef_search": 9}},
        False,
    )


# Through the API

CONFIG = RouterConfig(
    experiments=(NPROBE, DEPTH), max_k=50, default_k=20, backoff_base_ms=1, cache_bytes=0
)


@contextlib.asynccontextmanager
async def api(config: RouterConfig = CONFIG):
    ids, vectors = make_rows(60, DIM)
    async with running_shards(ids, vectors, 2) as shards:
        service = SearchService(config, SECRET, load_encoder=lambda _: FakeEncoder(DIM, "m1"))
        await service.apply(make_table(shards, DIM))
        transport = httpx.ASGITransport(app=create_app(service, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            yield http, shards, service
        await service.close()


async def test_a_search_has_the_settings_of_its_arms_and_says_which_they_are() -> None:
    async with api() as (http, shards, service):
        for number in range(20):
            key = f"user-{number}"
            shards[0].requests.clear()
            body = {"item_ids": [3], "experiment_key": key}
            answer = (await http.post("/v1/search", json=body)).json()
            arms = dict(service.experiments.arms_of(key))
            assert answer["arms"] == arms
            assert len(answer["ids"][0]) == {"ten": 10, "five": 5}[arms["depth"]]
            (asked,) = [r for r in shards[0].requests if isinstance(r, SearchRequest)]
            wanted = SearchParams(nprobe=2) if arms["probes"] == "few" else SearchParams()
            assert asked.params == wanted
        totals = service.recorder._totals
        counted = {labels: n for (metric, labels), n in totals.items() if metric is ARM_REQUESTS}
        assert sum(n for labels, n in counted.items() if labels[0] == "probes") == 20
        assert {labels[1:] for labels in counted} >= {("few", "ok"), ("control", "ok")}
        seen = [
            labels for metric, _, labels in service.recorder._observed if metric is ARM_REQUEST_MS
        ]
        assert len(seen) == 40
        assert {each["arm"] for each in service.status()["experiments"]} == {
            "control",
            "few",
            "ten",
            "five",
        }


async def test_without_a_key_a_search_is_in_no_experiment() -> None:
    async with api() as (http, _, service):
        answer = (await http.post("/v1/search", json={"item_ids": [3]})).json()
        assert "arms" not in answer and len(answer["ids"][0]) == 20
        assert not any(metric is ARM_REQUESTS for metric, _ in service.recorder._totals)


async def test_a_header_overrides_the_key_and_needs_none() -> None:
    async with api() as (http, _, _):
        for body in ({"item_ids": [3]}, {"item_ids": [3], "experiment_key": "user-1"}):
            answer = await http.post(
                "/v1/search", json=body, headers={ARM_HEADER: "depth=five,probes=few"}
            )
            assert answer.json()["arms"] == {"probes": "few", "depth": "five"}
            assert len(answer.json()["ids"][0]) == 5
        refused = await http.post(
            "/v1/search", json={"item_ids": [3]}, headers={ARM_HEADER: "depth=six"}
        )
        assert refused.status_code == 400
        assert refused.json()["field"] == ARM_HEADER
        assert refused.json()["expected"] == "an arm of depth: ten, five"


async def test_the_request_itself_wins() -> None:
    async with api() as (http, shards, _):
        body = {"item_ids": [3], "experiment_key": "u", "k": 3, "params": {"nprobe": 7}}
        answer = await http.post("/v1/search", json=body, headers={ARM_HEADER: "probes=few"})
        assert len(answer.json()["ids"][0]) == 3
        assert answer.json()["arms"]["probes"] == "few"
        asked = [r for r in shards[0].requests if isinstance(r, SearchRequest)]
        assert {r.params for r in asked} == {SearchParams(nprobe=7)}


@pytest.mark.parametrize("key", ["", "x" * 257, 7, ["a"]])
async def test_keys_of_another_form_are_refused(key: object) -> None:
    async with api() as (http, _, _):
        refused = await http.post("/v1/search", json={"item_ids": [3], "experiment_key": key})
        assert (refused.status_code, refused.json()["field"]) == (400, "experiment_key")


async def test_an_error_says_that_the_value_is_an_arms() -> None:
    named = experiment("shown", title=(1.0, {"return": ["title"]}))
    async with api(CONFIG.model_copy(update={"experiments": (named,), "max_k": 2000})) as made:
        body = {"item_ids": [3] * 200, "k": 2000, "experiment_key": "u"}
        refused = (await made[0].post("/v1/search", json=body)).json()
        assert refused["field"] == "return"
        assert "arm title of experiment shown" in refused["hint"]


async def test_failed_searches_are_counted_by_code() -> None:
    async with api() as (http, shards, service):
        for shard in shards:
            shard.reply = lambda _: None  # never answers
        body = {"item_ids": [3], "experiment_key": "u", "timeout_ms": 20}
        assert (await http.post("/v1/search", json=body)).status_code in (503, 504)
        counted = [labels for metric, labels in service.recorder._totals if metric is ARM_REQUESTS]
        assert {labels[2] for labels in counted} <= {"deadline_exceeded", "unavailable"}
        assert len(counted) == 2


# The configuration


def test_the_configuration_takes_experiments(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        """
router:
  experiments:
    - name: probes
      arms:
        - {name: control, share: 0.9}
        - {name: few, share: 0.1, search: {params: {nprobe: 4}, k: 20}}
"""
    )
    (found,) = load_config(path).router.experiments
    assert [arm.name for arm in found.arms] == ["control", "few"]
    assert found.arms[1].search == {"params": {"nprobe": 4}, "k": 20}


def arms(*given: dict[str, Any]) -> str:
    return f"router.experiments={[{'name': 'x', 'arms': list(given)}]}"


A, B = {"name": "a", "share": 0.5}, {"name": "b", "share": 0.5}
BAD = {
    "shares": (arms(A, {**B, "share": 0.4}), "router.experiments.0", "sum to 0.9, not to 1"),
    "share of none": (arms(A, {**B, "share": 0}), "router.experiments.0.arms.1.share", "greater"),
    "twice": (arms(A, {**A}), "router.experiments.0", "two arms are called a"),
    "no arm": (arms(), "router.experiments.0.arms", "at least 1"),
    "name": (arms({"name": "a=b", "share": 1}), "router.experiments.0.arms.0.name", "pattern"),
    "too many": (
        arms(*({"name": f"a{n}", "share": 1 / 17} for n in range(17))),
        "router.experiments.0.arms",
        "at most 16",
    ),
    "unknown key": (arms({**A, "weight": 1}, B), "router.experiments.0.arms.0.weight", "unknown"),
    "unknown field": (
        arms({**A, "search": {"nprobe": 4}}, B),
        "router.experiments.0.arms.0.search.nprobe",
        "unknown field",
    ),
    "wrong value": (
        arms(A, {**B, "search": {"params": {"nprobe": 0}}}),
        "router.experiments.0.arms.1.search.params.nprobe",
        "wrong value",
    ),
    "beyond max_k": (
        arms(A, {**B, "search": {"k": 10**6}}),
        "router.experiments.0.arms.1.search.k",
        "",
    ),
    "a query": (
        arms(A, {**B, "search": {"item_ids": [1]}}),
        "router.experiments.0.arms.1.search.item_ids",
        "each request says for itself",
    ),
    "a filter for each of one query": (
        arms(A, {**B, "search": {"filter": [{"price": 1}]}}),
        "router.experiments.0.arms.1.search.filter",
        "wrong number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_hold_together_is_refused(case: str) -> None:
    override, field, text = BAD[case]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert caught.value.field == field
    assert text in str(caught.value)


def test_two_experiments_must_not_set_the_same_field() -> None:
    other = experiment("other", all=(1.0, {"params": {"nprobe": 9}}))
    with pytest.raises(ValidationError, match=r"params\.nprobe is set by two experiments"):
        RouterConfig(experiments=(NPROBE, other))
    RouterConfig(experiments=(NPROBE, MORE))
    with pytest.raises(ValidationError, match="two experiments are called probes"):
        RouterConfig(experiments=(NPROBE, NPROBE))


def test_metrics_of_arms_have_the_configured_names_alone() -> None:
    assert Experiments([NPROBE, DEPTH]).all_arms == (
        ("probes", "control"),
        ("probes", "few"),
        ("depth", "ten"),
        ("depth", "five"),
    )
    assert ARM_RECALL.labels == ("experiment", "arm")
