"""Searches of a main index among the rows that match a filter, whatever their share.

An index visits a part of its rows that is large enough where all of them count. Of a filter that
few rows match it would find few: what it visits has to grow as the share of matching rows falls.

    few rows match      their stored vectors are copied, side by side, and all are scored
    more, and often     all are compared by codes of their own (``row_codes``), the best are scored
    more, with lists    as many matching rows are visited as an unfiltered search visits rows; then
                        as many lists as may hold better ones, by the estimate of ``probing``
    more, without       the parameters are widened by the share of what matches
    still fewer than k  all that match are scored, block by block

What a filter needs is derived from its rows when it is used, and kept within a bounded number of
bytes. Hidden rows change with every write, so it is kept for ``Selection.origin``, what matches,
and hidden rows are left out when it is searched.
"""

import logging
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from shardline.shards.core.messages import (
    MAX_EF_SEARCH,
    MAX_NPROBE,
    NO_PARAMS,
    SearchParams,
)
from shardline.shards.core.schema import (
    EMPTY_ID,
    EMPTY_SCORE,
    FloatArray,
    IdArray,
    Metric,
    Ranked,
)
from shardline.shards.index.exact_scan import StoredVectors, scan
from shardline.shards.index.layers import Layers
from shardline.shards.index.list_scan import ListScan, ListWalk
from shardline.shards.index.probing import FilledLists, Lists, NearLists
from shardline.shards.index.row_codes import CodedRows, RowCodes
from shardline.shards.index.selection import Selection
from shardline.shards.index.spec import MEASURED_K

# Filters with so few values (rows x dimensions) are copied and scored as a whole: 8,192 rows of 128
# take 0.1 ms of one core, and copying them 0.2 ms.
COPIED_VALUES = 1 << 20
# Those that so many queries have used are compared by codes, if that is far less than what these
# took: to pick the codes of 25,000 rows takes a millisecond, of 125,000 four. The codes of all rows
# are made when a filter needs them first: of no index with fewer rows, most of whose filters have
# so few that all are scored, and of none whose codes would take more than half of what is kept.
CODED_AFTER = 1
CODED_FROM, CODED_ROWS = 1 << 14, 1 << 17
# Of a query, of each of its rows, and of each candidate, in vectors of CODED_DIM numbers, where
# other shards read memory too; and how many times as long a walk has to take.
CODED_MS, CODED_ROW_MS, CODED_CANDIDATE_MS, CODED_DIM = 0.1, 2e-6, 1e-4, 128
CODED_GAIN = 2
# Candidates that are scored by their vectors, as a multiple of the results that count. How many of
# these the codes then lose depends on the vectors: very much, where they lie in tight clusters. So
# that is measured once, and codes with a lower recall than this are not used.
CODED_FACTOR, CODED_RECALL, CODED_QUERIES = 10, 0.97, 32
CODED_HIDDEN = 8  # of so many rows one may be hidden, or excluded by a query
# Where there can be no codes, rows of so few values are copied instead: 65,536 rows of 128 take a
# millisecond where other shards read memory too. Copying them takes 10 ms, and few are kept.
COPIED_AGAIN_VALUES, COPIED_AFTER = 8 << 20, 16
COPIES_MS, COPIES_GAIN = 1.0, 3  # of as many values; and how many times as long a walk has to take
ENTRY_BYTES = 6000  # of a filter beside its arrays: two forms of faiss, an index, objects
# Derived from filters, per index, and the share of it for vectors and codes. What was not used for
# longest goes: one that has such while these exceed their share, otherwise one that has none.
KEPT_BYTES, VECTOR_SHARE = 96 << 20, 7 / 8
# Results in many lists have scores nearer to each other than those in few, and codes tell them
# apart less well: of the results in 256 of 1,024 lists factor 2 finds .93, factor 4 .98.
RERANK_FACTOR = 4
# Where nearly all queries leave the nearest lists, these are not visited on their own first: that
# takes a tenth to a fifth of the time of a query that goes on.
FAR_SHARE, FAR_WEIGHT = 0.8, 0.25
GROWTH = 16  # of the lists visited, between two estimates: each is better than the one before
# Results whose last score is estimated, as a multiple of those that count: the lists that follow
# are about those that are needed; with fewer results too few.
LIKELY_DEPTH = 4
# Fewer results than k may be all that count of a shard; to have k of them, as many lists are
# visited as have so many times k matching rows, because to score all of these takes far longer.
FILLED_FROM = (4, 64)
CALIBRATION_QUERIES = 32
CALIBRATION_GROWTH = 64  # of the lists, to see what the default does not find
CHEAP_MS = 2.0  # of a search that may keep others waiting who wait for no search
TIME_DECAY = 0.9  # so that the dear ones among a filter's queries are not forgotten at once
FADING_USES = 4096  # queries after which all earlier ones count half
# A default that finds a share of a shard's results is good enough where other shards have better
# ones; of that share one in so many is taken to count. 1,000,000 rows of filter_bench in four
# shards: less time than with 3 by 10 % for half of the rows at random, and recall .97, not .975,
# for half of all categories without the query's.
COUNTED = 3.5
COVERED = 0.95  # of the results that a wider search finds: then all of them count


logger = logging.getLogger(__name__)


class Searched(Protocol):
    """What is needed of a ``MainIndex``."""

    def search(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        selection: Selection | None = None,
    ) -> Ranked: ...


@dataclass(slots=True)
class _Derived:
    """Of a filter. uses: queries so far; first, last: the number of the search that used it first,
    and last; bytes: of it all, about; has_vectors: whether it has copies or codes, which are most
    of what is kept.

    coded: codes of the rows that match, once they have been made. rows (m,) int64: those that
    match, ascending, once they are copied; copies: an index of their vectors. some: the selection
    whose copies were searched last, and part: the same as a selection of the copies; None: all.
    Before that, lists: those that have some of the rows; far: of the last queries, the share that
    had to visit more than twice as many as usual, where that can be estimated; ms: what a query
    without parameters is estimated to take, by the size of k, which rises at once and falls slowly.
    """

    first: int
    last: int = 0
    uses: int = 0
    lists: FilledLists | None = None
    far: float = 0.0
    coded: CodedRows | None = None
    rows: IdArray | None = None
    copies: Searched | None = None
    some: Selection | None = None
    part: Selection | None = None
    ms: dict[int, float] = field(default_factory=dict)
    bytes: int = 0
    has_vectors: bool = False

    def note_far(self, went_far: bool) -> None:
        """Takes in whether a query went far."""
        self.far += FAR_WEIGHT * (went_far - self.far)

    def note_time(self, k: int, ms: float) -> None:
        """Takes in what a query for k has taken."""
        size = k.bit_length()
        self.ms[size] = max(ms, TIME_DECAY * self.ms.get(size, 0))

    def ms_of(self, k: int) -> float:
        """What a query for k is estimated to take; infinite where none has been searched."""
        return self.ms.get(k.bit_length(), math.inf)


class FilteredSearch:
    """Of one main index; used by the thread that searches it, or by several that all search with
    the same selections."""

    def __init__(
        self,
        main: Searched,
        layers: Layers,
        stored: StoredVectors,
        *,
        metric: Metric,
        defaults: SearchParams,
        has_lists: bool,
        can_tie: bool,
        index_of: Callable[[Any], Searched],
    ) -> None:
        """has_lists: if the index has inverted lists, they may be searched. can_tie: whether equal
        scores mean equal vectors. index_of: makes a main index of an index of faiss."""
        # weak: what holds the memory of an index must be gone with the last reference to it
        self._main: Searched = weakref.proxy(main)
        self._layers, self._stored, self._metric = layers, stored, metric
        self._defaults, self._index_of = defaults, index_of
        self._can_tie = can_tie
        self._has_lists = has_lists and Lists.can_be_read(layers)
        self._list_scan = ListScan(layers, stored, metric)
        self._lists: Lists | None = None
        self._depth = 1.0
        size = RowCodes.row_bytes(stored.dim)
        # an index that stores nothing else than vectors finds exactly; codes would not
        is_inexact = self._has_lists and layers.refine is not None
        fits = size > 0 and CODED_FROM <= stored.rows <= KEPT_BYTES // 2 // size
        self._can_be_coded = is_inexact and fits
        self._codes: RowCodes | None = None
        self._coding: threading.Thread | None = None
        self._copied = COPIED_VALUES // stored.dim
        self._copied_again = COPIED_AGAIN_VALUES // stored.dim
        self._derived: OrderedDict[Selection, _Derived] = OrderedDict()
        self._bytes = 0  # of these, and of the codes of all rows
        self._vector_bytes = 0  # of these, of filters with copies or codes, and of all codes
        self._searches = 0
        self._uses = 0  # since they have faded
        self._lock = threading.Lock()  # around what is derived

    @property
    def is_prepared(self) -> bool:
        """Whether a search had to know in which lists rows lie, or ``prepare`` was called."""
        return self._lists is not None

    def prepare(self) -> None:
        """What the first search that has to know lists does first: tens of milliseconds."""
        if self._has_lists:
            with self._lock:
                self._lists = self._lists or self._read_lists()

    def is_cheap(
        self, origin: Selection, queries: int, k: int, params: SearchParams, others: int
    ) -> bool:
        """Whether a search is one of copies that have been made, or of an index that has as few
        rows, and with ``others`` few enough are scored; or the last ones took so little time."""
        derived = self._derived.get(origin)
        if derived is None:
            rows = origin.rows
            return rows <= self._copied and queries * (rows + others) <= self._copied_again
        if derived.copies is not None:
            return queries * (origin.num_selected + others) <= self._copied_again
        if params != NO_PARAMS or self._is_copied(derived, origin, queries):
            return False
        if derived.coded is None and self._shall_be_coded(derived, origin, k, queries):
            return False
        is_quick = queries * derived.ms_of(k) <= CHEAP_MS
        return is_quick and queries * others <= self._copied_again

    def search(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        chosen: Selection,
        look: Callable[[], None] = lambda: None,
    ) -> Ranked:
        """The k best of the rows ``chosen`` of queries (n, d), all of which are checked. look:
        called before lists are visited and before each block of rows; what it raises ends it."""
        if not chosen.num_selected:
            return _nothing(len(queries), k)
        derived = self._derived_of(chosen.origin or chosen, len(queries))
        began = time.perf_counter()
        ranked = self._best(queries, k, params, derived, chosen, look)
        if params == NO_PARAMS and len(queries):
            derived.note_time(k, (time.perf_counter() - began) * 1e3 / len(queries))
        return ranked

    def _best(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        derived: _Derived,
        chosen: Selection,
        look: Callable[[], None],
    ) -> Ranked:
        origin = chosen.origin or chosen
        if self._is_copied(derived, origin, 0):
            return self._among_copies(queries, k, derived, chosen)
        coded = None if params.nprobe else self._coded(derived, origin, k)
        if coded is not None and self._can_use(coded, chosen):
            return self._among_codes(queries, k, params, coded, derived, chosen, look)
        return self._searched(queries, k, params, derived, chosen, look)

    def _searched(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        derived: _Derived,
        chosen: Selection,
        look: Callable[[], None],
    ) -> Ranked:
        """By the index, and where it has not found k by all that is stored."""
        if self._has_lists:
            ranked = self._in_lists(queries, k, params, derived, chosen, look)
        else:
            ranked = self._main.search(queries, k, self._widened(params, chosen), chosen)
        wanted = min(k, chosen.num_selected)
        short = np.flatnonzero(ranked.ids[:, wanted - 1] == EMPTY_ID)
        if short.size:
            found = scan(self._stored, queries[short], k, self._metric, chosen, look)
            ranked.ids[short], ranked.scores[short] = found
        return ranked

    def _derived_of(self, origin: Selection, queries: int) -> _Derived:
        with self._lock:
            self._searches += 1
            derived = self._derived.get(origin)
            if derived is None:
                derived = self._derived[origin] = _Derived(first=self._searches)
                # the bits of ``origin``, and of what was narrowed from it and searched last
                self._count(origin, ENTRY_BYTES + 2 * origin.bits.nbytes)
            self._derived.move_to_end(origin)
            derived.last = self._searches
            derived.uses += queries
            self._uses += queries
            if self._uses >= FADING_USES:
                self._uses = 0
                for each in self._derived.values():
                    each.uses //= 2
            while self._bytes > KEPT_BYTES and len(self._derived) > 1:
                self._drop_one(origin)
        return derived

    def _drop_one(self, used: Selection) -> None:
        """What was not used for longest, but ``used``: of filters with copies and codes, or of
        those without, as VECTOR_SHARE says, unless one with these has not been used for very
        long."""

        def oldest(has_vectors: bool) -> Selection | None:
            of_kind = (
                each
                for each, derived in self._derived.items()
                if each is not used and derived.has_vectors == has_vectors
            )
            return next(of_kind, None)

        with_vectors, without = oldest(True), oldest(False)
        are_over = self._vector_bytes > VECTOR_SHARE * KEPT_BYTES
        if with_vectors is not None:
            are_over |= self._derived[with_vectors].last + FADING_USES < self._searches
        first, second = (with_vectors, without) if are_over else (without, with_vectors)
        dropped = self._derived.pop(first or second or next(iter(self._derived)))
        self._bytes -= dropped.bytes
        if dropped.has_vectors:
            self._vector_bytes -= dropped.bytes

    def _is_copied(self, derived: _Derived, origin: Selection, more: int) -> bool:
        """Whether all rows of a filter are to be scored, after ``more`` further uses."""
        rows = origin.num_selected
        if derived.copies is not None or rows <= self._copied:
            return True
        if self._can_be_coded:
            return False
        if rows > self._copied_again or derived.uses + more <= COPIED_AFTER:
            return False
        copies_ms = COPIES_MS * rows / self._copied_again
        is_gain = copies_ms * COPIES_GAIN <= max(derived.ms.values(), default=0.0)
        return is_gain and self._has_room(derived, rows * self._stored.row_bytes)

    def _shall_be_coded(self, derived: _Derived, origin: Selection, k: int, more: int) -> bool:
        """Whether the rows of a filter are to be compared by codes, after ``more`` further uses,
        by what queries for as many results took."""
        rows = origin.num_selected
        if not self._can_be_coded or not self._copied < rows <= CODED_ROWS:
            return False
        if derived.uses + more <= CODED_AFTER:
            return False
        candidates = self._coded_candidates(k, NO_PARAMS)
        coded_ms = CODED_ROW_MS * rows + CODED_CANDIDATE_MS * candidates
        coded_ms = CODED_MS + coded_ms * self._stored.dim / CODED_DIM
        is_gain = coded_ms * CODED_GAIN <= derived.ms.get(k.bit_length(), 0.0)
        size = rows * (4 + RowCodes.row_bytes(self._stored.dim))
        return is_gain and self._has_room(derived, size)

    def _coded(self, derived: _Derived, origin: Selection, k: int) -> CodedRows | None:
        """The codes of a filter's rows, if that is how these are to be searched. The first filter
        that needs some has those of all rows made, and is searched otherwise until then."""
        if derived.coded is not None or not self._shall_be_coded(derived, origin, k, 0):
            return derived.coded
        if self._codes is None:
            if not self.is_prepared:
                self.prepare()  # for the share of results that count
            with self._lock:
                if self._coding is None:
                    given = weakref.ref(self), self._stored, self._metric, self._depth
                    self._coding = threading.Thread(
                        target=_make_codes, args=given, name="row-codes", daemon=True
                    )
                    self._coding.start()
            return None
        made = self._codes.of_rows(origin.selected())  # takes too long to hold the lock meanwhile
        with self._lock:
            if derived.coded is None:
                derived.coded = made
                self._count(origin, made.nbytes, are_vectors=True)
        return derived.coded

    def take_codes(self, codes: RowCodes | None) -> None:
        """Of all rows; None: there are none that are good enough. Any thread."""
        with self._lock:
            self._codes, self._can_be_coded = codes, codes is not None
            if codes is not None:
                self._bytes += codes.nbytes
                self._vector_bytes += codes.nbytes

    @staticmethod
    def _can_use(coded: CodedRows, chosen: Selection) -> bool:
        """Whether few of the rows are hidden, or excluded: they may all be among the nearest."""
        rows = len(coded.rows)
        return CODED_HIDDEN * (rows - chosen.num_selected) <= rows

    def _has_room(self, derived: _Derived, size: int) -> bool:
        """Whether so many bytes of vectors or codes fit, if others go that have not been used since
        this filter came, or are used far more rarely: filters that take turns must not drive out
        each other's."""
        with self._lock:
            over = self._vector_bytes + derived.bytes + size - VECTOR_SHARE * KEPT_BYTES
            for other in self._derived.values():
                if over <= 0:
                    return True
                if not other.has_vectors:
                    continue
                is_rare = 2 * other.uses <= derived.uses or other.last < derived.first
                if other is derived or not is_rare:
                    return False
                over -= other.bytes
        return over <= 0

    def _count(self, origin: Selection, more: int, *, are_vectors: bool = False) -> None:
        """Adds bytes to an entry, and to the total unless the entry has been dropped meanwhile."""
        derived = self._derived.get(origin)
        if derived is not None:
            derived.bytes += more
            self._bytes += more
            if derived.has_vectors:
                self._vector_bytes += more
            elif are_vectors:
                derived.has_vectors = True
                self._vector_bytes += derived.bytes

    def _widened(self, params: SearchParams, chosen: Selection) -> SearchParams:
        """With as many times more visited as rows are than rows that match."""
        times = chosen.rows / chosen.num_selected
        nprobe, ef_search = params.nprobe, params.ef_search
        if self._layers.is_ivf:
            nprobe = self._nprobe(params, times)
        if self._layers.is_hnsw:
            ef_search = math.ceil((ef_search or self._defaults.ef_search or 1) * times)
            ef_search = min(ef_search, MAX_EF_SEARCH)
        return replace(params, nprobe=nprobe, ef_search=ef_search)

    def _nprobe(self, params: SearchParams, times: float) -> int:
        nprobe = math.ceil((params.nprobe or self._defaults.nprobe or 1) * times)
        return min(nprobe, int(self._layers.base.nlist), MAX_NPROBE)

    def _among_codes(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        coded: CodedRows,
        derived: _Derived,
        chosen: Selection,
        look: Callable[[], None],
    ) -> Ranked:
        """All rows compared by codes, the best of them scored."""
        candidates = self._coded_candidates(k, params)
        missing = len(coded.rows) - chosen.num_selected
        asked = self._stored.queries(queries)
        ranked, cut = _nothing(len(queries), k), []
        for place, query in enumerate(asked):
            look()
            rows = coded.nearest(query, candidates + missing)
            if missing:
                rows = rows[chosen.are_live(rows)][:candidates]
            is_cut = len(rows) < chosen.num_selected
            rows.sort()
            scores = self._stored.scores(query, rows, self._metric)
            order = np.argsort(-scores, kind="stable")  # of equal scores the lowest row first
            rows, scores = rows[order], scores[order]
            if is_cut and self._can_tie and len(rows) > k and scores[-1] == scores[k - 1]:
                cut.append(place)
            rows, scores = rows[:k], scores[:k]
            ranked.ids[place, : len(rows)], ranked.scores[place, : len(rows)] = rows, scores
        if cut:
            found = self._searched(queries[cut], k, params, derived, chosen, look)
            ranked.ids[cut], ranked.scores[cut] = found
        return ranked

    def _coded_candidates(self, k: int, params: SearchParams) -> int:
        return coded_candidates(k, self._depth, params.rerank_factor)

    def _among_copies(
        self, queries: FloatArray, k: int, derived: _Derived, chosen: Selection
    ) -> Ranked:
        """All rows scored."""
        whole = chosen.base or chosen  # what one query lacks is not kept
        with self._lock:
            if derived.rows is None or derived.copies is None:
                origin = chosen.origin or chosen
                derived.rows = origin.selected()
                index = self._stored.copied(derived.rows)
                derived.copies = self._index_of(index)
                size = derived.rows.nbytes + index.ntotal * index.code_size
                self._count(origin, size, are_vectors=True)
                derived.some = None
            part = derived.part
            if derived.some is not whole:
                part = None
                if whole.origin is not None:
                    part = Selection.of(whole.are_live(derived.rows))
                derived.some, derived.part = whole, part
        if chosen.less_rows is not None:
            places = np.searchsorted(derived.rows, chosen.less_rows)
            part = (part or Selection.whole(len(derived.rows))).excluding(places)
        asked = self._stored.queries(queries)
        places, scores = derived.copies.search(asked, k, NO_PARAMS, part)
        rows = derived.rows[places]
        rows[places == EMPTY_ID] = EMPTY_ID
        return Ranked(rows, scores)

    def _in_lists(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,
        derived: _Derived,
        chosen: Selection,
        look: Callable[[], None],
    ) -> Ranked:
        """Visits lists that have matching rows, nearest first, until few results can be missing."""
        with self._lock:
            lists = self._lists or self._read_lists()
            filled = self._filled(lists, derived, chosen)
        widening = 1 if params.nprobe else max(k / MEASURED_K, 1)
        usual = self._nprobe(params, widening * chosen.rows / chosen.num_selected)
        ranked = _nothing(len(queries), k)
        cut = []
        for place, near in enumerate(lists.near(queries, filled)):
            walk = ListWalk(self._list_scan, near, queries[place], k, chosen, look)
            self._find(walk, near, k, params, usual, derived)
            self._fill(walk, near, k, params, min(k, chosen.num_selected))
            ranked.ids[place, : len(walk.rows)] = walk.rows
            ranked.scores[place, : len(walk.rows)] = walk.scores
            if walk.is_cut:
                cut.append(place)
        if cut and self._can_tie:
            given = replace(params, nprobe=min(lists.count, MAX_NPROBE))
            ranked.ids[cut], ranked.scores[cut] = self._main.search(queries[cut], k, given, chosen)
        return ranked

    def _find(
        self,
        walk: ListWalk,
        near: NearLists,
        k: int,
        params: SearchParams,
        usual: int,
        derived: _Derived,
    ) -> None:
        """Walks on until few of the k best can be missing."""
        most = min(len(near.rows), MAX_NPROBE)
        usual, depth = min(usual, most), max(1, math.ceil(k * self._depth))
        if derived.far < FAR_SHARE:
            walk.to(usual, self._candidates(k, params, 1))
            needed = near.needed(depth, walk.last(depth), walk.places)
            if needed <= usual:
                derived.note_far(False)
                return
        # what few lists have found says little; what all of them may hold says more
        likely = max(near.likely(LIKELY_DEPTH * depth), walk.last(depth))
        needed = max(near.needed(depth, likely, near.nearest(usual)), 2 * usual)
        derived.note_far(needed > 2 * usual and near.can_estimate)
        candidates = self._candidates(k, params, RERANK_FACTOR)
        walk.begin()  # with more candidates
        while needed > walk.visited and walk.visited < most:
            walk.to(min(needed, GROWTH * walk.visited or most, most), candidates)
            needed = near.needed(depth, walk.last(depth), walk.places)

    def _fill(
        self, walk: ListWalk, near: NearLists, k: int, params: SearchParams, wanted: int
    ) -> None:
        """Walks on until there are ``wanted`` results, or FILLED_FROM has been reached."""
        most = min(len(near.rows), MAX_NPROBE)
        for times in FILLED_FROM:
            if len(walk.rows) >= wanted:
                return
            walk.to(min(near.holding(times * k), most), self._candidates(k, params, RERANK_FACTOR))

    def _candidates(self, k: int, params: SearchParams, factor: int) -> int:
        """How many rows are scored exactly for k results; ``factor`` times as many as results, and
        as of MEASURED_K results, where neither ``params`` nor the defaults say more."""
        if self._layers.refine is None:
            return k + 1
        if params.rerank_factor is not None:
            return max(k + 1, round(k * params.rerank_factor))
        factor = max(factor, self._defaults.rerank_factor or 1)
        return max(k + 1, max(k, MEASURED_K) * factor)

    def _filled(self, lists: Lists, derived: _Derived, chosen: Selection) -> FilledLists:
        """The lists that have rows of the filter."""
        if derived.lists is None:
            origin = chosen.origin or chosen
            derived.lists = lists.filled(origin.selected())
            self._count(origin, 2 * derived.lists.rows.nbytes)
        return derived.lists

    def _read_lists(self) -> Lists:
        """With ``_depth``: the share of k results that count. A default that was measured to be
        good enough though it does not find the last results of a shard was so because other shards
        have better ones: then these need not be found with a filter either."""
        self._lists = Lists(self._layers, self._stored, self._metric)
        rng = np.random.default_rng(0)
        rows = np.sort(rng.permutation(self._stored.rows)[:CALIBRATION_QUERIES])
        queries = np.asarray(self._layers.whole.reconstruct_batch(rows), np.float32)
        k = min(MEASURED_K, self._stored.rows)
        usual = self._main.search(queries, k, NO_PARAMS)
        nprobe = self._nprobe(NO_PARAMS, CALIBRATION_GROWTH)
        wide = SearchParams(nprobe=nprobe, rerank_factor=RERANK_FACTOR)
        reached = self._main.search(queries, k, wide).scores[:, -1]
        covered = float((usual.scores >= reached[:, None]).mean())
        if covered < COVERED:
            self._depth = covered / COUNTED
        return self._lists


def _make_codes(
    search: "weakref.ref[FilteredSearch]", stored: StoredVectors, metric: Metric, depth: float
) -> None:
    """The work of the thread that a filter had begun; ends early where the index is gone."""
    codes = None
    try:
        codes = RowCodes.of(stored, metric, lambda: search() is not None)
        if codes is None:
            return
        candidates = coded_candidates(MEASURED_K, depth, None)
        wanted = math.ceil(MEASURED_K * min(1, 2 * depth))
        recall = codes.recall(stored, metric, candidates, wanted, CODED_ROWS, CODED_QUERIES)
        if recall < CODED_RECALL:
            logger.info("filters are searched without codes, which find %.3f", recall)
            codes = None
    except Exception:  # searches go on without
        logger.exception("no codes for filters")
    asked = search()
    if asked is not None:
        asked.take_codes(codes)


def coded_candidates(k: int, depth: float, given: float | None) -> int:
    """How many rows are scored by their vectors for k results, of which a share ``depth`` count;
    given: the factor that a caller asks for at least."""
    factor = max(given or 1, RERANK_FACTOR, CODED_FACTOR * depth)
    return max(k + 1, math.ceil(max(k, MEASURED_K) * factor))


def _nothing(queries: int, k: int) -> Ranked:
    shape = queries, k
    return Ranked(np.full(shape, EMPTY_ID, np.int64), np.full(shape, EMPTY_SCORE, np.float32))
