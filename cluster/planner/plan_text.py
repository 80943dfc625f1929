"""A plan for people, its arithmetic line by line, and for programs, as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from shardline.cluster.planner.measured_costs import (
    BEYOND_INDEX,
    COLD_AFTER_MS,
    COLD_SEARCH,
    MEASURED_SHARDS,
    NETWORK_MS,
    ROUTER,
    ROUTER_SHARD,
    SOURCES,
)
from shardline.cluster.planner.sizing import MEMORY_SHARE, MOST_BUSY, ROUTER_BUSY, Layout, Plan
from shardline.cluster.preflight.free_memory import OTHER_BYTES, ROUTER_BYTES
from shardline.router.router_config import RouterConfig
from shardline.shards.index.spec import IndexKind

MIB, GIB = 1 << 20, 1 << 30


def lines_of(plan: Plan) -> Iterator[str]:
    """The result first, then how it comes about."""
    yield from _result(plan)
    yield ""
    yield "memory"
    yield from _memory(plan)
    yield ""
    yield "processor time"
    yield from _processor(plan)
    yield ""
    yield "latency"
    yield from _latency(plan)
    yield ""
    yield "measured, and where"
    for source in SOURCES:
        yield f"  {source.date}  {source.what}: {source.conditions}; `{source.command}`"
    yield f"  assumed    {NETWORK_MS:g} ms for a round trip between hosts, where there are several"


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures; times in the units of their names, memory in bytes."""
    asked, layout, tails = plan.asked, plan.layout, plan.tails
    return {
        "asked": asdict(asked) | {"metric": str(asked.metric), "kind": str(asked.kind)},
        "index": {
            "kind": str(layout.index.kind),
            "factory": layout.index.factory,
            "nlist": layout.index.nlist,
            "nprobe": layout.depth.nprobe,
            "rerank_factor": layout.depth.rerank_factor,
            "reason": layout.index.reason,
        },
        "shards": layout.shards,
        "replicas": layout.replicas,
        "hosts": layout.hosts,
        "routers": layout.routers,
        "shards_per_host": layout.shards_per_host,
        "memory": asdict(layout.size)
        | {
            "file_bytes": layout.size.file_bytes,
            "loaded_bytes": layout.size.loaded_bytes,
            "resident_bytes": layout.size.resident_bytes,
            "most_bytes": layout.size.most_bytes,
            "host_bytes": layout.host_bytes,
        },
        "cost": {
            "terms": [asdict(term) | {"us": term.us} for term in layout.terms],
            "index_us": layout.index_us,
            "shard_us": layout.shard_us,
            "router_us": layout.router_us,
            "query_cpu_seconds": layout.query_us / 1e6,
            "cores": layout.cores(asked.qps),
        },
        "latency": asdict(tails) | {"front_p50_ms": plan.front_ms},
        "sources": [asdict(source) for source in SOURCES],
    }


def _result(plan: Plan) -> Iterator[str]:
    asked, layout, tails = plan.asked, plan.layout, plan.tails
    yield (
        f"{asked.rows:,} rows x {asked.dim}, k = {asked.k}, {asked.qps:g} queries per second, "
        f"p99 <= {asked.p99_ms:g} ms, hosts of {asked.host_cores} cores and "
        f"{asked.host_bytes / GIB:g} GiB"
    )
    yield f"  index      {layout.index.factory}{_depth(layout)}"
    yield f"             {layout.index.reason}"
    yield (
        f"  layout     shards: {layout.shards}, replicas of each: {layout.replicas}, hosts: "
        f"{layout.hosts}, routers: {layout.routers}"
    )
    yield (
        f"  memory     {_size(layout.size.resident_bytes)} per shard, "
        f"{_size(layout.host_bytes)} per host"
    )
    yield f"  latency    p50 {tails.p50_ms:.1f} ms, p99 {tails.p99_ms:.1f} ms (simulated)"
    yield (
        f"  cost       {layout.query_us / 1e6:.6f} CPU seconds per query, "
        f"{layout.cores(asked.qps):.1f} cores"
    )
    yield f"  to build   {' '.join(_settings(layout))}"


def _settings(layout: Layout) -> Iterator[str]:
    yield f"--set cluster.shards={layout.shards} --set cluster.replicas={layout.replicas}"
    yield f"--set cluster.router_replicas={layout.routers}"
    yield f"--set index.kind={layout.index.kind}"
    if layout.index.nlist:
        yield f"--set index.nlist={layout.index.nlist}"


def _memory(plan: Plan) -> Iterator[str]:
    asked, layout = plan.asked, plan.layout
    size, config = layout.size, RouterConfig()
    rows = f"{size.rows:,} rows"
    yield f"  rows       {asked.rows:,} / {layout.shards} shards = {rows} per shard"
    codes = round(size.rows * size.row_bytes)
    yield f"  vectors    {rows} x {size.row_bytes:.0f} bytes = {_size(codes)}"
    yield f"  ids        {rows} x 8 bytes = {_size(size.ids_bytes)}"
    if layout.index.nlist:
        yield (
            f"  centroids  {layout.index.nlist:,} lists x {asked.dim} x 4 bytes = "
            f"{_size(size.centroid_bytes)}"
        )
    if layout.index.kind is IndexKind.IVFPQ_FS:
        yield f"  padding    half a block of 32 codes per list = {_size(size.padding_bytes)}"
    if size.codebook_bytes:
        tables = _size(size.table_bytes)
        yield f"  codebooks  {_size(size.codebook_bytes)}, tables under L2 {tables}"
    if size.direct_map_bytes:
        yield f"  row's list {rows} x 8 bytes = {_size(size.direct_map_bytes)}"
    yield f"  files      {_size(size.file_bytes)} per shard"
    yield (
        f"  process    {_size(size.loaded_bytes)} + {_size(size.process_bytes)} of the process = "
        f"{_size(size.resident_bytes)}; with filters at most {_size(size.filter_bytes)} more"
    )
    yield (
        f"  host       {layout.shards_per_host} x {_size(size.most_bytes)} + "
        f"{layout.routers_per_host} routers x {_size(ROUTER_BYTES + config.cache_bytes)} + "
        f"{_size(OTHER_BYTES)} of Ray and Serve = {_size(layout.host_bytes)}, of at most "
        f"{MEMORY_SHARE:.0%} of {asked.host_bytes / GIB:g} GiB"
    )


def _processor(plan: Plan) -> Iterator[str]:
    asked, layout = plan.asked, plan.layout
    for term in layout.terms:
        yield f"  {term.count:>12,.0f} {term.what} x {term.each_us:.5g} us = {term.us:,.1f} us"
    yield (
        f"  search     {layout.hot_us:,.1f} us + {layout.search_cold:.2f} x {COLD_SEARCH.us:g} us "
        f"of cold caches ({layout.search_cold * COLD_AFTER_MS:.1f} of {COLD_AFTER_MS:g} ms of "
        f"pause) = {layout.index_us:,.1f} us"
    )
    yield (
        f"  shard      {layout.index_us:,.1f} us + {BEYOND_INDEX.us:g} us x "
        f"{1 + layout.search_cold:.2f} = {layout.shard_us:,.1f} us"
    )
    yield (
        f"  router     ({ROUTER.us:g} us + {layout.further_shards} shards beyond "
        f"{MEASURED_SHARDS} x {ROUTER_SHARD.us:g} us) x {1 + layout.router_cold:.2f} = "
        f"{layout.router_us:,.1f} us"
    )
    yield (
        f"  query      {layout.router_us:,.1f} us + {layout.shards} x {layout.shard_us:,.1f} us = "
        f"{layout.query_us:,.1f} us"
    )
    yield (
        f"  cores      {asked.qps:g}/s x {layout.query_us:,.1f} us = "
        f"{layout.cores(asked.qps):.1f}, of {layout.hosts} x {asked.host_cores}; a replica at most "
        f"{MOST_BUSY:.0%} busy, a router {ROUTER_BUSY:.0%}"
    )


def _latency(plan: Plan) -> Iterator[str]:
    layout, tails, asked = plan.layout, plan.tails, plan.asked
    yield f"  front      {plan.front_ms:.2f} ms: HTTP, router, fan-out without index, p50"
    yield f"  search     {layout.index_us / 1e3:.2f} ms, p50 without waiting"
    waits = "a core each"
    if layout.shards_per_host > asked.host_cores:
        waits = f"{layout.shards_per_host} shards of a host share {asked.host_cores} cores"
    yield (
        f"  one shard  p50 {tails.shard_p50_ms:.2f} ms, p99 {tails.shard_p99_ms:.2f} ms with "
        f"waiting; {waits}, {tails.busy_share:.0%} busy"
    )
    if tails.hedge_delay_ms is not None:
        yield (
            f"  hedging    after {tails.hedge_delay_ms:.1f} ms, {tails.hedged_share:.2%} of the "
            "searches"
        )
    yield (
        f"  query      p50 {tails.p50_ms:.2f} ms, p99 {tails.p99_ms:.2f} ms, p99.9 "
        f"{tails.p99_9_ms:.2f} ms: front + the slowest of {layout.shards} shards, simulated"
    )


def _depth(layout: Layout) -> str:
    found = [
        f"{name} {value}"
        for name, value in (
            ("nprobe", layout.depth.nprobe),
            ("rerank_factor", layout.depth.rerank_factor),
        )
        if value is not None
    ]
    return f", {', '.join(found)}" if found else ""


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 10 * GIB else f"{size / MIB:,.1f} MiB"
