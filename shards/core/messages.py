"""Messages between processes: router <-> shard over the wire, controller -> router through Ray.

Plain data only. How they become bytes, and what is refused on the way back, is in ``shards.wire``.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardline.shards.core.exclusions import Excluded
from shardline.shards.core.partition import Partition, Partitioning
from shardline.shards.core.schema import FloatArray, IdArray, Metric, Ranked

# The largest search-time knobs, in configuration, over HTTP and in the index alike.
MAX_NPROBE = 2048  # faiss's limit on GPUs; on a CPU more would be slower than an exact scan
MAX_EF_SEARCH = 16_384
MAX_RERANK_FACTOR = 64
MAX_RETURNED = 64  # attributes of one request
MAX_RETURNED_BYTES = 16 << 20  # of the attributes in one answer, packed
MAX_SHARDS = 4096
MAX_WRITTEN_ROWS = 4096  # of one write to one shard
# Of the writes under way on one connection, which a single one may exceed: more are refused.
WRITE_ROOM_BYTES = 8 << 20
MAX_WRITE_KEY_BYTES = 128
MAX_SERVED_AT_ONCE = 16  # queries of one announcement of a router
NO_FILTER = -1  # instead of a count of rows that match


@dataclass(frozen=True, slots=True, order=True)
class ReplicaKey:
    """A place in the cluster: one process that holds one item range of one generation.

    The one key of events, actor handles, routes, connections, metrics and logs.
    """

    generation: int
    shard: int
    replica: int = 0

    def __str__(self) -> str:
        return "-".join(self.labels)

    @property
    def labels(self) -> tuple[str, str, str]:
        """As the label values of ``metrics.REPLICA``."""
        return str(self.generation), str(self.shard), str(self.replica)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """Search-time knobs of the index kinds; None means the generation's own default.

    nprobe: inverted lists visited, ivf kinds; ef_search: candidate queue of hnsw;
    rerank_factor: candidates re-ranked exactly, as a multiple of k, for re-ranked kinds.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    rerank_factor: int | None = None


NO_PARAMS = SearchParams()  # nearly every request shares this one


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search may ask for besides its parameters; like them, shared by all its queries.

    A field added here travels in the tail of the frame, keeps searches that differ in it out of one
    another's frames and cached answers, and is an optional field of the HTTP body of that name
    (``SearchBody`` describes it). Values must be hashable.

    min_seq: of each shard, by its number, how many writes it must have applied to answer; empty
    for any number. background: nobody waits for it, a batch job's say: a shard searches it while
    no other search waits. exact: every row is scored with the best vector that the shard stores of
    it, at low priority; the parameters say nothing then. filter: only items that match it come
    back; as ``check_filter`` packs it, b"" for all items.
    """

    min_seq: tuple[int, ...] = ()
    background: bool = False
    exact: bool = False
    filter: bytes = b""


NO_OPTIONS = SearchOptions()


@dataclass(slots=True, kw_only=True)  # not frozen: made for every search, in a third of the time
class SearchRequest:
    """queries (n, dim) float32, already checked and normalised; timeout_ms is what remains.

    What all queries share is in ``params`` and ``options``; what each has for itself is an array
    with a row per query, as ``queries`` is, so that queries of many callers can share a frame.
    excluded: of these the ids that the shard may hold; None where no query excludes any.
    """

    queries: FloatArray
    k: int
    timeout_ms: float
    params: SearchParams = NO_PARAMS
    options: SearchOptions = NO_OPTIONS
    excluded: Excluded | None = None

    def rows(self, rows: slice) -> "SearchRequest":
        """Of some of its queries."""
        excluded = None if self.excluded is None else self.excluded.rows(rows)
        return replace(self, queries=self.queries[rows], excluded=excluded)


@dataclass(slots=True, kw_only=True)  # not frozen: as SearchRequest
class SearchReply:
    """The k best rows of each query; rows: live rows searched; search_ms: milliseconds it took.

    generation and seq say what was searched: seq counts the writes applied to it, 0 for none.
    others_share, of a background search: the share of the last seconds in which the shard searched
    for others; 0 if nobody else asked. matched, of a search with a filter: live rows that match it;
    NO_FILTER of others. excluded (n,) int32: of each query with fewer than k results, how many live
    rows, that match if there is a filter, its exclusions left out, 0 of others; None: no query of
    the request has any.
    """

    ranked: Ranked
    rows: int
    generation: int
    seq: int
    search_ms: float
    others_share: float = 0.0
    matched: int = NO_FILTER
    excluded: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """Asks for the stored vectors of item_ids (n,) int64, those of other shards included.

    min_seq: as of ``SearchOptions``.
    """

    item_ids: IdArray
    timeout_ms: float
    min_seq: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReply:
    """The subset that this shard holds: item_ids (m,) int64, vectors (m, dim) float32."""

    item_ids: IdArray
    vectors: FloatArray
    generation: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributesRequest:
    """Asks for named attributes of item_ids (n,) int64, those of other shards included.

    No names stand for all attributes, the first MAX_RETURNED of them. min_seq: as of
    ``SearchOptions``.
    """

    item_ids: IdArray
    names: tuple[str, ...]
    timeout_ms: float
    min_seq: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributesReply:
    """Of the subset that this shard holds, item_ids (m,) int64: for each of names, in order, m
    values of JSON. ``values`` are lists in msgpack, one after the other, each of values of the
    next items; bytes, because the wire bounds what it unpacks itself. kinds: of each of names, an
    ``AttributeKind``.
    """

    item_ids: IdArray
    names: tuple[str, ...]
    values: bytes
    kinds: tuple[str, ...]
    generation: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpsertRequest:
    """Rows to add, or to put in the place of those of the same ids.

    item_ids (n,) int64, each once; vectors (n, dim) float32, already checked and normalised.
    attributes: a map from names to lists of n values of JSON, in msgpack; b"" for none. key makes a
    repeated request one effect; "" for none. features: what the vectors were encoded from, a list
    of n maps in msgpack, which the log keeps to encode them for another model; b"" for items that
    were given by vector. epoch: of the primary that it is meant for, which no other takes; 0 for
    any.
    """

    item_ids: IdArray
    vectors: FloatArray
    attributes: bytes
    key: str
    timeout_ms: float
    features: bytes = b""
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteRequest:
    """item_ids (n,) int64, each once, existing or not; key, epoch: as of ``UpsertRequest``."""

    item_ids: IdArray
    key: str
    timeout_ms: float
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReply:
    """The write is durable, and part of every search from now on of who has applied ``seq`` writes.

    rows: items that were named; existed: those of them that were there before.
    """

    rows: int
    existed: int
    generation: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """A shard's refusal; ``code`` is the code of an error class of shards.core.errors.

    field names the part of the request that is wrong, where the shard knows it.
    """

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Server's first frame: who it is, and the nonce the client must prove itself over."""

    protocol: int
    generation: int
    shard: int
    replica: int
    epoch: int
    nonce: bytes

    @property
    def key(self) -> ReplicaKey:
        return ReplicaKey(self.generation, self.shard, self.replica)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Client's answer: HMAC over Hello, address and nonces, and its nonce for the server to prove.

    shards.wire.handshake has the details.
    """

    nonce: bytes
    mac: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Server's HMAC over the same, in its own role; requests may follow."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class Absence:
    """Why a replica does not answer: the code of an error of shards.core.errors, and a text."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHealth:
    """What the writes to a shard have made of its index.

    rows: that may come back. changed: rows written, and rows hidden, since its main index was made.
    unseen: rows of items that the generation was built without. imbalance: of the inverted lists
    of the main index, 1 where all are of one length; None: it has none. trouble: why the newest
    compaction, or the change to its main index, failed; None: it did not. index_of: the generation
    whose index it has taken over; None: it has its own. device_note: why it is searched on another
    device than its generation is made for; None: it is not.
    """

    rows: int
    changed: int
    unseen: int
    imbalance: float | None
    trouble: str | None = None
    index_of: int | None = None
    device_note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """A sign of life of a shard's process.

    seq: the writes that it has applied. leads: the epoch with which it takes the writes of its
    shard; None: it does not, because it was not asked to or its log has a higher epoch by now.
    refused: why it takes none at present though it leads; it tries to by itself. health: None: not
    known yet.
    """

    pid: int
    seq: int
    leads: int | None = None
    refused: Absence | None = None
    health: ShardHealth | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSeen:
    """A router replica, as it announces itself to the controller.

    host is the address by which Ray knows its host, node_id Ray's name for that host.
    """

    host: str
    node_id: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """recall@k of ``queries`` served queries of a generation, against exact answers; since: Unix
    seconds of the oldest; k: the median of what they asked for."""

    generation: int
    recall: float
    queries: int
    k: int
    since: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedQueries:
    """Vectors (n, dim) float32 as shards were asked with, n <= MAX_SERVED_AT_ONCE."""

    model_version: str
    vectors: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterNews:
    """What a router has found since its last announcement. None: nothing."""

    quality: Quality | None = None
    served: ServedQueries | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRoute:
    """Where one replica answers. address is None while no process serves it; absence says why.

    epoch rises each time the replica is placed anew: a router never goes back to a lower one.
    host is the address by which Ray knows its host; None: not known.
    """

    key: ReplicaKey
    epoch: int
    address: tuple[str, int] | None
    absence: Absence | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRoute:
    """The replicas of one shard, at least one, by replica number; each holds the same rows.

    While one is being replaced there is one more than ``cluster.replicas``. primary: the number of
    the replica that takes writes; None: none does now. primary_epoch: with which it leads; 0: not
    known.
    """

    shard: int
    rows: int
    replicas: tuple[ReplicaRoute, ...]
    primary: int | None = None
    primary_epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """What a router needs to answer for one generation; a higher version replaces a lower one.

    Versions come from one counter of the whole store, so they rise across generations too.
    generation_dir is a path every router replica can read; the query encoder lives below it.
    boundaries are those of a ``Partition``: they say which shard an item id belongs to.
    encoder_checksum is the SHA-256 of the query encoder's encoder.json, which holds those of its
    other files, as the generation's manifest lists it; None: the generation has no encoder.
    item_encoder_checksum is the same of the item encoder.
    notes say what is wrong with the store's files of state, or where replicas are missing, for
    people who look after it. cluster_id tells the cluster from every other; it is made from its
    secret, so a restarted controller has the same. other_model: the model version of a generation
    that is loaded beside this one and gets the same writes, if it is another; None: there is none.
    went_live_with: of each shard, how many writes it had when the generation took the place of
    another, all of whose writes are among them; empty where none were brought over.
    """

    version: int
    generation: int
    generation_dir: str
    model_version: str
    dim: int
    metric: Metric
    index: str
    partitioning: Partitioning
    boundaries: tuple[int, ...]
    shards: tuple[ShardRoute, ...]
    encoder_checksum: str | None = None
    item_encoder_checksum: str | None = None
    notes: tuple[Absence, ...] = ()
    cluster_id: str = ""
    other_model: str | None = None
    went_live_with: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return sum(route.rows for route in self.shards)

    @property
    def partition(self) -> Partition:
        return Partition(self.partitioning, np.array(self.boundaries, dtype=np.uint64))
