"""The card's own rates, faiss's answers on it against the CPU's, and the limits that it states."""

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from shardline.bench.gpu.card import Card, Corpus, FloatArray, IdArray, recall, time_calls
from shardline.bench.gpu.floors import FP16_TABLES_FROM, GIB, Rates
from shardline.bench.gpu.part_findings import Findings, Work
from shardline.bench.gpu.sizes import Sizes

CLOSE = 1e-4  # relative to the largest score
CLOSE_FP16 = 5e-3  # 11 bits of mantissa over a sum of products
SAME_IDS = 0.99  # rows of nearly equal scores change places
SELF_TEST_ROWS = 8
MOST, MOST_CUVS = 2048, 16_384  # k and nprobe: faiss/gpu/impl/IndexUtils.cu, getMaxKSelection


def measure_rates(card: Card, sizes: Sizes) -> Rates:
    """Bandwidth of a copy (bytes read and written), and the rates of square matrix products of
    random values: products of zeros can run faster."""
    source = torch.randn(sizes.copy_bytes // 4, device=card.device)
    target = torch.empty_like(source)

    def copy(number: int) -> None:
        target.copy_(source)
        card.synchronize()

    taken = min(time_calls(copy, seconds=sizes.seconds, fewest=sizes.fewest))
    side = sizes.matrix_side
    return Rates(
        bytes_per_s=2 * sizes.copy_bytes / taken * 1000,
        bf16=_product_rate(card, sizes, torch.randn(side, side, device=card.device).bfloat16()),
        fp16=_product_rate(card, sizes, torch.randn(side, side, device=card.device).half()),
        fp32=_product_rate(card, sizes, torch.randn(side, side, device=card.device)),
    )


def _product_rate(card: Card, sizes: Sizes, left: torch.Tensor) -> float:
    right = left.flip(0).contiguous()

    def product(number: int) -> None:
        left @ right
        card.synchronize()

    taken = min(time_calls(product, seconds=sizes.seconds, fewest=sizes.fewest))
    return 2.0 * len(left) ** 3 / taken * 1000


def machine(card: Card, sizes: Sizes, findings: Findings) -> None:
    """Which card, which versions, and its rates: the floors of all other parts come from here."""
    rates = measure_rates(card, sizes)
    findings.notes |= {
        "memory_gib": round(card.total_bytes / GIB, 2),
        "driver": _driver(),
        "cuda_of_torch": str(torch.version.cuda),
        "faiss_is_cuvs": hasattr(card.faiss, "GpuIndexCagra"),
        "copy_gb_per_s": round(rates.bytes_per_s / 1e9, 1),
        "bf16_tflop_per_s": round(rates.bf16 / 1e12, 3),
        "fp16_tflop_per_s": round(rates.fp16 / 1e12, 3),
        "fp32_tflop_per_s": round(rates.fp32 / 1e12, 3),
        "rates": {
            "bytes_per_s": rates.bytes_per_s,
            "bf16": rates.bf16,
            "fp16": rates.fp16,
            "fp32": rates.fp32,
        },
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    return answer.stdout.strip() or "unknown"


def cpu_kinds(faiss: Any, quantizer: Any, dim: int, nlist: int, code: int) -> dict[str, Any]:
    """Empty CPU indexes of the kinds that a card takes, by inner product; IVF kinds share the
    coarse ``quantizer``."""
    metric = faiss.METRIC_INNER_PRODUCT
    half, byte = faiss.ScalarQuantizer.QT_fp16, faiss.ScalarQuantizer.QT_8bit
    return {
        "flat": faiss.IndexFlat(dim, metric),
        "flat fp16": faiss.IndexFlat(dim, metric),
        "ivf": faiss.IndexIVFFlat(quantizer, dim, nlist, metric),
        "ivf fp16": faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, half, metric),
        "ivf sq8": faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, byte, metric),
        f"ivfpq{code}": faiss.IndexIVFPQ(quantizer, dim, nlist, code, 8, metric),
    }


def clone_options(kind: str, code: int = 0) -> dict[str, Any]:
    """How a kind goes to the card: half precision where its name says so, or its tables need it."""
    return {"useFloat16": kind == "flat fp16" or code >= FP16_TABLES_FROM}


def correctness(work: Work, findings: Findings) -> None:
    """Every kind on the card against the same index on the CPU, with the same lists visited: the
    k-th scores agree, nearly all ids agree, and stored rows find themselves (self-test)."""
    sizes, faiss = work.sizes, work.card.faiss
    corpus = Corpus(work.card, sizes.checked_rows, sizes.dim, sizes.block_rows)
    rows = np.concatenate([block.cpu().numpy() for _, block in corpus.blocks()])
    queries = corpus.queries(sizes.truth_queries).cpu().numpy()
    quantizer = faiss.IndexFlatIP(sizes.dim)
    codes = (sizes.pq_code, sizes.billion_code)
    kinds = {
        (name, code): index
        for code in codes
        for name, index in cpu_kinds(faiss, quantizer, sizes.dim, sizes.checked_lists, code).items()
        if code == codes[0] or name.startswith("ivfpq")
    }
    for (kind, code), index in kinds.items():
        index.train(rows)
        index.add(rows)
        if kind.startswith("ivf"):
            index.nprobe = max(2, sizes.checked_lists // 4)
        resources = work.card.resources()
        on_card = work.card.put(index, resources, **clone_options(kind, code))
        tolerance = CLOSE_FP16 if "fp16" in kind or code >= FP16_TABLES_FROM else CLOSE
        found = index.search(queries, sizes.k), on_card.search(queries, sizes.k)
        compare(findings, kind, *found, tolerance)
        _self_test(findings, kind, index, on_card, tolerance)
        del on_card, resources


def compare(
    findings: Findings,
    kind: str,
    on_cpu: tuple[FloatArray, IdArray],
    on_card: tuple[FloatArray, IdArray],
    tolerance: float,
) -> None:
    """Checks (n, k) scores and ids of the card against the CPU's."""
    (expected, expected_ids), (got, got_ids) = on_cpu, on_card
    worst = float(np.abs(got - expected).max() / np.abs(expected).max())
    findings.check(
        f"{kind}: scores as on the CPU",
        worst <= tolerance,
        expected=f"largest difference {tolerance:g} of the largest score",
        got=f"{worst:.2e}",
    )
    same = recall(got_ids, expected_ids)
    least = SAME_IDS if tolerance == CLOSE else SAME_IDS - 0.04
    findings.check(
        f"{kind}: ids as on the CPU", same >= least, expected=f">= {least:.2f}", got=f"{same:.4f}"
    )


def _self_test(findings: Findings, kind: str, index: Any, on_card: Any, tolerance: float) -> None:
    """What a shard does when it has loaded: stored rows as queries, best scores on both devices."""
    if hasattr(index, "make_direct_map"):
        index.make_direct_map()
    rows = index.reconstruct_n(0, SELF_TEST_ROWS)
    expected, _ = index.search(rows, 1)
    got, _ = on_card.search(rows, 1)
    worst = float(np.abs(got - expected).max())
    findings.check(
        f"{kind}: self-test",
        worst <= tolerance * 2,
        expected=f"<= {tolerance * 2:g}",
        got=f"{worst:.2e}",
    )


def limits(work: Work, findings: Findings) -> None:
    """What docs/GPU.md says that this wheel takes, refuses and ignores, tried one by one."""
    faiss, dim, lists = work.card.faiss, work.sizes.dim, MOST + 2
    is_cuvs = hasattr(faiss, "GpuIndexCagra")
    most = MOST_CUVS if is_cuvs else MOST
    rows = Corpus(work.card, lists, dim, lists).sample(lists).cpu().numpy()
    flat = faiss.IndexFlatIP(dim)
    flat.add(rows)
    ivf = faiss.IndexIVFFlat(flat, dim, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.is_trained = True
    ivf.add(rows)
    resources = work.card.resources()
    on_card = work.card.put(ivf, resources)
    asked = rows[:2]

    def with_nprobe(nprobe: int) -> Callable[[], object]:
        return lambda: on_card.search(asked, 1, params=faiss.SearchParametersIVF(nprobe=nprobe))

    _expect(findings, f"k = {most}", "taken", lambda: on_card.search(asked, most))
    _expect(findings, f"k = {most + 1}", "refused", lambda: on_card.search(asked, most + 1))
    _expect(findings, f"nprobe = {most}", "taken", with_nprobe(most))
    _expect(findings, f"nprobe = {most + 1}", "refused", with_nprobe(most + 1))
    _expect(
        findings,
        "remove_ids",
        "refused",
        lambda: on_card.remove_ids(np.arange(2, dtype=np.int64)),
    )
    _selector(work, findings, on_card, asked, expected="honoured" if is_cuvs else "ignored")
    for name in ("HNSW16", "PQ8x4fs", "IVF8,PQ8x4fs", "IVF8,Flat,RFlat"):
        empty = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
        _expect(findings, name, "refused", partial(work.card.put, empty, resources))
    _code_lengths(work, findings, resources, is_cuvs=is_cuvs)


def _selector(
    work: Work, findings: Findings, on_card: Any, asked: FloatArray, *, expected: str
) -> None:
    """Searches among one row only: an index that ignores the selector finds the query itself."""
    faiss = work.card.faiss
    only = faiss.IDSelectorRange(1, 2)
    params = faiss.SearchParametersIVF(nprobe=16, sel=only)
    try:
        _, ids = on_card.search(asked[:1], 1, params=params)
    except RuntimeError as error:
        got = f"refused: {_first_line(error)}"
    else:
        got = "ignored" if ids[0, 0] == 0 else "honoured"
    findings.check("an IDSelector", got == expected, expected=expected, got=got)


def _code_lengths(work: Work, findings: Findings, resources: Any, *, is_cuvs: bool) -> None:
    """Product quantisers of lengths that the kernels have and have not."""
    faiss = work.card.faiss
    for dim, m, half, expected in (
        (20, 5, False, "taken" if is_cuvs else "refused"),
        (64, 32, False, "taken"),
        (128, 64, False, "taken" if is_cuvs else "refused"),
        (128, 64, True, "taken"),
    ):
        quantizer = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFPQ(quantizer, dim, 4, m, 8, faiss.METRIC_INNER_PRODUCT)
        rows = Corpus(work.card, 512, dim, 512).sample(512).cpu().numpy()
        index.pq.cp.niter = 1
        index.train(rows)
        tables = "float16" if half else "float32"
        _expect(
            findings,
            f"ivfpq of {m} bytes, {tables} tables",
            expected,
            partial(work.card.put, index, resources, useFloat16=half),
        )


def _expect(findings: Findings, name: str, expected: str, act: Callable[[], object]) -> None:
    try:
        act()
    except RuntimeError as error:
        findings.check(
            name, expected == "refused", expected=expected, got=f"refused: {_first_line(error)}"
        )
    else:
        findings.check(name, expected == "taken", expected=expected, got="taken")


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200]
