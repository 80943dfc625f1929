"""Each limit of a card, moved by a step in the double or in the path: a check notices it.

The checks are those of ``test_device_index`` in small; each holds as the code is, and fails with
each of its mutations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import faiss
import numpy as np
import pytest

from shardline.shards.core.errors import ConfigError, ShardlineError
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric
from shardline.shards.index import card_memory, cards, gpu, resolve
from shardline.shards.index.layers import layers_of
from shardline.shards.index.main_index import MainIndex
from shardline.shards.index.selection import Selection
from shardline.shards.index.spec import Device, IndexSpec
from shardline.shards.process import card_log
from tests import fake_gpu_faiss
from tests.fake_gpu_faiss import GIB, Card
from tests.gpu_machine import machine

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, LISTS = 2200, 4, 4
VECTORS = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
ALL = SearchParams(nprobe=LISTS)


def on_card(factory: str = "Flat", rows: int = ROWS) -> MainIndex:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    base = layers_of(index).base
    if isinstance(base, faiss.IndexIVF):
        base.cp.niter = 1
    index.train(VECTORS)
    index.add(VECTORS[:rows])
    defaults = SearchParams(nprobe=LISTS)
    return MainIndex(index, metric=Metric.DOT, defaults=defaults, device=Device.CUDA)


def resolved(**fields: Any) -> str:
    spec = IndexSpec(device="cuda", **fields)
    dim = 128 if "m" not in fields else 2 * fields["m"]
    index = resolve.resolve(spec, rows=10**6, dim=dim, metric=Metric.DOT, gpu=True)
    return index.factory


def k_ends_at_its_limit() -> None:
    with machine(Card()):
        main = on_card()
        for k, from_cpu in ((2048, 0), (2049, 1)):
            assert (main.search(VECTORS[:1], k, ALL).ids >= 0).all()
            assert main.describe()["queries_from_cpu"] == from_cpu
        with pytest.raises(RuntimeError):
            main._on_card._on_card.search(VECTORS[:1], 2049)  # type: ignore[union-attr]


def lists_end_at_their_limit() -> None:
    with machine(Card()):
        index = on_card(f"IVF{LISTS},Flat")._on_card
        assert index is not None
        index.search(VECTORS[:1], 1, candidates=1, nprobe=2048)
        with pytest.raises(ShardlineError):
            index.search(VECTORS[:1], 1, candidates=1, nprobe=2049)


def lengths_of_codes() -> None:
    """Those that a spec allows are those that the card takes, with tables that fit."""
    with machine(Card()):
        for m in range(1, 100):
            empty = faiss.IndexIVFPQ(faiss.IndexFlatIP(2 * m), 2 * m, 1, m, 8)
            try:
                resolved(kind="ivfpq", m=m, nlist=1)
            except ConfigError:
                with pytest.raises(ConfigError):
                    gpu.CardIndex(layers_of(empty), metric=Metric.DOT, card=0)
            else:
                on_it = gpu.CardIndex(layers_of(empty), metric=Metric.DOT, card=0)
                assert on_it._is_half == (m >= 56)


def candidates_of_a_factor() -> None:
    resolved(kind="ivfpq", rerank_factor=20)
    with pytest.raises(ConfigError):
        resolved(kind="ivfpq", rerank_factor=21)


def dimensions_of_sq8() -> None:
    base = faiss.IndexIVFScalarQuantizer
    for dim, fits in ((6143, True), (6144, False)):
        index = base(faiss.IndexFlatIP(dim), dim, 1, faiss.ScalarQuantizer.QT_8bit)
        spec = IndexSpec(device="cuda", kind="ivf", storage="sq8")
        try:
            resolve.resolve(spec, rows=1000, dim=dim, metric=Metric.DOT, gpu=True)
            with machine(Card()):
                gpu.CardIndex(layers_of(index), metric=Metric.DOT, card=0)
        except ConfigError as error:
            assert not fits
            assert error.field == "index.storage"
        else:
            assert fits


def plans_cover_what_is_taken() -> None:
    for factory in ("Flat", "SQfp16", f"IVF{LISTS},Flat", f"IVF{LISTS},SQ8"):
        with machine(Card()) as card:
            main = on_card(factory)
            planned = card_memory.card_memory(main.layers, ROWS).total
            assert card.peak_bytes <= planned - card_memory.HEAD_ROOM_BYTES
            temporary = 256 << 20
            assert planned - temporary - (512 << 20) <= 2 * (card.peak_bytes - temporary)


def a_full_card_is_refused() -> None:
    taken = 8 * GIB - (600 << 20)
    with machine(Card(total_bytes=8 * GIB, taken_bytes=taken)), pytest.raises(ConfigError):
        on_card()


def wrong_answers_are_refused() -> None:
    for factory in ("Flat", "SQfp16"):
        with machine(Card(wrong=True)), pytest.raises(ConfigError):
            on_card(factory)


def hidden_rows_stay_hidden() -> None:
    with machine(Card()) as card:
        main = on_card()
        tested = card.searches
        got = main.search(VECTORS[:2], 5, ALL, Selection.whole(ROWS).excluding(HIDDEN))
        assert card.searches > tested
    assert not np.isin(got.ids, HIDDEN).any()
    assert (got.ids >= 0).all()


HIDDEN = np.arange(0, ROWS, 2)


def old_drivers_are_named() -> None:
    with machine(cuda=11_080):
        assert "driver is too old" in str(cards.why_no_card())
    with machine(cuda=12_000):
        assert "there is no card" in str(cards.why_no_card())


def failures_are_counted() -> None:
    assert card_log.device_for(Device.CUDA, 3, cpu_allowed=True)[0] is Device.CPU
    assert card_log.device_for(Device.CUDA, 2, cpu_allowed=True)[0] is Device.CUDA


@dataclass(frozen=True)
class Mutation:
    check: Callable[[], None]
    module: ModuleType | type
    name: str
    value: Any

    def __str__(self) -> str:
        where = self.module.__name__.rsplit(".", 1)[-1]
        return f"{self.check.__name__}-{where}.{self.name}={str(self.value)[:12]}"


def _without(lengths: Any, m: int) -> Any:
    return type(lengths)(each for each in lengths if each != m)


def _with(lengths: Any, m: int) -> Any:
    return type(lengths)([*lengths, m])


MUTATIONS = [
    Mutation(k_ends_at_its_limit, fake_gpu_faiss, "MAX_K", 2047),
    Mutation(k_ends_at_its_limit, fake_gpu_faiss, "MAX_K", 2049),
    Mutation(k_ends_at_its_limit, gpu, "GPU_MAX_K", 2047),
    Mutation(k_ends_at_its_limit, gpu, "GPU_MAX_K", 2049),
    Mutation(lists_end_at_their_limit, fake_gpu_faiss, "MAX_K", 2047),
    Mutation(lists_end_at_their_limit, fake_gpu_faiss, "MAX_K", 2049),
    *(
        Mutation(lengths_of_codes, module, name, _without(getattr(module, name), m))
        for module, name in ((fake_gpu_faiss, "PQ_LENGTHS"), (resolve, "GPU_PQ_M"))
        for m in (1, 48, 96)
    ),
    Mutation(lengths_of_codes, fake_gpu_faiss, "PQ_LENGTHS", _with(fake_gpu_faiss.PQ_LENGTHS, 5)),
    Mutation(lengths_of_codes, resolve, "GPU_PQ_M", _with(resolve.GPU_PQ_M, 5)),
    Mutation(lengths_of_codes, gpu, "FP16_LOOKUP_M", 57),
    Mutation(lengths_of_codes, gpu, "FP16_LOOKUP_M", 48),
    Mutation(lengths_of_codes, Card, "shared_memory_bytes", (48 << 10) - 1),
    Mutation(candidates_of_a_factor, resolve, "GPU_MAX_CANDIDATES", 2100),
    Mutation(candidates_of_a_factor, resolve, "GPU_MAX_CANDIDATES", 1999),
    Mutation(dimensions_of_sq8, resolve, "GPU_SQ8_DIM", 6145),
    Mutation(dimensions_of_sq8, resolve, "GPU_SQ8_DIM", 6143),
    Mutation(plans_cover_what_is_taken, card_memory, "TEMP_MEMORY_BYTES", 255 << 20),
    Mutation(plans_cover_what_is_taken, card_memory, "TEMP_MEMORY_BYTES", 257 << 20),
    Mutation(plans_cover_what_is_taken, card_memory, "INDEX_BYTES", 0),
    Mutation(plans_cover_what_is_taken, card_memory, "COPY_ROWS", 1),
    Mutation(plans_cover_what_is_taken, fake_gpu_faiss, "ALLOCATION_BYTES", 1 << 16),
    Mutation(plans_cover_what_is_taken, fake_gpu_faiss, "TEMP_MOST", 128 << 20),
    Mutation(a_full_card_is_refused, card_memory, "HEAD_ROOM_BYTES", 0),
    Mutation(wrong_answers_are_refused, gpu, "SELF_TEST_TOLERANCE", 10.0),
    Mutation(wrong_answers_are_refused, gpu, "SELF_TEST_ROWS", 0),
    Mutation(wrong_answers_are_refused, gpu, "SELF_TEST_TOLERANCE_HALF", 10.0),
    Mutation(
        hidden_rows_stay_hidden,
        MainIndex,
        "_takes_selector",
        property(lambda self: self._layers.takes_selector),
    ),
    Mutation(old_drivers_are_named, cards, "WHEELS", {"faiss-gpu": 11_000}),
    Mutation(old_drivers_are_named, cards, "WHEELS", {"faiss-gpu": 12_010}),
    Mutation(failures_are_counted, card_log, "FAILURES", 2),
    Mutation(failures_are_counted, card_log, "FAILURES", 4),
]
CHECKS = {each.check.__name__: each.check for each in MUTATIONS}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_holds(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation.module is Card:
        made = Card.__init__
        monkeypatch.setattr(
            Card, "__init__", lambda self: made(self, **{mutation.name: mutation.value})
        )
    else:
        monkeypatch.setattr(mutation.module, mutation.name, mutation.value)
    with pytest.raises((Exception, pytest.fail.Exception)):  # no check may end in silence
        mutation.check()
