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

MEASURED_K = 100  # the k that builds choose the default parameters of searches at


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


class Storage(StrEnum):
    """Of the vectors of a flat or ivf index: 4, 2 or 1 bytes per value."""

    FP32 = "fp32"
    FP16 = "fp16"
    SQ8 = "sq8"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class IndexSpec(BaseModel):
    """The index as the user asks for it; a field left out is chosen by rows, dim and device.

    The parameters of a search that are left out are chosen by measurement when shards are built.
    They are measured for 100 results. A query for more results visits proportionally more lists;
    one for fewer re-ranks as many candidates as for 100.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: IndexKind = Field(
        default=IndexKind.AUTO,
        description="Kind of index; auto chooses by rows, dimension and device.",
    )
    nlist: int | None = Field(
        default=None,
        ge=1,
        le=1 << 20,
        description="[lists] Of ivf kinds; null: about 2 sqrt(rows).",
    )
    nprobe: int | None = Field(
        default=None,
        ge=1,
        le=MAX_NPROBE,
        description="[lists] Lists searched per query, ivf kinds; at most nlist. Chosen by the "
        "build if null.",
    )
    m: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="[sub-vectors] Codes per vector, pq kinds; must divide the dimension.",
    )
    nbits: int | None = Field(
        default=None,
        ge=4,
        le=12,
        description="[bits] Bits per sub-vector, pq kinds; ivfpq-fs: 4, GPU: 8.",
    )
    hnsw_m: int | None = Field(default=None, ge=2, le=256, description="[links] Links per node.")
    ef_construction: int | None = Field(
        default=None, ge=1, le=4096, description="[candidates] Queue size while building, hnsw."
    )
    ef_search: int | None = Field(
        default=None,
        ge=1,
        le=MAX_EF_SEARCH,
        description="[candidates] Queue size of a query, hnsw; at least k. Chosen by the build if "
        "null.",
    )
    storage: Storage | None = Field(
        default=None,
        description="How flat (fp32, fp16) and ivf keep vectors: 4, 2 or 1 bytes per value; null: "
        "fp32.",
    )
    rerank: Rerank | None = Field(
        default=None,
        description="Copies of the vectors that re-rank the candidates; in the host's memory where "
        "the shard is on a GPU.",
    )
    rerank_factor: int | None = Field(
        default=None,
        ge=1,
        le=MAX_RERANK_FACTOR,
        description="[multiple of k] Candidates re-ranked per query. Chosen by the build if null.",
    )
    pca: int | None = Field(
        default=None, ge=1, description="[dimensions] Output size of a PCA before the index."
    )
    factory: str | None = Field(
        default=None, max_length=200, description="faiss factory string, for kind factory only."
    )
    target_recall: float = Field(
        default=0.98,
        gt=0,
        le=1,
        description="[share] recall@100 for which a build chooses nprobe, ef_search, "
        "rerank_factor.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$",
        description="Where shards search: auto, cpu, cuda, or cuda:n, the GPU n of those that a "
        "shard sees; auto: a GPU if one suits.",
    )

    @property
    def device_kind(self) -> Device:
        return Device(self.device.partition(":")[0])

    @property
    def card(self) -> int:
        """Of those that the process sees."""
        return int(self.device.partition(":")[2] or 0)


class ResolvedIndex(BaseModel):
    """An index with nothing left open; what is trained, written to the manifest, and searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: IndexKind = Field(description="Any kind but auto.")
    factory: str = Field(description="The whole index as a faiss factory string.")
    device: Device = Field(description="cpu or cuda.")
    card: int = Field(default=0, description="GPU of those that a shard sees, on cuda.")
    nlist: int | None = Field(description="Inverted lists; null if the kind has none.")
    nprobe: int | None = Field(description="Lists searched by default; null if there are none.")
    ef_construction: int | None = Field(description="hnsw's build queue; null for other kinds.")
    ef_search: int | None = Field(description="hnsw's default search queue; null for others.")
    rerank_factor: int | None = Field(description="Default re-rank factor; null without re-rank.")
    train_rows: int = Field(description="Rows of the training sample; 0 if nothing is trained.")
    reason: str = Field(description="One sentence: why this index.")

    @property
    def keeps_vectors(self) -> bool:
        """Whether it gives back every vector bit for bit; others give back approximations."""
        parts = self.factory.split(",")
        is_plain = all(each == "Flat" or each.startswith(("IVF", "HNSW")) for each in parts)
        return parts[-1] == "RFlat" or is_plain

    @property
    def search_params(self) -> SearchParams:
        """The defaults that a request's own parameters override."""
        return SearchParams(
            nprobe=self.nprobe, ef_search=self.ef_search, rerank_factor=self.rerank_factor
        )
