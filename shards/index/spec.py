"""Index specs: what the user asks for, and what is written to the manifest once it is concrete.

Plain models, light to import; ``shards.index.resolve`` turns the first into the second and checks
every limit on the way.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from shardline.shards.core.messages import (
    MAX_EF_SEARCH,
    MAX_NPROBE,
    MAX_RERANK_FACTOR,
    SearchParams,
)


class IndexKind(StrEnum):
    AUTO = "auto"
    FLAT = "flat"
    IVF = "ivf"
    HNSW = "hnsw"
    PQ = "pq"
    IVFPQ = "ivfpq"
    IVFPQ_FS = "ivfpq-fs"
    SQ8 = "sq8"
    FACTORY = "factory"


class Rerank(StrEnum):
    NONE = "none"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class IndexSpec(BaseModel):
    """The index as the user asks for it; a field left out is chosen by rows, dim and device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: IndexKind = Field(
        default=IndexKind.AUTO,
        description="auto | flat | ivf | hnsw | pq | ivfpq | ivfpq-fs | sq8 | factory",
    )
    nlist: int | None = Field(
        default=None, ge=1, le=1 << 20, description="inverted lists of ivf kinds, 1 to rows"
    )
    nprobe: int | None = Field(
        default=None,
        ge=1,
        le=MAX_NPROBE,
        description="lists visited by a query, ivf kinds, 1 to nlist",
    )
    m: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="sub-vectors of pq kinds; must divide the dimension",
    )
    nbits: int | None = Field(
        default=None,
        ge=4,
        le=12,
        description="bits a sub-vector, pq kinds; 4 for ivfpq-fs, 8 on a GPU",
    )
    hnsw_m: int | None = Field(default=None, ge=2, le=256, description="links a node, hnsw")
    ef_construction: int | None = Field(
        default=None, ge=1, le=4096, description="candidate queue while building, hnsw"
    )
    ef_search: int | None = Field(
        default=None,
        ge=1,
        le=MAX_EF_SEARCH,
        description="candidate queue of a query, hnsw; k at least",
    )
    rerank: Rerank | None = Field(
        default=None, description="none | fp16 | fp32: stored copies that re-rank the candidates"
    )
    rerank_factor: int | None = Field(
        default=None,
        ge=1,
        le=MAX_RERANK_FACTOR,
        description="candidates re-ranked, as a multiple of k",
    )
    pca: int | None = Field(
        default=None, ge=1, description="dimensions kept by a PCA in front of the index, 1 to dim"
    )
    factory: str | None = Field(
        default=None, max_length=200, description="faiss factory string, kind factory only"
    )
    device: Device = Field(
        default=Device.AUTO, description="auto | cpu | cuda, where shards search"
    )


class ResolvedIndex(BaseModel):
    """An index with nothing left open; what is trained, written to the manifest, and searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: IndexKind = Field(description="any kind but auto")
    factory: str = Field(description="the whole index as a faiss factory string")
    device: Device = Field(description="cpu or cuda")
    nlist: int | None = Field(description="inverted lists; None where the kind has none")
    nprobe: int | None = Field(description="default lists visited; None where there are none")
    ef_construction: int | None = Field(description="hnsw build queue; None for other kinds")
    ef_search: int | None = Field(description="default hnsw search queue; None for other kinds")
    rerank_factor: int | None = Field(description="default re-rank multiple; None without re-rank")
    train_rows: int = Field(description="rows of the training sample; 0 where nothing is trained")
    reason: str = Field(description="one sentence: why this index")

    @property
    def search_params(self) -> SearchParams:
        """The defaults that a request's own parameters override."""
        return SearchParams(
            nprobe=self.nprobe, ef_search=self.ef_search, rerank_factor=self.rerank_factor
        )
