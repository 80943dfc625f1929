"""bench/gpu_check.py without a card: arithmetic, budget, resuming, table, and all of it faked."""

import faulthandler
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from shardline.bench import gpu_check
from shardline.bench.gpu import archive, card_checks, check_run
from shardline.bench.gpu.card import (
    Card,
    Corpus,
    Truth,
    add_by_pointer,
    centroids,
    open_card,
    recall,
    reranked,
    search_by_pointer,
)
from shardline.bench.gpu.check_run import MACHINE, NAMES, PARTS, Budget, Part, chosen_parts
from shardline.bench.gpu.check_table import FAKE_LINE, report
from shardline.bench.gpu.floors import (
    CODE_LENGTHS,
    GIB,
    HEADROOM_BYTES,
    TEMP_BYTES,
    Rates,
    code_length,
    faiss_flat_ms,
    flat_floor,
    flat_plan,
    ivf_floor,
    ivf_plan,
    step_floor,
)
from shardline.bench.gpu.part_findings import Findings, Work
from shardline.bench.gpu.part_outcome import (
    Check,
    MemoryUse,
    Outcome,
    Status,
    Timing,
    as_json,
    from_json,
    load,
    save,
)
from shardline.bench.gpu.search_parts import billion, flat
from shardline.bench.gpu.shard_part import shard
from shardline.bench.gpu.sizes import FULL, TINY
from shardline.shards.core.errors import ConfigError, DataError, InvalidInput
from shardline.shards.index import cards
from tests import fake_gpu_faiss as double

ROOT = Path(__file__).parents[2]
RATES = Rates(bytes_per_s=4e12, bf16=800e12, fp16=800e12, fp32=50e12)
SETUP = {"fake": True, "sizes": "tiny", "torch": "2", "faiss": "faiss-cpu 1", "numpy": "2"}
TIMED = Timing(
    what="flat fp16",
    rows=10_000_000,
    batch=8,
    k=100,
    p50_ms=1.3,
    best_ms=1.2,
    p99_ms=None,
    samples=10,
    qps=6153.8,
    recall=0.9991,
    floor_ms=0.65,
    bound_by="bandwidth",
)
RAN = Outcome(
    part="flat-10m",
    status=Status.RAN,
    seconds=3.5,
    timings=(TIMED,),
    checks=(Check(name="memory", passed=True, expected="at most 2", got="1"),),
    memory=(MemoryUse(what="flat", planned=GIB, worst=2 * GIB, used=GIB),),
    notes={"tried": [1, 2]},
)


# ------------------------------------------------------------------ arithmetic


def test_a_flat_index_is_planned_with_its_norms_and_its_vectors_twice_while_it_grows() -> None:
    plan = flat_plan(100_000_000, 128, 2)
    vectors, norms = 100_000_000 * 256, 100_000_000 * 4
    assert plan.bytes == vectors + norms + TEMP_BYTES
    assert plan.worst == 2 * vectors + norms + TEMP_BYTES + HEADROOM_BYTES
    assert plan.held == plan.worst - vectors


def test_lists_are_planned_with_ids_and_doubled_when_they_may_have_just_grown() -> None:
    plan = ivf_plan(1_000_000, 128, 1024, 32, centroid_bytes=2, copies=256)
    rest = 1024 * (256 + 4) + TEMP_BYTES + 256_000_000
    assert plan.bytes == 40_000_000 + rest
    assert plan.worst == plan.held == 80_000_000 + rest + HEADROOM_BYTES


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    plan = flat_plan(10_000_000, 128, 2)
    assert plan.refusal(plan.worst) is None
    refusal = plan.refusal(plan.worst - 1)
    assert refusal is not None
    terms = [float(each) for each in re.findall(r"\d+\.\d+", refusal)]
    assert terms[-2] == pytest.approx(sum(terms[:-2]), abs=0.03)
    assert terms[-1] == pytest.approx(plan.worst / GIB, abs=0.01)


@pytest.mark.parametrize(("free_gib", "expected"), [(139, 64), (100, 32), (60, 16), (40, 8)])
def test_the_longest_code_that_fits_is_taken_for_a_billion_rows(
    free_gib: int, expected: int
) -> None:
    found = code_length(1_000_000_000, 128, 32_768, free_gib * GIB, wanted=64)
    assert found == expected


def test_a_card_that_holds_no_code_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="GiB"):
        code_length(1_000_000_000, 128, 32_768, 8 * GIB, wanted=64)


def test_a_flat_scan_is_bound_by_bandwidth_until_the_batch_is_large() -> None:
    single = flat_floor(10_000_000, 128, 1, 2, RATES)
    assert (single.bound_by, single.ms) == ("bandwidth", pytest.approx(0.64))
    many = flat_floor(10_000_000, 128, 4096, 2, RATES)
    assert many.bound_by == "arithmetic"
    assert many.ms == pytest.approx(1000 * 2 * 1e7 * 128 * 4096 / 800e12)
    wide = flat_floor(10_000_000, 128, 4096, 4, RATES)
    assert wide.ms == pytest.approx(many.ms * 16), "float32 products at the float32 rate"


def test_a_block_is_added_in_one_piece() -> None:
    assert FULL.block_rows <= 512 * 1024 and FULL.block_rows * FULL.dim * 4 <= 256 << 20


def test_faiss_moves_two_float32_scores_per_row_and_query_besides() -> None:
    assert faiss_flat_ms(10_000_000, 128, 64, 2, RATES) == pytest.approx(0.64 * (256 + 512) / 256)


def test_no_list_is_counted_twice_in_the_floor_of_a_batch() -> None:
    codes = 100_000_000 * 32
    floors = [ivf_floor(100_000_000, 128, 16_384, 64, b, 32, RATES).ms for b in (1, 256, 512)]
    centroids_ms = 1000 * 16_384 * 256 / 4e12
    assert floors[0] == pytest.approx(centroids_ms + 1000 * codes * 64 / 16_384 / 4e12)
    assert floors[1] == floors[2] == pytest.approx(centroids_ms + 1000 * codes / 4e12)


def test_the_floor_of_a_step_has_the_optimisers_bytes_and_three_times_the_products() -> None:
    found = step_floor(batch=8192, dim=128, weights=0, parameters=512_000_000, rates=RATES)
    bytes_ms = 1000 * (28 * 512e6 + 4 * 8192**2) / 4e12
    assert found.bound_by == "bandwidth"
    assert found.ms == pytest.approx(bytes_ms + 1000 * 6 * 8192**2 * 128 / 800e12)


# ------------------------------------------------------------------ budget and parts


def test_a_part_is_not_begun_with_less_time_than_it_takes() -> None:
    now = [0.0]
    budget = Budget(seconds=100, started=0, clock=lambda: now[0])
    part = Part("flat-10m", 40, None)
    now[0] = 60
    assert budget.refusal(part, tiny=False) is None
    now[0] = 61
    assert budget.refusal(part, tiny=False) == (
        "expected to take 40 s; 39 s of the budget are left"
    )
    assert budget.refusal(part, tiny=True) is None


def test_all_parts_are_expected_to_fit_into_the_nine_minutes_of_the_default() -> None:
    assert sum(part.seconds for part in PARTS) <= 9 * 60
    assert PARTS[0].name == MACHINE, "every floor is made of its rates"


def test_parts_are_taken_in_their_own_order_and_the_machine_is_always_among_them() -> None:
    assert [part.name for part in chosen_parts(["kinds-1m", "limits"])] == [
        MACHINE,
        "limits",
        "kinds-1m",
    ]
    with pytest.raises(InvalidInput, match=r"--parts.*got flat$"):
        chosen_parts(["flat"])


# ------------------------------------------------------------------ files


def test_an_outcome_survives_its_file(tmp_path: Path) -> None:
    save(tmp_path, RAN, SETUP)
    assert load(tmp_path, "flat-10m", SETUP) == RAN
    written = json.loads((tmp_path / "flat-10m.json").read_text())
    assert written["timings"][0]["times_floor"] == 2.0
    assert list(tmp_path.iterdir()) == [tmp_path / "flat-10m.json"]
    assert from_json(as_json(RAN)) == RAN


def test_results_of_another_version_are_not_mixed_in(tmp_path: Path) -> None:
    save(tmp_path, RAN, SETUP)
    with pytest.raises(DataError, match=r"expected torch 3; got torch 2; .*--fresh"):
        load(tmp_path, "flat-10m", SETUP | {"torch": "3"})


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"setup": {}, "part": 1}'])
def test_a_damaged_result_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    (tmp_path / "limits.json").write_text(damage)
    with pytest.raises(DataError, match=r"limits\.json"):
        load(tmp_path, "limits", SETUP)


# ------------------------------------------------------------------ processes


def block(work: Work, findings: Findings) -> None:
    findings.time(TIMED)
    threading.Event().wait()


def abort(work: Work, findings: Findings) -> None:
    findings.time(TIMED)
    faulthandler.disable()  # pytest's, which would print every thread
    os.write(2, b"Faiss assertion 'p + size == head_' failed\n\n")
    os.abort()


def raise_error(work: Work, findings: Findings) -> None:
    raise RuntimeError("CUDA error 700")


def refuse(work: Work, findings: Findings) -> None:
    work.need(flat_plan(10**9, 128, 2))


def late(work: Work, findings: Findings) -> None:
    work.need_seconds(1000, "adding 7 rows")


@pytest.mark.parametrize(
    ("measure", "seconds", "status", "reason", "kept"),
    [
        (block, 0.8, Status.NOT_RUN, "stopped when the budget was over", 1),
        (abort, 60, Status.FAILED, "signal 6: Faiss assertion 'p + size == head_' failed", 1),
        (raise_error, 60, Status.FAILED, "exit code 1: RuntimeError: CUDA error 700", 0),
        (refuse, 60, Status.NOT_RUN, "needs vectors 238.42 + new allocation 238.42", 0),
        (late, 60, Status.NOT_RUN, "adding 7 rows needs 1000 s more", 0),
    ],
)
def test_a_part_that_ends_badly_says_how_and_keeps_what_it_had_found(
    tmp_path: Path,
    measure: Callable[[Work, Findings], None],
    seconds: float,
    status: Status,
    reason: str,
    kept: int,
) -> None:
    budget = Budget(seconds=seconds, started=time.monotonic())
    part = Part("limits", 1, measure)
    found = check_run._in_process(tmp_path, part, TINY, SETUP, RATES, budget)
    assert (found.status, len(found.timings)) == (status, kept)
    assert reason in found.reason
    assert not found.is_complete


@pytest.fixture
def one_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_run, "faiss_wheel", lambda *, fake: "faiss-cpu 1")


@pytest.mark.usefixtures("one_wheel")
def test_what_is_complete_is_not_run_again_and_what_is_not_is(tmp_path: Path) -> None:
    def answer(work: Work, findings: Findings) -> None:
        findings.notes["asked"] = True

    with open_card(fake=True) as card:
        name = card.name
    setup = SETUP | {"torch": torch.__version__, "numpy": np.__version__, "card": name}
    save(tmp_path / "parts", RAN, setup)
    save(tmp_path / "parts", replace(RAN, part="limits", status=Status.NOT_RUN), setup)
    parts = (PARTS[0], Part("flat-10m", 1, abort), Part("limits", 1, answer))
    said: list[str] = []
    found_setup, outcomes = check_run.run(
        tmp_path, parts, minutes=1, fake=True, fresh=False, say=said.append
    )
    assert found_setup == setup
    assert [outcome.status for outcome in outcomes] == [Status.RAN] * 3
    assert outcomes[1].timings == RAN.timings and "earlier" in outcomes[1].reason
    assert outcomes[2].notes == {"asked": True} and outcomes[2].timings == ()
    assert [line.split()[0] for line in said] == [MACHINE, "flat-10m", "limits"]
    with pytest.raises(DataError, match="card"):
        save(tmp_path / "parts", RAN, setup | {"card": "another"})
        check_run.run(tmp_path, parts, minutes=1, fake=True, fresh=False, say=said.append)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.usefixtures("one_wheel")
def test_without_a_card_nothing_runs_and_every_part_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = gpu_check.main(["--out", str(tmp_path), "--parts", "limits,kinds-1m"])
    assert code == gpu_check.REFUSED
    content = json.loads((tmp_path / gpu_check.JSON_NAME).read_text())
    reasons = {part["part"]: part["reason"] for part in content["parts"]}
    assert reasons[MACHINE].startswith("torch sees no card; expected a CUDA device")
    assert reasons["limits"] == reasons["kinds-1m"] == "needs the part machine"
    assert FAKE_LINE not in capsys.readouterr().out


def test_bad_input_is_one_line_and_nothing_is_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, field in ((["--minutes", "0"], "--minutes"), (["--parts", "x"], "--parts")):
        code = gpu_check.main(["--fake", "--out", str(tmp_path / "new"), *arguments])
        error = capsys.readouterr().err
        assert code == gpu_check.REFUSED
        assert error.startswith(f"gpu-check: {field}: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("wheels", "fake", "expected"),
    [
        ({"faiss-gpu": "1.15.1"}, False, "faiss-gpu 1.15.1"),
        ({"faiss-cpu": "1.15.1"}, True, "faiss-cpu 1.15.1"),
        ({"faiss-cpu": "1.15.1"}, False, None),
        ({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}, True, None),
        ({}, True, None),
    ],
)
def test_exactly_one_wheel_of_faiss_is_taken(
    wheels: dict[str, str], fake: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_run, "_version", wheels.get)
    if expected is not None:
        assert check_run.faiss_wheel(fake=fake) == expected
        return
    with pytest.raises(ConfigError, match="exactly one of faiss-gpu, faiss-gpu-cuvs"):
        check_run.faiss_wheel(fake=fake)


# ------------------------------------------------------------------ the table


def test_the_table_shows_figures_beside_floors_and_what_is_wrong_or_missing() -> None:
    wrong = Check(name="remove_ids", passed=False, expected="refused", got="taken")
    outcomes = [
        RAN,
        Outcome(part="limits", status=Status.RAN, checks=(wrong,)),
        Outcome(part="ivfpq-1b", status=Status.NOT_RUN, reason="39 s of the budget are left"),
    ]
    lines = report({"fake": False, "card": "X"}, outcomes)
    assert lines[0] == "fake False, card X"
    header = next(line for line in lines if "times floor" in line)
    row = next(line for line in lines if "10,000,000" in line)
    for column, cell in (("p50 ms", "1.300"), ("times floor", "2.00"), ("recall", "0.9991")):
        assert row[header.index(column) :].startswith(cell)
    assert "checks: 1 of 2 as expected" in lines
    assert "  limits: remove_ids: expected refused, got taken" in lines
    assert lines[-1] == "not run: ivfpq-1b: 39 s of the budget are left"
    assert report({"fake": True}, outcomes)[0] == FAKE_LINE


# ------------------------------------------------------------------ on the double


@contextmanager
def card_of(fake: double.Card, variant: double.Variant = double.Variant.GPU) -> Iterator[Work]:
    """Tiny work on a card of the double's."""
    with double.installed(fake, variant=variant):
        card = Card(
            faiss=faiss,
            device=torch.device("cpu"),
            fake=True,
            name="double",
            total_bytes=fake.total_bytes,
            memory=lambda: fake.free_bytes,
        )
        yield Work(card=card, sizes=TINY, rates=RATES, seconds_left=lambda: 60.0)


def findings() -> Findings:
    return Findings(part="x", keep=lambda outcome: None)


def test_a_card_that_answers_wrongly_is_found_out() -> None:
    found = findings()
    with card_of(double.Card(wrong=True)) as work:
        card_checks.correctness(work, found)
    failed = {check.name for check in found.checks if not check.passed}
    assert {"flat: scores as on the CPU", "ivfpq8: self-test"} <= failed


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        (double.Card(wrong=True), "the GPU's answers differ from the CPU's"),
        (double.Card(raise_in_search=RuntimeError("a CUDA error")), "the card has failed"),
        (double.Card(total_bytes=GIB // 4), "does not fit on card 0"),
    ],
)
def test_a_card_that_cannot_serve_a_shard_is_found_out(
    fake: double.Card, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings()
    with card_of(fake) as work:
        memory = cards.Memory(fake.free_bytes, fake.total_bytes)
        monkeypatch.setattr(cards, "memory_of", lambda card: memory)
        shard(work, found)
    assert not check_run.passed([found.outcome(Status.RAN, "")])
    failed = [check for check in found.checks if not check.passed]
    assert len(failed) == 6, "of each kind"
    assert all(said in check.got for check in failed), failed


@pytest.mark.parametrize("variant", list(double.Variant))
def test_the_limits_of_both_wheels_are_as_documented(variant: double.Variant) -> None:
    found = findings()
    with card_of(double.Card(), variant) as work:
        card_checks.limits(work, found)
    assert [check for check in found.checks if not check.passed] == []
    k = "k = 16384" if variant is double.Variant.CUVS else "k = 2048"
    assert {check.name: check.got for check in found.checks}[k] == "taken"


def test_a_limit_that_is_not_there_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double, "MAX_K", 4096)
    found = findings()
    with card_of(double.Card()) as work:
        card_checks.limits(work, found)
    failed = [check.name for check in found.checks if not check.passed]
    assert failed == ["k = 2049", "nprobe = 2049"]


def test_a_card_that_is_too_small_is_refused_before_anything_is_loaded() -> None:
    fake = double.Card(total_bytes=GIB)
    with card_of(fake) as work, pytest.raises(ConfigError, match=r"free on the card: 1\.00 GiB"):
        flat(work, findings(), number=0)
    assert fake.peak_bytes == 0


def test_a_billion_rows_that_cannot_all_be_added_are_measured_as_far_as_they_were() -> None:
    found, left = findings(), iter([60.0, 60.0, 0.0])
    with card_of(double.Card()) as work:
        short = replace(work, sizes=replace(TINY, block_rows=500), seconds_left=lambda: next(left))
        with pytest.raises(ConfigError, match=r"^1,500 of 2,000 rows could be added in time"):
            billion(short, found)
    assert {timing.rows for timing in found.timings} == {1500}
    assert len(found.timings) == len(TINY.nprobes) * len(TINY.batches)


def test_the_exact_answers_are_those_of_all_rows_at_once() -> None:
    with card_of(double.Card()) as work:
        corpus = Corpus(work.card, 700, 16, 256)
        truth = Truth(corpus.queries(5), 10)
        blocks = []
        for first, block in corpus.blocks():
            truth.see(first, block)
            blocks.append(block.numpy())
        rows = np.concatenate(blocks)
        assert len(rows) == 700
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
        expected = np.argsort(-(corpus.queries(5).numpy() @ rows.T), axis=1)[:, :10]
        np.testing.assert_array_equal(truth.ids, expected)
        again = next(iter(corpus.blocks()))[1].numpy()
        np.testing.assert_array_equal(again, blocks[0])


def test_candidates_are_ranked_by_their_copies_and_empty_places_stay_last() -> None:
    with card_of(double.Card()) as work:
        corpus = Corpus(work.card, 600, 16, 600)
        rows = next(iter(corpus.blocks()))[1]
        coarse = faiss.IndexFlatIP(16)
        coarse.add(centroids(rows, 4).numpy())
        index = faiss.IndexIVFPQ(coarse, 16, 4, 2, 8, faiss.METRIC_INNER_PRODUCT)
        index.train(rows.numpy())
        index.add(rows.numpy())
        index.nprobe = 4
        asked = corpus.queries(20).numpy()
        exact = np.argsort(-(asked @ rows.numpy().T), axis=1)[:, :5]
        scores, ids = reranked(work.card, index, rows.half(), 5, 100)(asked)
        assert recall(ids, exact) > 0.97
        np.testing.assert_allclose(scores[:, 0], (asked @ rows.numpy().T).max(axis=1), atol=2e-3)
        index.nprobe = 1
        few = faiss.IndexIDMap(faiss.IndexFlatIP(16))
        few.add_with_ids(rows[:3].numpy(), np.arange(3))
        scores, ids = reranked(work.card, few, rows.half(), 5, 1)(asked)
        assert (ids[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()


def test_centroids_are_unit_vectors_that_lie_nearer_than_rows_do() -> None:
    with card_of(double.Card()) as work:
        sample = Corpus(work.card, 2500, 16, 2500).sample(1000)
    found = centroids(sample, 10)
    assert found.shape == (10, 16)
    np.testing.assert_allclose(found.norm(dim=1).numpy(), 1, rtol=1e-5)
    before = (sample @ sample[:10].T).max(dim=1).values.mean()
    assert (sample @ found.T).max(dim=1).values.mean() > before + 0.03


def test_rows_and_queries_go_to_faiss_as_pointers() -> None:
    rows, asked = torch.randn(50, 16), torch.randn(16, 3).T  # the queries are not contiguous
    index = faiss.IndexFlatIP(16)
    add_by_pointer(faiss, index, rows)
    scores, ids = search_by_pointer(faiss, index, asked, 4)
    expected, places = (asked @ rows.T).topk(4, dim=1)
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), rtol=1e-5)
    assert torch.equal(ids, places)


# ------------------------------------------------------------------ what is packed

# what a bare machine has not: an import of it fails
BLOCKED = """
import os, runpy, sys
import shardline
assert shardline.__file__.startswith(os.getcwd()), "not what was unpacked"
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "pydantic", "click", "pyarrow", "msgpack", "rich"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Bare())
sys.argv = ["gpu-check", "--fake", "--minutes", "2", "--out", "results"]
runpy.run_module("shardline.bench.gpu_check", run_name="__main__")
"""


def test_the_archive_runs_from_end_to_end_on_a_bare_machine_without_a_card(tmp_path: Path) -> None:
    names = archive.write(tmp_path / "gpu-check.tgz")
    assert len(names) < 30
    with tarfile.open(tmp_path / "gpu-check.tgz") as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / archive.FOLDER
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == gpu_check.PASSED, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[0] == FAKE_LINE
    content = json.loads((folder / "results" / gpu_check.JSON_NAME).read_text())
    assert content["fake"] is True
    outcomes = {part["part"]: from_json(part) for part in content["parts"]}
    assert tuple(outcomes) == NAMES
    assert {outcome.status for outcome in outcomes.values()} == {Status.RAN}
    for name in ("flat-10m", "flat-100m", "ivfpq-100m", "kinds-1m", "ivfpq-1b"):
        assert {timing.batch for timing in outcomes[name].timings} == set(TINY.batches)
        assert all(timing.recall is not None for timing in outcomes[name].timings)
        assert outcomes[name].memory
    assert len(outcomes["correctness"].checks) == 21, "three of each of seven kinds"
    assert {path.suffix for path in (folder / "results" / "parts").iterdir()} == {".json", ".log"}


def test_the_commands_that_are_printed_name_what_is_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["archive", str(tmp_path / "x.tgz")])
    archive.main()
    shown = capsys.readouterr().out
    assert "tar xzf x.tgz && python3 -m pip install --constraint gpu-check/constr" in shown
    assert f"cd gpu-check && python3 -m {archive.START} --minutes 9" in shown


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_pins_of_both_sets_agree() -> None:
    cpu, gpu = pins("constraints.txt"), pins("constraints-gpu.txt")
    assert {name: cpu[name] for name in cpu.keys() & gpu.keys()} == {
        name: gpu[name] for name in cpu.keys() & gpu.keys()
    }
    assert gpu["faiss-gpu"] == cpu["faiss-cpu"]
    assert {"torch", "numpy"} <= cpu.keys() & gpu.keys()


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``make`` in a folder of its own, as if called by nobody."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FAISS", "VENV")}
    environment = {name: value for name, value in kept.items() if not name.startswith("MAKE")}
    command = ["make", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_an_environment_holds_the_wheel_of_its_first_install(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-gpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    gpu, cpu = make(tmp_path, "-n", "install", "FAISS=gpu"), make(tmp_path, "-n", "install")
    assert "--constraint constraints-gpu.txt --editable '.[cluster,train,gpu,dev]'" in gpu.stdout
    assert "--constraint constraints.txt --editable '.[cluster,train,cpu,dev]'" in cpu.stdout
    packages = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    (packages / "faiss_gpu-1.15.1.dist-info").mkdir(parents=True)
    assert "holds faiss for gpu" in make(tmp_path, "install", "FAISS=cpu").stderr, "not ended"
    (tmp_path / ".venv" / "installed").touch()
    assert make(tmp_path, "install").returncode == 0, "what it holds is the default"
    refused = make(tmp_path, "install", "FAISS=cpu")
    assert refused.returncode != 0
    assert refused.stderr.startswith(".venv holds faiss for gpu; 'make clean' before FAISS=cpu\n")


def test_the_page_names_every_part_its_seconds_and_its_rows() -> None:
    page = (ROOT / "docs" / "GPU.md").read_text()
    listed = re.findall(r"^\| `([a-z0-9-]+)` \| (\d+) \|", page, re.MULTILINE)
    assert listed == [(part.name, str(int(part.seconds))) for part in PARTS]
    for count in (*FULL.flat_rows, FULL.pq_lists, FULL.kinds_rows, FULL.billion_rows):
        assert f"{count:,}" in page
    lengths = ", ".join(map(str, CODE_LENGTHS))
    assert lengths in page and set(CODE_LENGTHS) == double.PQ_LENGTHS
