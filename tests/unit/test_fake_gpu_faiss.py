"""The double of faiss's GPU builds: each limit and silence of the real one can be met here."""

import gc
import threading
from collections.abc import Iterator

import faiss
import numpy as np
import pytest

from shardline.shards.index.layers import layers_of
from tests.fake_gpu_faiss import (
    GIB,
    MIB,
    PQ_LENGTHS,
    Card,
    ProcessAborted,
    Variant,
    installed,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, ROWS, LISTS = 24, 600, 8
VECTORS = np.random.default_rng(18).normal(size=(ROWS, DIM)).astype(np.float32)
BUILT: dict[tuple[str, int], faiss.Index] = {}


def cpu_index(factory: str, metric: int = faiss.METRIC_INNER_PRODUCT) -> faiss.Index:
    index = BUILT.get((factory, metric))
    if index is None:
        index = faiss.index_factory(DIM, factory, metric)
        base = layers_of(index).base
        if isinstance(base, faiss.IndexIVF):
            base.cp.niter, base.cp.min_points_per_centroid = 2, 1
        if hasattr(base, "pq"):
            base.pq.cp.niter, base.pq.cp.min_points_per_centroid = 2, 1
        if hasattr(base, "do_polysemous_training"):
            base.do_polysemous_training = False
        index.train(VECTORS)
        index.add(VECTORS)
        BUILT[factory, metric] = index
    return index


def on_card(
    factory: str, metric: int = faiss.METRIC_INNER_PRODUCT, **options: object
) -> faiss.Index:
    chosen = faiss.GpuClonerOptions()
    for name, value in options.items():
        assert hasattr(chosen, name)
        setattr(chosen, name, value)
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(MIB)
    return faiss.index_cpu_to_gpu(resources, 0, cpu_index(factory, metric), chosen)


@pytest.fixture
def card() -> Iterator[Card]:
    with installed(Card()) as (one,):
        yield one


@pytest.fixture
def cuvs() -> Iterator[Card]:
    with installed(Card(), variant=Variant.CUVS) as (one,):
        yield one


KINDS = ("Flat", "SQfp16", "IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "IVF8,PQ8")


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize("factory", KINDS)
def test_answers_are_those_of_the_cpu(card: Card, factory: str, metric: int) -> None:
    index = cpu_index(factory, metric)
    got, rows = on_card(factory, metric).search(VECTORS[:20], 10)
    expected, same = index.search(VECTORS[:20], 10)
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=2e-2)
    assert (rows == same).mean() > 0.9
    assert card.searches == 1


def test_names_are_there_only_while_it_is_installed() -> None:
    with installed():
        assert faiss.get_num_gpus() == 0
        assert not hasattr(faiss, "GpuIndexCagra")
    assert not hasattr(faiss, "StandardGpuResources")
    with installed(Card(driver_too_old=True)):
        assert faiss.get_num_gpus() == 0  # an old driver counts as no device, without a word


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_more_than_2048_results_are_refused(card: Card, factory: str) -> None:
    index = on_card(factory)
    index.search(VECTORS[:1], 2048)
    with pytest.raises(RuntimeError, match=r"up to 2048 \(requested 2049\)"):
        index.search(VECTORS[:1], 2049)


def test_more_than_2048_lists_are_refused(card: Card) -> None:
    index = on_card("IVF8,Flat")
    index.search(VECTORS[:1], 1, params=faiss.SearchParametersIVF(nprobe=2048))
    with pytest.raises(RuntimeError, match=r"nprobe selection up to 2048 \(requested 2049\)"):
        index.search(VECTORS[:1], 1, params=faiss.SearchParametersIVF(nprobe=2049))


def test_a_selector_is_ignored_in_silence(card: Card) -> None:
    params = faiss.SearchParametersIVF(nprobe=LISTS, sel=faiss.IDSelectorRange(0, 2))
    _, rows = on_card("IVF8,Flat").search(VECTORS[:5], 10, params=params)
    assert rows.max() > 1
    _, rows = on_card("Flat").search(
        VECTORS[:5], 10, params=faiss.SearchParameters(sel=faiss.IDSelectorRange(0, 2))
    )
    assert rows.max() > 1


def test_other_parameters_than_those_of_ivf_are_refused(card: Card) -> None:
    index = on_card("IVF8,Flat")
    with pytest.raises(RuntimeError, match="unhandled SearchParameters"):
        index.search(VECTORS[:1], 1, params=faiss.SearchParameters())
    with pytest.raises(RuntimeError, match="max_codes"):
        index.search(VECTORS[:1], 1, params=faiss.SearchParametersIVF(nprobe=1, max_codes=5))


def test_rows_are_neither_removed_nor_read_back_from_lists(card: Card) -> None:
    index = on_card("IVF8,Flat")
    for call in (
        lambda: index.remove_ids(faiss.IDSelectorRange(0, 2)),
        lambda: index.reconstruct(0),
        lambda: index.range_search(VECTORS[:1], 1.0),
        lambda: on_card("Flat").add_with_ids(VECTORS[:1], np.array([7])),
    ):
        with pytest.raises(RuntimeError, match=r"not (implemented|supported)"):
            call()
    np.testing.assert_array_equal(on_card("Flat").reconstruct_n(3, 2), VECTORS[3:5])


@pytest.mark.parametrize(
    "factory", ["IVF8,PQ12x4fsr", "HNSW8", "SQ8", "PQ8", "Flat,RFlat", "IVF8,PQ8,RFlat"]
)
def test_what_has_no_kernels_is_refused(card: Card, factory: str) -> None:
    with pytest.raises(RuntimeError, match="not implemented on GPU"):
        on_card(factory)


def empty_ivfpq(d: int, m: int, nbits: int = 8) -> faiss.Index:
    return faiss.IndexIVFPQ(faiss.IndexFlatL2(d), d, 1, m, nbits)


def refusal(index: faiss.Index, **options: object) -> str:
    chosen = faiss.GpuClonerOptions()
    for name, value in options.items():
        setattr(chosen, name, value)
    resources = faiss.StandardGpuResources()
    try:
        faiss.index_cpu_to_gpu(resources, 0, index, chosen)
    except RuntimeError as error:
        return str(error)
    return ""


def test_lengths_of_codes(card: Card) -> None:
    refused = {m: refusal(empty_ivfpq(2 * m, m), useFloat16=True) for m in range(1, 130)}
    assert {m for m, text in refused.items() if not text} == PQ_LENGTHS
    assert "sub-quantizers (5) is not supported" in refused[5]
    assert "even divisor" in refusal(uneven(), useFloat16=True)


def uneven() -> faiss.Index:
    """As an index would be whose m does not divide its dimension, which the CPU does not make."""
    index = empty_ivfpq(16, 8)
    index.pq.M = 3
    return index


@pytest.mark.parametrize(
    ("m", "half", "fits"),
    [(48, False, True), (56, False, False), (56, True, True), (96, True, True)],
)
def test_tables_must_fit_shared_memory(card: Card, m: int, half: bool, fits: bool) -> None:
    assert ("shared memory" not in refusal(empty_ivfpq(2 * m, m), useFloat16=half)) is fits


def test_codes_have_eight_bits(card: Card) -> None:
    assert "nbits == 8" in refusal(empty_ivfpq(16, 8, nbits=6))


def test_two_threads_in_one_resources_object_end_the_process(card: Card) -> None:
    resources = faiss.StandardGpuResources()
    one = faiss.index_cpu_to_gpu(resources, 0, cpu_index("Flat"))
    two = faiss.index_cpu_to_gpu(resources, 0, cpu_index("IVF8,Flat"))
    other = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, cpu_index("Flat"))
    failures: list[BaseException] = []

    def search(index: faiss.Index) -> None:
        try:
            index.search(VECTORS[:1], 1)
        except ProcessAborted as error:
            failures.append(error)

    def meanwhile(index: faiss.Index) -> None:
        card.on_search = lambda: None
        thread = threading.Thread(target=search, args=(index,))
        thread.start()
        thread.join()

    card.on_search = lambda: meanwhile(other)
    one.search(VECTORS[:1], 1)
    assert not failures
    card.on_search = lambda: meanwhile(two)
    one.search(VECTORS[:1], 1)
    assert "StackDeviceMemory" in str(failures[0])


@pytest.mark.parametrize(
    ("card_bytes", "asked", "taken"),
    [
        (4 * GIB, None, 512 * MIB),
        (8 * GIB, None, 1024 * MIB),
        (80 * GIB, None, 1536 * MIB),
        (80 * GIB, 64 * MIB, 64 * MIB),
        (80 * GIB, 4 * GIB, 1536 * MIB),
    ],
)
def test_temporary_memory_is_taken_with_the_first_index(
    card_bytes: int, asked: int | None, taken: int
) -> None:
    with installed(Card(total_bytes=card_bytes)) as (card,):
        resources = faiss.StandardGpuResources()
        if asked is not None:
            resources.setTempMemory(asked)
        assert card.used_bytes == 0
        index = faiss.index_cpu_to_gpu(resources, 0, cpu_index("Flat"))
        assert resources.getTempMemoryAvailable(0) == taken
        rows = -(-ROWS * DIM * 4 // 256) * 256 + -(-ROWS * 4 // 256) * 256
        assert card.used_bytes == taken + rows
        with pytest.raises(ProcessAborted):
            resources.setPinnedMemory(1)
        del resources
        assert card.used_bytes == taken + rows  # the index shares them
        del index
        gc.collect()
        assert card.used_bytes == 0


def test_a_full_card_is_an_error_and_keeps_nothing() -> None:
    with installed(Card(total_bytes=2 * MIB)) as (card,):
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(2 * MIB - 4096)
        with pytest.raises(RuntimeError, match=r"alloc fail.*out of memory"):
            faiss.index_cpu_to_gpu(resources, 0, cpu_index("Flat"))
        del resources
        gc.collect()
        assert card.used_bytes == 0


def test_temporary_memory_that_does_not_suffice_overflows_onto_the_card() -> None:
    with installed(Card(total_bytes=4 * MIB)) as (card,):
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(4096)
        index = faiss.index_cpu_to_gpu(resources, 0, cpu_index("Flat"))
        before = card.used_bytes
        index.search(VECTORS[:100], 100)
        assert card.used_bytes == before
        assert card.peak_bytes > before
        with pytest.raises(RuntimeError, match="out of memory"):
            index.search(np.repeat(VECTORS, 10, axis=0), 100)
        assert card.used_bytes == before


def test_a_cuda_error_ends_the_process(card: Card) -> None:
    index = on_card("Flat")
    card.fail_searches = 1
    with pytest.raises(ProcessAborted, match="CUDA error"):
        index.search(VECTORS[:1], 1)
    index.search(VECTORS[:1], 1)


def test_cuvs_honours_selectors_and_has_cagra(cuvs: Card) -> None:
    bits = np.zeros(-(-ROWS // 8), np.uint8)
    bits[0] = 0b11
    for factory, params in (
        ("Flat", faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))),
        ("IVF8,PQ8", faiss.SearchParametersIVF(nprobe=8, sel=faiss.IDSelectorBitmap(bits))),
    ):
        _, rows = on_card(factory).search(VECTORS[:3], 5, params=params)
        assert set(rows.ravel().tolist()) == {0, 1, -1}
    # fp16 codes run on the classic kernels, which drop it
    params = faiss.SearchParametersIVF(nprobe=8, sel=faiss.IDSelectorBitmap(bits))
    _, rows = on_card("IVF8,SQfp16").search(VECTORS[:3], 5, params=params)
    assert rows.max() > 1
    graph = faiss.GpuIndexCagra(faiss.StandardGpuResources(), DIM)
    with pytest.raises(RuntimeError, match="not trained"):
        graph.search(VECTORS[:1], 1)
    graph.train(VECTORS)
    assert graph.search(VECTORS[7:8], 1)[1] == 7


def test_limits_of_cuvs(cuvs: Card) -> None:
    index = on_card("Flat")
    index.search(VECTORS[:1], 16_384)
    with pytest.raises(RuntimeError, match="up to 16384"):
        index.search(VECTORS[:1], 16_385)
    assert not refusal(empty_ivfpq(20, 10))  # any length of codes
    assert "multiple of 8" in refusal(empty_ivfpq(20, 5, nbits=6))
    with pytest.raises(RuntimeError, match="not implemented for cuVS"):
        on_card("SQfp16")
    on_card("SQfp16", use_cuvs=False)


def test_cuvs_is_not_in_the_classic_wheel(card: Card) -> None:
    with pytest.raises(RuntimeError, match="has not been compiled"):
        on_card("Flat", use_cuvs=True)
