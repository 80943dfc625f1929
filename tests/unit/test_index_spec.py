"""What a spec resolves to, and every limit it is checked against."""

import faiss
import pytest
from pydantic import ValidationError

from shardline.shards.core.errors import ConfigError
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import FIELD_KINDS, resolve
from shardline.shards.index.spec import Device, IndexKind, IndexSpec, ResolvedIndex


def resolved(rows: int = 1_000_000, dim: int = 128, gpu: bool = False, **fields) -> ResolvedIndex:
    metric = fields.pop("metric", Metric.COSINE)
    return resolve(IndexSpec(**fields), rows=rows, dim=dim, metric=metric, gpu=gpu)


@pytest.mark.parametrize(
    ("fields", "factory"),
    [
        ({"kind": "flat"}, "Flat"),
        ({"kind": "flat", "pca": 64}, "PCA64,Flat,Refine(SQfp16)"),
        ({"kind": "flat", "storage": "fp16"}, "SQfp16"),
        ({"kind": "ivf"}, "IVF2048,Flat"),
        ({"kind": "ivf", "storage": "fp16"}, "IVF2048,SQfp16"),
        ({"kind": "ivf", "storage": "sq8", "rerank": "fp32"}, "IVF2048,SQ8,RFlat"),
        ({"kind": "ivf", "nlist": 100, "nprobe": 7}, "IVF100,Flat"),
        ({"kind": "hnsw"}, "HNSW32"),
        ({"kind": "hnsw", "hnsw_m": 16, "pca": 64, "rerank": "fp32"}, "PCA64,HNSW16,RFlat"),
        ({"kind": "pq"}, "PQ32x8"),
        ({"kind": "pq", "m": 64, "nbits": 6, "rerank": "fp16"}, "PQ64x6,Refine(SQfp16)"),
        ({"kind": "ivfpq"}, "IVF2048,PQ32x8"),
        ({"kind": "ivfpq-fs"}, "IVF2048,PQ64x4fsr,Refine(SQfp16)"),
        ({"kind": "ivfpq-fs", "rerank": "fp32"}, "IVF2048,PQ64x4fsr,RFlat"),
        ({"kind": "ivfpq-fs", "pca": 64}, "PCA64,IVF2048,PQ32x4fsr,Refine(SQfp16)"),
        ({"kind": "sq8"}, "SQ8"),
        ({"kind": "factory", "factory": "IVF64,SQ8"}, "IVF64,SQ8"),
    ],
)
def test_factory_strings(fields: dict, factory: str) -> None:
    result = resolved(**fields)
    assert result.factory == factory
    assert faiss.index_factory(128, factory, faiss.METRIC_INNER_PRODUCT).d == 128
    assert result.kind == fields["kind"]


@pytest.mark.parametrize(
    ("rows", "gpu", "kind", "device"),
    [
        (1, False, "flat", "cpu"),
        (20_000, False, "flat", "cpu"),
        (20_001, False, "ivfpq-fs", "cpu"),
        (100_000_000, False, "ivfpq-fs", "cpu"),
        (500_000, True, "flat", "cuda"),
        (10_000_000, True, "ivf", "cuda"),
        (50_000_000, True, "ivfpq", "cuda"),
    ],
)
def test_auto_chooses_by_rows_and_device(rows: int, gpu: bool, kind: str, device: str) -> None:
    result = resolved(rows=rows, gpu=gpu)
    assert (result.kind, result.device) == (kind, device)
    assert result.reason.startswith(f"{kind}: ")
    assert f"{rows:,} rows x 128" in result.reason


def test_auto_honours_an_explicit_cpu() -> None:
    assert resolved(gpu=True, device="cpu").kind is IndexKind.IVFPQ_FS


@pytest.mark.parametrize(
    ("fields", "device"),
    [
        ({"kind": "ivfpq"}, Device.CUDA),
        ({"kind": "ivfpq", "nbits": 6}, Device.CPU),
        ({"kind": "ivfpq", "rerank": "fp16"}, Device.CUDA),
        ({"kind": "ivfpq", "rerank": "fp16", "rerank_factor": 21}, Device.CPU),
        ({"kind": "ivfpq", "m": 128}, Device.CPU),
        ({"kind": "hnsw"}, Device.CPU),
        ({"kind": "ivfpq-fs"}, Device.CPU),
    ],
)
def test_auto_device_takes_the_gpu_only_where_it_can(fields: dict, device: Device) -> None:
    assert resolved(gpu=True, **fields).device is device


@pytest.mark.parametrize(
    ("rows", "nlist", "nprobe"),
    [
        (1, 1, 1),
        (100, 2, 2),
        (1000, 16, 16),
        (10_000, 256, 64),
        (100_000, 512, 128),
        (1_000_000, 2048, 128),
        (10**8, 16384, 128),
    ],
)
def test_lists_follow_the_rows(rows: int, nlist: int, nprobe: int) -> None:
    result = resolved(kind="ivf", rows=rows)
    assert result.nlist == nlist
    assert result.nprobe == nprobe
    assert result.train_rows == min(rows, max(65_536, 64 * nlist))


def test_small_corpora_are_probed_in_full() -> None:
    result = resolved(kind="ivf", rows=1000)
    assert result.nprobe == result.nlist


def test_search_defaults() -> None:
    assert resolved(kind="ivfpq-fs").search_params == SearchParams(nprobe=128, rerank_factor=4)
    assert resolved(kind="hnsw").search_params == SearchParams(ef_search=256)
    assert resolved(kind="flat").search_params == SearchParams()
    chosen = resolved(kind="factory", factory="IVF64,Flat", nprobe=5)
    assert chosen.search_params == SearchParams(nprobe=5)


@pytest.mark.parametrize(("kind", "trains"), [("flat", False), ("hnsw", False), ("sq8", True)])
def test_training_rows(kind: str, trains: bool) -> None:
    assert resolved(kind=kind, rows=500).train_rows == (500 if trains else 0)


@pytest.mark.parametrize(("dim", "m"), [(128, 64), (100, 50), (6, 3), (7, 7), (127, 127), (1, 1)])
def test_sub_vectors_divide_any_dimension(dim: int, m: int) -> None:
    assert resolved(kind="ivfpq-fs", dim=dim).factory.startswith(f"IVF2048,PQ{m}x4fsr")


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"kind": "ivf", "rows": 10, "nlist": 11}, "nlist", "more lists than rows"),
        ({"kind": "ivf", "nlist": 8, "nprobe": 9}, "nprobe", "more than the lists"),
        ({"kind": "pq", "m": 7}, "m", "does not divide the dimension 128"),
        ({"kind": "pq", "pca": 60, "m": 64}, "m", "does not divide the dimension 60"),
        ({"kind": "pq", "rows": 255}, "nbits", "cannot train 256 centroids"),
        ({"kind": "ivfpq-fs", "nbits": 8}, "nbits", "FastScan codes have 4 bits"),
        ({"kind": "ivfpq-fs", "rerank": "none"}, "rerank", "do not compare across shards"),
        ({"kind": "flat", "rerank": "fp16"}, "rerank", "flat is exact already"),
        ({"kind": "hnsw", "rerank": "fp32"}, "rerank", "hnsw is exact already"),
        ({"kind": "pq", "rerank_factor": 3}, "rerank_factor", "nothing is re-ranked"),
        ({"kind": "flat", "pca": 129}, "pca", "more than the dimension"),
        ({"kind": "flat", "pca": 64, "rows": 63}, "pca", "more than the rows"),
        ({"kind": "flat", "nlist": 4}, "nlist", "no effect with kind flat"),
        ({"kind": "ivf", "ef_search": 4}, "ef_search", "no effect with kind ivf"),
        ({"kind": "ivf", "factory": "Flat"}, "factory", "no effect with kind ivf"),
        ({"kind": "auto", "nlist": 4, "rows": 100}, "nlist", "no effect with kind flat"),
        ({"kind": "factory"}, "factory", "missing"),
        ({"kind": "factory", "factory": "Flut"}, "factory", "faiss does not accept it"),
        ({"kind": "factory", "factory": "PQ7"}, "factory", "faiss does not accept it"),
        ({"kind": "factory", "factory": "IVF99999999999,Flat"}, "factory", "does not accept"),
        ({"kind": "factory", "factory": "IDMap,Flat"}, "factory", "not an index Shardline can"),
        ({"kind": "factory", "factory": "NSG16"}, "factory", "not an index Shardline can serve"),
        ({"kind": "factory", "factory": "IVF4,PQ32x4fs"}, "factory", "do not compare"),
        ({"kind": "factory", "factory": "PQ32x4fs"}, "factory", "do not compare"),
        ({"kind": "factory", "factory": "IVF0,Flat"}, "factory", "lists out of range"),
        ({"kind": "factory", "factory": "IVF9,Flat", "rows": 8}, "factory", "lists out of range"),
        ({"kind": "factory", "factory": "Flat", "nprobe": 8}, "nprobe", "no effect with Flat"),
        ({"kind": "factory", "factory": "Flat", "pca": 8}, "pca", "no effect with kind factory"),
        ({"kind": "flat", "rows": 0}, "kind", "no rows to index"),
        ({"kind": "flat", "device": "cuda"}, "device", "no GPU can be used here"),
        ({"kind": "hnsw", "device": "cuda", "gpu": True}, "kind", "runs on CPU only"),
        ({"kind": "ivfpq", "device": "cuda", "gpu": True, "nbits": 6}, "nbits", "8-bit codes"),
        ({"kind": "ivfpq", "device": "cuda", "gpu": True, "m": 128}, "m", "on a GPU"),
        ({"kind": "ivf", "storage": "fp32", "rerank": "fp16"}, "rerank", "exact already"),
    ],
)
def test_limits_name_the_field(fields: dict, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolved(**fields)
    assert caught.value.field == f"index.{field}"
    assert caught.value.expected is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "annoy"},
        {"kind": "ivf", "nlist": 0},
        {"kind": "ivf", "nprobe": 2049},
        {"kind": "pq", "nbits": 13},
        {"kind": "hnsw", "hnsw_m": 1},
        {"kind": "hnsw", "ef_search": 0},
        {"kind": "ivfpq-fs", "rerank": "fp8"},
        {"kind": "ivfpq-fs", "rerank_factor": 65},
        {"kind": "flat", "pca": 0},
        {"device": "tpu"},
        {"n_list": 5},
    ],
)
def test_illegal_values_and_unknown_keys_are_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        IndexSpec(**fields)


def test_every_field_that_not_all_kinds_read_says_which_do() -> None:
    assert set(FIELD_KINDS) == set(IndexSpec.model_fields) - {"kind", "device", "target_recall"}
    assert all(field.description for field in IndexSpec.model_fields.values())


def test_models_round_trip_through_json() -> None:
    spec = IndexSpec(kind="ivfpq-fs", nprobe=8)
    assert IndexSpec.model_validate_json(spec.model_dump_json()) == spec
    result = resolved(kind="ivfpq-fs", nprobe=8)
    assert ResolvedIndex.model_validate_json(result.model_dump_json()) == result
