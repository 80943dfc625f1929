"""Whether the hosts of a cluster can serve a generation together: pure checks of what they say.

Nothing here decides by clocks: deadlines travel as the time that is left, and order comes from
counters. A clock that is wrong only makes logs and creation dates hard to read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardline.cluster.preflight.check import Check, failed, mib, passed, warned
from shardline.cluster.preflight.folders import check_writable
from shardline.cluster.preflight.free_memory import (
    FILTER_BYTES,
    ROUTER_BYTES,
    SHARD_BYTES,
    FreeMemory,
)
from shardline.cluster.preflight.host_facts import HostFacts
from shardline.cluster.preflight.open_files import check_open_files
from shardline.shards.core.errors import DataError, ShardlineError, Unavailable

CLOCKS_S = 2.0  # what is worth a word; NTP keeps hosts within a hundredth of it
HOURS_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a host said, and between which times of our clock, in seconds since 1970."""

    facts: HostFacts
    asked_s: float
    answered_s: float


def on_host(address: str, check: Check) -> Check:
    """The same check with the host in its name and, if it failed, in its error."""
    named = error = check.error
    if error is not None:
        named = type(error)(
            f"host {address}: {error.message}",
            field=error.field,
            expected=error.expected,
            got=error.got,
            hint=error.hint,
        )
    name = f"host {address}: {check.name}"
    return Check(name=name, verdict=check.verdict, text=check.text, error=named)


def check_hosts(answers: Sequence[Answer], own: HostFacts, *, in_flight: int) -> Iterable[Check]:
    """Every host against ``own``, the facts of the host that asks. in_flight: requests that the
    routers of one host are to work on at once."""
    for answer in answers:
        facts = answer.facts
        checks = [
            check_versions(facts, own),
            check_same_store(facts, own),
            check_writable("store", facts.store),
            check_open_files(in_flight, facts.open_files),
            check_port(facts),
            check_clock(facts.clock_s, answer.asked_s, answer.answered_s),
        ]
        yield from (on_host(facts.address, check) for check in checks)


def check_versions(facts: HostFacts, own: HostFacts) -> Check:
    """Python by its minor version, Ray and Shardline exactly: what they pickle must be read."""
    name = "versions"
    pairs = {
        "Python": (_minor(facts.python), _minor(own.python)),
        "Ray": (facts.ray, own.ray),
        "Shardline": (facts.shardline, own.shardline),
    }
    for library, (found, expected) in pairs.items():
        if found != expected:
            error = Unavailable(
                f"another {library} than on {own.address}",
                expected=str(expected),
                got=str(found or "none"),
                hint="install the same on every host: `ray up` does it",
            )
            return failed(name, error)
    text = f"Python {facts.python}, Ray {facts.ray}, Shardline {facts.shardline}"
    if facts.code != own.code:
        return warned(
            name,
            f"{text}, but its code differs from that on {own.address}: copy it there again "
            "(`ray up`), then `shardline restart --rolling`",
        )
    return passed(name, text)


def check_same_store(facts: HostFacts, own: HostFacts) -> Check:
    """Whether it sees what the host that asks has written just now, and reads the generation."""
    name = "shared store"
    if facts.store_error is not None:
        error: ShardlineError = DataError(
            "the store cannot be looked into",
            expected="a folder that this user may read",
            got=facts.store_error,
            hint="mount the shared file system there again, or change its permissions",
        )
        return failed(name, error)
    if facts.sees_probe is False:
        error = DataError(
            f"another store than that of {own.address}",
            expected="the folder of `store` to be the same on every host",
            got=f"one without the file just written on {own.address}",
            hint="mount the shared file system there at the same path",
        )
        return failed(name, error)
    if facts.manifest_error is not None:
        return failed(name, DataError("the generation cannot be read", got=facts.manifest_error))
    if facts.manifest != own.manifest:
        error = DataError(
            f"its generation is not that of {own.address}",
            expected=f"a manifest of SHA-256 {(own.manifest or 'none')[:16]}",
            got=(facts.manifest or "none")[:16],
            hint="the file system there shows an old state: mount it again",
        )
        return failed(name, error)
    if facts.sees_probe is None:
        return warned(name, f"not compared with that of {own.address}, which takes no file")
    return passed(name, f"the same as on {own.address}")


def check_port(facts: HostFacts) -> Check:
    """Whether HAProxy can listen there."""
    if facts.port_error is None:
        return passed("HTTP port", "free, or the cluster's own")
    hint = "end what listens there, or choose another with `shardline serve --port`"
    return failed("HTTP port", Unavailable(facts.port_error, hint=hint))


def check_clock(clock_s: float, asked_s: float, answered_s: float) -> Check:
    """Whether its clock lay between ours, before and after; never more than a warning."""
    early, late = asked_s - clock_s, clock_s - answered_s
    off = max(early, late)
    if off <= CLOCKS_S:
        return passed("clock", "as here")
    way = "behind" if early > late else "ahead"
    size = f"{off / HOURS_S:.1f} h" if off >= HOURS_S else f"{off:.0f} s"
    return warned(
        "clock", f"{size} {way}: times in its logs mislead, nothing else does; set it by NTP"
    )


def check_room(free: FreeMemory, loaded: Sequence[int], *, cache_bytes: int) -> Check:
    """Whether the shards placed there fit into its memory. loaded: bytes of each."""
    name = "memory"
    total = sum(loaded)
    sums = f"{len(loaded)} shards = {mib(total)}"
    has = f"{mib(free.available_bytes)} free by {free.limit}"
    if total > free.available_bytes + free.swap_bytes:
        error = Unavailable(
            "the shards placed there do not fit into its memory",
            expected=f"at least {sums}",
            got=f"{has}, and {mib(free.swap_bytes)} of swap",
            hint="add hosts, lower cluster.replicas, or build a smaller index "
            "(index.kind=ivfpq-fs)",
        )
        return failed(name, error)
    processes = len(loaded) * (SHARD_BYTES + FILTER_BYTES) + ROUTER_BYTES + cache_bytes
    if total + processes > free.available_bytes:
        return warned(
            name,
            f"{sums} + about {mib(processes)} of processes are more than {has}: processes may be "
            "ended for want of it",
        )
    return passed(name, f"{sums} + about {mib(processes)} of processes, {has}")


def check_silent(reasons: Mapping[str, str]) -> Iterable[Check]:
    """Hosts that did not say anything: the reason by address."""
    for address, reason in reasons.items():
        error = Unavailable(
            "no process could be started there",
            got=reason,
            hint="Ray's logs on it say more: /tmp/ray/session_latest/logs",
        )
        yield on_host(address, failed("reachable", error))


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
