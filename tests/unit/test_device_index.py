"""The path to a card, on the double: build, load, search, tombstones, filters, limits, errors."""

import dataclasses
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.cluster.commands import doctor
from shardline.cluster.commands.build import plan_of
from shardline.cluster.config import ShardlineConfig
from shardline.shards.core.errors import CardFailed, ConfigError
from shardline.shards.core.messages import NO_PARAMS, SearchParams
from shardline.shards.core.schema import Metric, Ranked
from shardline.shards.index import card_memory, cards, gpu
from shardline.shards.index.layers import layers_of
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.resolve import resolve
from shardline.shards.index.selection import Selection
from shardline.shards.index.spec import Device, IndexSpec, ResolvedIndex
from shardline.shards.index.template import train_template
from shardline.shards.server.shard import Shard
from tests import fake_gpu_faiss
from tests.engine import build_generation
from tests.fake_gpu_faiss import GIB, Card, ProcessAborted, Variant
from tests.gpu_machine import machine
from tests.reference import assert_answer_order, assert_same_answers, brute_force

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM = 3000, 16
FULL = SearchParams(nprobe=2048)
KINDS: dict[str, dict[str, object]] = {
    "flat": {"kind": "flat"},
    "flat-fp16": {"kind": "flat", "storage": "fp16"},
    "flat-fp16-exact": {"kind": "flat", "storage": "fp16", "rerank": "fp32"},
    "ivf": {"kind": "ivf", "nlist": 8},
    "ivf-fp16": {"kind": "ivf", "nlist": 8, "storage": "fp16"},
    "ivf-sq8": {"kind": "ivf", "nlist": 8, "storage": "sq8"},
    "ivfpq": {"kind": "ivfpq", "nlist": 8, "m": 8},
    "ivfpq-fp32": {"kind": "ivfpq", "nlist": 8, "m": 8, "rerank": "fp32"},
    "pca-ivf": {"kind": "ivf", "nlist": 8, "pca": 8, "rerank": "none"},
}
EXACT = ("flat", "ivf")
VECTORS = manifold(ROWS, DIM, 4, seed=1)
QUERIES = manifold(6, DIM, 4, seed=1, stream=1)
BUILT: dict[tuple[str, Metric], tuple[ResolvedIndex, faiss.Index]] = {}


def built(kind: str, metric: Metric) -> tuple[ResolvedIndex, faiss.Index]:
    if (kind, metric) not in BUILT:
        spec = IndexSpec(device="cuda", **KINDS[kind])
        index = resolve(spec, rows=ROWS, dim=DIM, metric=metric, gpu=True)
        made = train_template(index, VECTORS, metric=metric, seed=0, threads=1, iterations=2)
        made.add(VECTORS)
        BUILT[kind, metric] = index, made
    return BUILT[kind, metric]


def main_on(device: Device, kind: str, metric: Metric = Metric.COSINE) -> MainIndex:
    index, made = built(kind, metric)
    assert index.device is Device.CUDA
    return MainIndex(
        faiss.clone_index(made), metric=metric, defaults=index.search_params, device=device
    )


def without(excluded: np.ndarray) -> Selection:
    return Selection.whole(ROWS).excluding(excluded)


@pytest.fixture
def card() -> Iterator[Card]:
    with machine(Card()) as one:
        yield one


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 100])
def test_a_card_answers_as_the_cpu_does(card: Card, kind: str, metric: Metric, k: int) -> None:
    got = main_on(Device.CUDA, kind, metric).search(QUERIES, k, FULL)
    expected = main_on(Device.CPU, kind, metric).search(QUERIES, k, FULL)
    assert card.searches > 1  # besides the self-test
    assert_answer_order(got)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=2e-3, atol=2e-3)
    assert (got.ids == expected.ids).mean() > 0.9
    if kind in EXACT:
        assert_same_answers(got, brute_force(QUERIES, VECTORS, np.arange(ROWS), k, metric))


def test_codes_are_re_ranked_from_the_hosts_memory(card: Card) -> None:
    raw = dict(KINDS["ivfpq"], rerank="none")
    KINDS["ivfpq-raw"] = raw
    try:
        exact = brute_force(QUERIES, VECTORS, np.arange(ROWS), 20, Metric.COSINE)
        shares = {}
        for kind in ("ivfpq-raw", "ivfpq-fp32"):
            found = main_on(Device.CUDA, kind).search(QUERIES, 20, FULL)
            shares[kind] = np.mean(
                [np.isin(a, b).mean() for a, b in zip(found.ids, exact.ids, strict=True)]
            )
        assert shares["ivfpq-fp32"] > max(0.95, shares["ivfpq-raw"])
        found = main_on(Device.CUDA, "ivfpq-fp32").search(QUERIES, 1, FULL)
        np.testing.assert_allclose(found.scores, exact.scores[:, :1], atol=1e-6)
    finally:
        del KINDS["ivfpq-raw"]


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_tombstones_are_left_out_though_a_card_ignores_selectors(
    card: Card, kind: str, share: float
) -> None:
    dead = np.flatnonzero(np.random.default_rng(3).random(ROWS) < share)
    got = main_on(Device.CUDA, kind).search(QUERIES, 40, FULL, without(dead))
    expected = main_on(Device.CPU, kind).search(QUERIES, 40, FULL, without(dead))
    assert not np.isin(got.ids, dead).any()
    wanted = min(40, ROWS - len(dead))
    assert (got.ids[:, :wanted] >= 0).all()
    assert (got.ids == expected.ids).mean() > 0.9


def test_what_hides_more_than_a_card_gives_is_answered_by_the_cpu(card: Card) -> None:
    order = np.argsort(-(VECTORS @ QUERIES[0]))
    dead = np.sort(order[:2500])  # every row that a card can give to this query
    main = main_on(Device.CUDA, "flat")
    got = main.search(QUERIES[:1], 10, NO_PARAMS, without(dead))
    assert got.ids[0].tolist() == order[2500:2510].tolist()
    assert main.describe()["queries_from_cpu"] == 1
    main.search(QUERIES[:1], 10, NO_PARAMS, without(dead[:5]))
    assert main.describe()["queries_from_cpu"] == 1


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq"])
@pytest.mark.parametrize("matching", [7, 300, 2900])
def test_filters(card: Card, kind: str, matching: int) -> None:
    mask = np.zeros(ROWS, bool)
    mask[np.random.default_rng(4).permutation(ROWS)[:matching]] = True
    chosen = Selection.of(mask)
    got = main_on(Device.CUDA, kind).search_filtered(QUERIES, 20, FULL, chosen)
    exact = brute_force(
        QUERIES, VECTORS, np.arange(ROWS), 20, Metric.COSINE, np.flatnonzero(~mask).tolist()
    )
    assert mask[got.ids[got.ids >= 0]].all()
    assert ((got.ids >= 0).sum(axis=1) == min(20, matching)).all()
    found = np.mean([np.isin(a, b).mean() for a, b in zip(got.ids, exact.ids, strict=True)])
    assert found > 0.9


@pytest.mark.parametrize("k", [2047, 2048, 2049])
@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_k_up_to_its_limit_and_one_more(card: Card, kind: str, k: int) -> None:
    main = main_on(Device.CUDA, kind)
    got = main.search(QUERIES, k, FULL)
    expected = main_on(Device.CPU, kind).search(QUERIES, k, FULL)
    assert got.ids.shape == (len(QUERIES), k)
    assert ((got.ids >= 0) == (expected.ids >= 0)).all()
    assert main.describe()["queries_from_cpu"] == (len(QUERIES) if k > 2048 else 0)


def test_candidates_end_at_the_limit(card: Card) -> None:
    main = main_on(Device.CUDA, "ivfpq")
    got = main.search(QUERIES, 1000, SearchParams(nprobe=8, rerank_factor=8))
    assert (got.ids >= 0).all()


def test_more_lists_than_a_card_visits_are_never_asked_for(card: Card) -> None:
    """faiss does not look whether an index has so many lists."""
    on_card = main_on(Device.CUDA, "ivf")._on_card
    assert on_card is not None
    with pytest.raises(CardFailed, match="nprobe"):
        on_card.search(QUERIES, 10, candidates=10, nprobe=2049)
    with pytest.raises(ValueError, match="nprobe"):
        IndexSpec(kind="ivf", nprobe=2049)


@pytest.mark.parametrize("variant", Variant)
def test_both_wheels_have_the_same_kernels(variant: Variant) -> None:
    with machine(Card(), variant=variant):
        for kind in ("flat-fp16", "ivf-sq8"):
            main_on(Device.CUDA, kind).search(QUERIES, 10, FULL, without(np.arange(50)))


# ------------------------------------------------------------------------------ what is refused

REFUSED = [
    ({"wheels": {"faiss-cpu": "1.15.1"}}, "this faiss has no GPU code", "faiss-cpu 1.15.1"),
    (
        {"wheels": {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}},
        "more than one faiss wheel",
        "faiss-cpu 1.15.1, faiss-gpu 1.15.1",
    ),
    ({"wheels": {}}, "no faiss wheel is installed", "got none"),
    ({"cuda": 11_080}, "driver is too old", "CUDA 11.8"),
    ({"cuda": 12_040, "wheels": {"faiss-gpu-cuvs": "1.15.1"}}, "driver is too old", "CUDA 12.4"),
    ({"cuda": 12_040}, "there is no card", "0 cards, CUDA_VISIBLE_DEVICES"),
    ({"cuda": None}, "there is no card", "no driver"),
]


@pytest.mark.parametrize(("there", "message", "got"), REFUSED)
def test_a_machine_without_a_usable_card(there: dict, message: str, got: str) -> None:
    with machine(**there), pytest.raises(ConfigError, match=message) as refused:
        main_on(Device.CUDA, "flat")
    line = str(refused.value)
    assert line.startswith("index.device: ")
    assert got in line
    assert "\n" not in line


def test_a_card_that_is_not_there(card: Card) -> None:
    index, made = built("flat", Metric.COSINE)
    for number, text in ((1, "expected cuda:0; got cuda:1"),):
        with pytest.raises(ConfigError, match="there is no card 1") as refused:
            MainIndex(
                made,
                metric=Metric.COSINE,
                defaults=index.search_params,
                device=Device.CUDA,
                card=number,
            )
        assert text in str(refused.value)


def test_the_second_card_is_the_one_that_is_used() -> None:
    one, two = Card(), Card()
    index, made = built("flat", Metric.COSINE)
    with machine(one, two):
        main = MainIndex(
            faiss.clone_index(made),
            metric=Metric.COSINE,
            defaults=index.search_params,
            device=Device.CUDA,
            card=1,
        )
        main.search(QUERIES, 5, NO_PARAMS)
    assert (one.searches, two.searches > 1) == (0, True)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"kind": "ivfpq", "m": 128}, "m", "on a GPU"),
        ({"kind": "ivfpq", "m": 30}, "m", "does not divide"),
        ({"kind": "ivfpq", "nbits": 6}, "nbits", "8-bit codes"),
        ({"kind": "ivfpq", "rerank_factor": 21}, "rerank_factor", "at most 2048 candidates"),
        ({"kind": "ivfpq-fs"}, "kind", "ivfpq with a re-rank is its like"),
        ({"kind": "hnsw"}, "kind", "runs on CPU only"),
        ({"kind": "flat", "storage": "sq8"}, "storage", "flat index does not have it"),
        ({"kind": "ivf", "storage": "sq8", "dim": 6144}, "storage", "too many dimensions"),
        ({"kind": "ivfpq", "storage": "fp16"}, "storage", "no effect"),
    ],
)
def test_what_no_card_has_is_refused_before_data_is_loaded(
    fields: dict, field: str, message: str
) -> None:
    dim = fields.get("dim", 128)
    spec = IndexSpec(device="cuda", **{key: fields[key] for key in fields if key != "dim"})
    with pytest.raises(ConfigError, match=message) as refused:
        resolve(spec, rows=1_000_000, dim=dim, metric=Metric.COSINE, gpu=True)
    assert refused.value.field == f"index.{field}"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("m", sorted(fake_gpu_faiss.PQ_LENGTHS))
def test_every_length_of_codes_that_a_spec_allows_goes_onto_a_card(card: Card, m: int) -> None:
    spec = IndexSpec(device="cuda", kind="ivfpq", m=m, nlist=4, rerank="none")
    index = resolve(spec, rows=1_000_000, dim=2 * m, metric=Metric.COSINE, gpu=True)
    empty = faiss.index_factory(2 * m, index.factory, faiss.METRIC_INNER_PRODUCT)
    empty.is_trained, empty.quantizer.is_trained = True, True
    on_card = gpu.CardIndex(layers_of(empty), metric=Metric.COSINE, card=0)
    assert on_card._is_half == (m >= 56)


@pytest.mark.parametrize(
    "device", ["cuda:", "cuda:-1", "cuda:x", "gpu", "cuda:100", "CUDA", "cpu:0", "auto:1"]
)
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device"):
        IndexSpec(device=device)


def test_a_device_with_its_number() -> None:
    spec = IndexSpec(kind="flat", device="cuda:3")
    index = resolve(spec, rows=10, dim=4, metric=Metric.DOT, gpu=True)
    assert (index.device, index.card) == (Device.CUDA, 3)
    body = index.model_dump(mode="json")
    del body["card"]  # of a manifest that is older
    assert ResolvedIndex.model_validate(body).card == 0


def test_auto_says_why_codes_replace_the_default_kind() -> None:
    index = resolve(IndexSpec(), rows=50_000_000, dim=128, metric=Metric.COSINE, gpu=True)
    assert index.factory.endswith(",PQ32x8,Refine(SQfp16)")
    assert index.device is Device.CUDA
    assert "in place of ivfpq-fs" in index.reason
    assert "re-ranked from copies in the host's memory" in index.reason


# ------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_covers_what_is_taken_and_not_much_more(card: Card, kind: str) -> None:
    main = main_on(Device.CUDA, kind)
    main.search(QUERIES, 100, FULL)
    plan = card_memory.card_memory(main.layers, ROWS)
    planned = plan.total - card_memory.HEAD_ROOM_BYTES
    assert card.used_bytes <= planned
    assert card.peak_bytes <= plan.total
    # what is not temporary; lists are rounded up, which counts for few rows
    real = card.peak_bytes - card_memory.TEMP_MEMORY_BYTES
    assert planned - card_memory.TEMP_MEMORY_BYTES <= 2.6 * real
    del main
    gc.collect()
    assert card.used_bytes == 0


def test_a_plan_is_arithmetic() -> None:
    index = faiss.index_factory(128, "IVF1024,PQ32x8", faiss.METRIC_INNER_PRODUCT)
    plan = card_memory.card_memory(layers_of(index), 100_000_000)
    assert plan.lines[0] == "rows: 100,000,000 x 32 bytes = 3,051.8 MiB"
    assert plan.lines[1] == "row numbers: 100,000,000 x 8 bytes = 762.9 MiB"
    assert plan.lines[-1].startswith("together: ")
    assert plan.total == sum(size for _, _, size in plan.parts)


def test_half_precision_grows_by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """faiss adds it in blocks: the store is copied whenever it grows."""
    monkeypatch.setattr(fake_gpu_faiss, "COPY_ROWS", 1000)
    monkeypatch.setattr(card_memory, "COPY_ROWS", 1000)
    with machine(Card()) as one:
        main = main_on(Device.CUDA, "flat-fp16")
        plan = card_memory.card_memory(main.layers, ROWS)
        grown = one.peak_bytes - one.used_bytes
        assert grown >= 2000 * 2 * DIM
        assert one.peak_bytes <= plan.total - card_memory.HEAD_ROOM_BYTES


def test_a_full_card_is_refused_with_the_arithmetic_before_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(Card(total_bytes=8 * GIB)):
        made = build_generation(tmp_path, VECTORS, np.arange(ROWS), 1, kind="flat")
        made = dataclasses.replace(
            made, index=made.index.model_copy(update={"device": Device.CUDA})
        )
    from shardline.shards.live import loading

    monkeypatch.setattr(loading, "verify_shard", lambda *args, **named: pytest.fail("was read"))
    with machine(Card(total_bytes=8 * GIB, taken_bytes=int(7.5 * GIB))) as one:
        with pytest.raises(ConfigError, match="does not fit on card 0") as refused:
            loading.load_state(tmp_path, made, 0)
        with pytest.raises(ConfigError, match="does not fit on card 0"):
            loading.load_caught_up(tmp_path, made, 0)
        assert one.used_bytes == 0
    line = str(refused.value)
    assert "expected 768.2 MiB free (rows 0.2 MiB + norms 0.0 MiB + temporary memory" in line
    assert "got 512.0 MiB" in line
    assert "\n" not in line


def test_a_card_that_fills_up_meanwhile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "refuse_without_room", lambda *args: None)
    with (
        machine(Card(total_bytes=GIB, taken_bytes=GIB - (100 << 20))) as one,
        pytest.raises(ConfigError, match="cannot be put on card 0") as refused,
    ):
        main_on(Device.CUDA, "flat")
    assert "out of memory" in str(refused.value)
    gc.collect()
    assert one.used_bytes == 0


def test_two_shards_on_one_card(card: Card) -> None:
    """Each has resources of its own: they may be searched at the same time."""
    one, two = main_on(Device.CUDA, "flat"), main_on(Device.CUDA, "ivf")
    both = card.used_bytes
    assert both > 2 * card_memory.TEMP_MEMORY_BYTES
    found: list[Ranked] = []
    threads: list[threading.Thread] = []

    def meanwhile() -> None:
        card.on_search = lambda: None
        threads.append(threading.Thread(target=lambda: found.append(two.search(QUERIES, 5, FULL))))
        threads[0].start()
        threads[0].join(10)

    card.on_search = meanwhile
    got = one.search(QUERIES, 5, FULL)
    assert_same_answers(got, found[0])
    del one
    gc.collect()
    assert card.used_bytes < both


def test_two_threads_that_search_one_index_wait_for_each_other(card: Card) -> None:
    main = main_on(Device.CUDA, "flat")
    inside = threading.Event()
    found: list[Ranked] = []
    thread = threading.Thread(target=lambda: found.append(main.search(QUERIES, 5, FULL)))

    def meanwhile() -> None:
        card.on_search = inside.set
        thread.start()
        assert not inside.wait(0.05)

    card.on_search = meanwhile
    main.search(QUERIES, 5, FULL)
    thread.join(10)
    assert len(found) == 1


# ------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", ["flat", "flat-fp16", "ivf", "ivfpq"])
def test_a_card_that_answers_wrongly_is_refused(kind: str, metric: Metric) -> None:
    with (
        machine(Card(wrong=True)),
        pytest.raises(ConfigError, match="differ from the CPU's") as refused,
    ):
        main_on(Device.CUDA, kind, metric)
    assert "\n" not in str(refused.value)


def test_rounding_of_long_vectors_is_no_wrong_answer(card: Card) -> None:
    """What an L2 distance is wrong by grows with the vectors, though the best distance is 0."""
    index = faiss.IndexFlatL2(DIM)
    index.add(1000 * VECTORS)
    main = MainIndex(index, metric=Metric.L2, defaults=NO_PARAMS, device=Device.CUDA)
    got = main.search(1000 * VECTORS[:5], 1, NO_PARAMS)
    assert got.scores.min() < -0.1  # more than it is, which is 0


def test_an_error_of_the_card_is_one_of_ours(card: Card) -> None:
    main = main_on(Device.CUDA, "flat")
    card.raise_in_search = RuntimeError("Error: alloc fail (cudaMalloc error out of memory [2])")
    with pytest.raises(CardFailed, match="the card has failed in a search"):
        main.search(QUERIES, 5, FULL)
    card.raise_in_search = None
    card.fail_searches = 1
    with pytest.raises(ProcessAborted):
        main.search(QUERIES, 5, FULL)


def test_a_generation_is_built_loaded_and_searched_on_a_card(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_generation(
        tmp_path,
        VECTORS,
        np.arange(ROWS),
        2,
        kind="ivfpq",
        nlist=8,
        m=8,
        device="cpu",
        rerank="fp16",
    )
    for shard in range(2):
        on_card = Shard.load(tmp_path, shard, device=Device.CUDA)
        on_cpu = Shard.load(tmp_path, shard)
        described = on_card.describe()
        assert (described["device"], described["queries_from_cpu"]) == ("cuda", 0)
        got = on_card.state.search(QUERIES, 20, FULL)
        expected = on_cpu.state.search(QUERIES, 20, FULL)
        assert (got.ids == expected.ids).mean() > 0.95
    assert made.index.device is Device.CPU


def test_a_build_for_a_card_is_refused_before_anything_is_read() -> None:
    config = ShardlineConfig.model_validate({"index": {"device": "cuda:1"}})
    with (
        machine(wheels={"faiss-cpu": "1.15.1"}),
        pytest.raises(ConfigError, match="this faiss has no GPU code"),
    ):
        plan_of(config)
    with machine(Card()), pytest.raises(ConfigError, match="there is no card 1"):
        plan_of(config)
    with machine(Card(), Card()):
        assert plan_of(config).gpu


def test_doctor_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: name == "faiss-gpu")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "1.15.1")
    with machine(Card(total_bytes=80 * GIB, taken_bytes=GIB)):
        assert doctor._faiss() == "faiss-gpu 1.15.1, 1 GPUs: 79.0 of 80.0 GiB free"
    with machine(Card(driver_too_old=True), cuda=11_080):
        assert "0 GPUs: index.device: no GPU can be used here: the NVIDIA driver is too old" in (
            doctor._faiss()
        )


def test_the_driver_is_asked_only_where_there_is_a_card() -> None:
    """On a machine without a driver nothing of it is loaded."""
    assert cards.gpu_count() == 0
    assert cards.why_no_card() is not None
