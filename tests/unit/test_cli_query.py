"""`shardline query` with a cluster that is made up: what it prints, and how it ends."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from shardline.cluster.cli import main
from shardline.cluster.commands import query as module
from shardline.router.client.answers import Coverage, Degraded, Reason, SearchAnswer
from shardline.router.fanout.snapshot import TableSnapshot, UnusableEncoder
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import Absence, ReplicaKey, ReplicaRoute, ShardRoute
from tests.fake_shard import make_table

KNOWN = {3: [7, 9], 42: [1, 2]}  # item -> its neighbours


class FakeClient:
    """Knows two items; remembers what it was asked."""

    def __init__(self) -> None:
        self.index = "flat"
        self.missing: list[str] = []  # why shards did not answer the search
        self.unasked: list[str] = []  # why they did not look items up
        self.refusal: InvalidInput | None = None
        self.matched: int | None = None  # items that match the filter of any query
        self.asked: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {}
        self.arms: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def client(self) -> Self:
        return self

    def status(self) -> dict[str, Any]:
        return {"index": self.index, **self.report}

    def search(self, **asked: Any) -> SearchAnswer:
        self.asked.append(asked)
        if self.refusal is not None:
            raise self.refusal
        items = asked.get("item_ids", [42])
        where = f" in the shards that answered ({'; '.join(self.unasked)})" if self.unasked else ""
        missing = list(dict.fromkeys(self.unasked + self.missing))
        ids = np.array([KNOWN.get(item, [-1, -1]) for item in items], dtype=np.int64)
        code = "not_found_partial" if self.unasked else "not_found"
        return SearchAnswer(
            ids=ids,
            scores=np.where(ids < 0, -np.inf, 0.5).astype(np.float32),
            generation=6,
            model_version="m",
            coverage=Coverage(
                shards_asked=2,
                shards_answered=2 - len(missing),
                rows_asked=20,
                rows_answered=20 - 10 * len(missing),
                degraded=tuple(Degraded(shard=1, code="timeout", text=text) for text in missing),
            ),
            took_ms=1.0,
            search_ms=0.5,
            reasons=tuple(
                Reason(query=place, code=code, text=f"item {item} not found{where}")
                for place, item in enumerate(items)
                if item not in KNOWN
            )
            + tuple(
                Reason(query=place, code="filter", text="1 item matches", matched=self.matched)
                for place, item in enumerate(items)
                if item in KNOWN and self.matched is not None
            ),
            request_id="r",
            arms=self.arms,
        )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(module, "address_of", lambda *_: fake)
    return fake


def query(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["query", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_known_items_are_answered(cluster: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = query(capsys, "--item", "42", "--item", "3", "-k", "2")
    assert (code, err) == (0, "")
    assert out.index("similar to item 42") < out.index("similar to item 3")
    assert "4 results from generation 6, 20 of 20 rows" in out
    assert [asked["item_ids"] for asked in cluster.asked] == [[42, 3]]


def test_an_unknown_item_is_named_and_ends_in_3(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = query(capsys, "--item", "5")
    assert (code, out, err) == (3, "", "error: no item 5 in generation 6\n")


def test_unknown_items_among_known_ones_are_named(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = query(capsys, "--item", "5", "--item", "42", "--item", "6")
    assert (code, err) == (3, "error: no item 5, 6 in generation 6\n")
    assert "similar to item 42" in out
    assert "item 5" not in out
    assert "2 results" in out


def test_an_item_that_a_silent_shard_may_hold_is_not_called_unknown(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.unasked = ["did not answer"]
    code, _, err = query(capsys, "--item", "5")
    assert code == 4
    assert "partial: shard 1: did not answer" in err
    expected = "error: item 5 not found in the shards that answered (did not answer); `sha"
    assert expected in err


def test_an_item_that_every_shard_looked_for_is_unknown_though_one_missed_the_search(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.missing = ["did not answer"]
    code, out, err = query(capsys, "--item", "5", "--item", "42")
    assert code == 3
    assert "similar to item 42" in out
    assert err == "partial: shard 1: did not answer\nerror: no item 5 in generation 6\n"


def test_json_says_which_item_a_result_is_similar_to(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = query(capsys, "--json", "--item", "5", "--item", "42")
    report = json.loads(out)
    assert code == 3
    assert report["results"] == [
        {"item_id": 1, "score": 0.5, "similar_to": 42},
        {"item_id": 2, "score": 0.5, "similar_to": 42},
    ]
    assert report["reasons"] == [{"query": 0, "code": "not_found", "text": "item 5 not found"}]
    code, out, _ = query(capsys, "--json", "--vector", "[1, 2.5]")
    assert code == 0
    assert json.loads(out)["results"][0] == {"item_id": 1, "score": 0.5}


def test_a_filter_is_passed_on_and_a_short_answer_is_no_error(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.matched = 1
    code, out, err = query(capsys, "--item", "42", "--filter", '{"price": {"$lt": 20}}')
    assert cluster.asked[0]["filter"] == {"price": {"$lt": 20}}
    assert (code, err) == (0, "item 42: 1 item matches\n")
    assert "2 results from generation 6" in out
    code, out, err = query(capsys, "--vector", "[1, 2]", "--filter", "{}", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["reasons"] == [
        {"query": 0, "code": "filter", "text": "1 item matches", "matched": 1}
    ]
    code, _, err = query(capsys, "--item", "42", "--item", "5", "--filter", "{}")
    assert code == 3
    assert err == "item 42: 1 item matches\nerror: no item 5 in generation 6\n"


def test_exclusions_are_passed_on_for_every_item(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert query(capsys, "--item", "42", "--item", "42", "--exclude", "1, 2,3")[0] == 0
    assert cluster.asked[0]["exclude"] == [[1, 2, 3]] * 2
    assert query(capsys, "--vector", "[1, 2]", "--exclude", "7")[0] == 0
    assert cluster.asked[1]["exclude"] == [[7]]
    assert query(capsys, "--features", "{}", "--exclude-history")[0] == 0
    assert cluster.asked[2]["exclude_history"] is True
    assert "exclude" not in cluster.asked[2]
    for wrong in ("1,x", "-1", "1.5", str(2**63)):
        assert query(capsys, "--item", "42", "--exclude", wrong)[0] == 2
    assert len(cluster.asked) == 3


def test_a_filter_is_in_the_body_that_is_printed(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = query(capsys, "--item", "42", "--filter", '{"a": 1}', "--print-request")
    assert (code, json.loads(out)["filter"]) == (0, {"a": 1})
    assert cluster.asked == []


def test_caps_boosts_and_diversity_are_passed_on(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--cap", "seller:2", "--boost", "day:0.1:7d", "--diversify", "0.7")
    code, out, _ = query(capsys, "--item", "42", *options)
    asked = cluster.asked[0]
    expected = {
        "cap": [{"column": "seller", "max": 2}],
        "boost": [{"column": "day", "weight": 0.1, "half_life_days": 7}],
        "diversify": {"lambda": 0.7},
    }
    assert code == 0
    assert {name: asked[name] for name in expected} == expected
    code, out, _ = query(capsys, "--item", "42", *options, "--print-request")
    assert json.loads(out).items() >= expected.items()
    query(capsys, "--item", "42")
    assert cluster.asked[-1].keys().isdisjoint(expected)


def test_a_text_is_sent_as_it_is_typed(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert query(capsys, "--text", "red shoes")[0] == 0
    assert cluster.asked[-1]["texts"] == ["red shoes"]
    code, _, err = query(capsys, "--text", "red shoes", "--item", "42")
    assert code == 2 and "exactly one of" in err and "--text" in err


@pytest.mark.parametrize(("index", "warns"), [("flat", True), ("hnsw", True), ("ivfpq-fs", False)])
def test_nprobe_for_an_index_without_lists_is_a_warning(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str], index: str, warns: bool
) -> None:
    cluster.index = index
    code, _, err = query(capsys, "--item", "42", "--nprobe", "4")
    assert code == 0
    assert err == (f"warning: --nprobe changes nothing: the index is of kind {index}\n" * warns)
    assert cluster.asked[0]["params"].nprobe == 4
    assert query(capsys, "--item", "42")[2] == ""


@pytest.mark.parametrize(
    ("field", "typed"),
    [
        ("vectors", "--vector"),
        ("item_ids[1]", "--item"),
        ("features[0].age", "--features.age"),
        ("k", "-k"),
        ("params.nprobe", "--nprobe"),
        ("filter.price.$lt", "--filter.price.$lt"),
        ("cap[1].column", "--cap.column"),
        ("boost[0].weight", "--boost.weight"),
        ("diversify.lambda", "--diversify.lambda"),
        ("exclude[0][1]", "--exclude[1]"),
        ("exclude_history", "--exclude-history"),
        ("timeout_ms", "timeout_ms"),
    ],
)
def test_a_refusal_names_options(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str], field: str, typed: str
) -> None:
    cluster.refusal = InvalidInput("wrong", field=field, hint="send vectors or item_ids")
    code, _, err = query(capsys, "--item", "42")
    assert (code, err) == (2, f"error: {typed}: wrong; ask with --vector or --item\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one of --vector, --features, --item, --text, --user"),
        (("--item", "1", "--vector", "[1]"), "exactly one of"),
        (("--user", "1"), "--user needs --data"),
        (("--vector", "[1,"), "--vector: not JSON; expected a list of numbers"),
        (("--vector", '"a"'), "--vector: not a vector"),
        (("--vector", '[1, "a"]'), "--vector: not a vector"),
        (("--vector", "[true]"), "--vector: not a vector"),
        (
            ("--vector", f"[1, {'9' * 400}]"),
            "--vector: a number too large; expected at most 3.4e+38",
        ),
        (("--vector", "[-1e39]"), "--vector: a number too large"),
        (("--features", "[1]"), "--features: not features; expected names and values"),
        (("--item", "1", "--filter", "[1]"), "--filter: not a filter; expected names and values"),
        (("--item", "1", "--filter", "price<20"), "--filter: not JSON; expected names and values"),
        (("--item", "-1"), "--item: '-1' is not an id of the cluster"),
        (("--item", "9" * 20), "is not an id of the cluster, 0 to 9223372036854775807"),
        (("--item", "SKU 7"), "with --data it may be an id of your own"),
        (("--item", "1", "-k", "0"), "'-k': 0 is not in the range"),
        (("--item", "1", "--nprobe", "0"), "'--nprobe': 0 is not in the range"),
        (("--item", "1", "--url", "here"), "'--url': 'here' is not of the form http://HOST:PORT"),
        *(
            (("--item", "1", "--url", url), f"'--url': '{url}' is not of the form http://HOST:PORT")
            for url in ("http://h:port", "http://h:99999", "http://h:0", "http://", "http://[::1")
        ),
    ],
)
def test_bad_options_are_refused_before_anything_is_asked(
    cluster: FakeClient,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    code, _, err = query(capsys, *arguments)
    assert code == 2
    assert message in err
    assert cluster.asked == []


def test_the_texts_that_are_looked_for_are_the_routers() -> None:
    router = Path(__file__).parents[2] / "router"
    assert module.API_ADVICE[0] in (router / "fanout" / "snapshot.py").read_text()


def test_attributes_that_are_called_as_ours_stand_beside_ours(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = cluster.search(item_ids=[42])
    answer = replace(
        answered,
        attributes={"score": [[77, 78]], "original_id": [["a", None]]},
        original_ids=[["a", "b"]],
        attributes_missing=(Degraded(shard=1, code="timeout", text="late"),),
    )
    monkeypatch.setattr(cluster, "search", lambda **_: answer)
    code, out, err = query(capsys, "--item", "42", "--show", "score,original_id")
    assert (code, err) == (0, "without attributes: shard 1: late\n")
    header = next(line for line in out.splitlines() if "item_id" in line)
    assert header.split()[1::2] == ["item_id", "original_id", "score", "score", "original_id"]
    row = next(line for line in out.splitlines() if "0.5000" in line)
    assert row.split()[1::2] == ["1", "a", "0.5000", "77", "a"]
    report = json.loads(query(capsys, "--item", "42", "--json")[1])
    assert report["results"][1] == {
        "item_id": 2,
        "score": 0.5,
        "original_id": "b",
        "attributes": {"score": 78, "original_id": None},
        "similar_to": 42,
    }


def test_show_is_a_line_of_csv(cluster: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    query(capsys, "--item", "42", "--show", 'a,"b, c"')
    assert cluster.asked[0]["return_"] == ["a", "b, c"]
    assert "not a line of CSV" in query(capsys, "--item", "42", "--show", '"a')[2]


CORRUPT = Absence(
    "corrupt_file",
    f"/{'long/' * 30}generations/000004/shard-00001/index.faiss: wrong checksum; expected 0…",
)


def report_with(*absences: Absence | None) -> dict[str, Any]:
    """A router's status: a shard per absence, None of which answers."""
    shards = []
    for shard, absence in enumerate(absences):
        key = ReplicaKey(4, shard)
        route = ReplicaRoute(key=key, epoch=9, address=None, absence=absence)
        shards.append(ShardRoute(shard=shard, rows=10, replicas=(route,)))
    notes = (Absence("corrupt_file", "counter.json: not a counter"),)
    table = make_table(shards, 8, notes=notes)
    encoder = UnusableEncoder(Absence("not_found", "encoder.json: gone"))
    snapshot = TableSnapshot(table, encoder, tuple((None,) for _ in shards))
    return json.loads(json.dumps(snapshot.describe()))


def test_status_says_why_a_shard_cannot_load_and_what_else_is_wrong(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.report = report_with(None, CORRUPT)
    with pytest.raises(SystemExit):
        main(["status"])
    out = capsys.readouterr().out
    assert f"shard 1, replica 0: corrupt_file: {CORRUPT.text}\n" in out, "unbroken"
    assert "shard 0, replica 0: unavailable: not placed yet\n" in out
    assert [line for line in out.splitlines() if line.startswith("warning: ")] == [
        "warning: state: counter.json: not a counter",
        "warning: query_encoder: encoder.json: gone",
    ]
    with pytest.raises(SystemExit):
        main(["status", "--json"])
    report = json.loads(capsys.readouterr().out)
    replica = report["shards"][1]["replicas"][0]
    assert (replica["code"], replica["reason"]) == (CORRUPT.code, CORRUPT.text)
    assert (report["shards"][1]["code"], report["shards"][1]["reason"]) == (
        CORRUPT.code,
        CORRUPT.text,
    )


def test_status_shows_which_replica_takes_writes(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    routes = tuple(
        ReplicaRoute(key=ReplicaKey(4, 0, number), epoch=9, address=("h", number))
        for number in (3, 4)
    )
    shards = [ShardRoute(shard=0, rows=10, replicas=routes, primary=4)]
    snapshot = TableSnapshot(make_table(shards, 8), None, ((None, None),))
    cluster.report = json.loads(json.dumps(snapshot.describe()))
    assert cluster.report["shards"][0]["primary"] == 4
    with pytest.raises(SystemExit):
        main(["status"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "h:" in line]
    assert ["primary" in line for line in lines] == [False, True]
    del cluster.report["shards"][0]["primary"]  # a router of before
    with pytest.raises(SystemExit):
        main(["status"])
    assert "primary" not in capsys.readouterr().out


def test_status_shows_recall_and_the_repairs_that_are_due(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_with(None)
    cluster.report = report | {
        "quality": {"generation": 4, "recall": 0.8765, "queries": 40, "k": 10, "since": 0.0},
        "repairs": [{"code": "retrain_index", "text": "recall has fallen"}],
    }
    with pytest.raises(SystemExit):
        main(["status"])
    out = capsys.readouterr().out
    assert "recall  0.876 @10, of 40 served queries, against exact answers\n" in out
    assert "repair due: retrain_index: recall has fallen\n" in out
    cluster.report = report | {"quality": None, "repairs": []}
    with pytest.raises(SystemExit):
        main(["status"])
    out = capsys.readouterr().out
    assert "against exact answers" not in out
    assert "repair due" not in out


def test_an_experiment_key_is_sent_and_the_arm_shown(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.arms = {"probes": "few"}
    code, out, _ = query(capsys, "--item", "42", "--experiment-key", "u")
    assert (code, cluster.asked[-1]["experiment_key"]) == (0, "u")
    assert "experiment probes: arm few\n" in out
    _, out, _ = query(capsys, "--item", "42", "--experiment-key", "u", "--json")
    assert json.loads(out)["arms"] == {"probes": "few"}
