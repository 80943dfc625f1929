"""Where a publish gets its mirror and its gate from: the two places that know how they are made."""

from shardline.cluster.control.publish_parts import GateReport, Mirror, MirrorProgress
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import RoutingTable

MIN_ROWS_RATIO, MAX_ROWS_RATIO = 0.8, 2.0


class WiredParts:
    """The ``PublishParts`` of a running cluster."""

    async def start_mirror(self, source: RoutingTable, target: RoutingTable) -> Mirror:
        """As ``PublishParts``: writes cannot be brought over yet, so there must be none."""
        return NoWrites(len(source.shards))

    async def run_gate(
        self, live: RoutingTable, candidate: RoutingTable, mirrored: MirrorProgress | None
    ) -> GateReport:
        """As ``PublishParts``: compares the numbers of rows."""
        ratio = candidate.rows / max(1, live.rows)
        is_ok = MIN_ROWS_RATIO <= ratio <= MAX_ROWS_RATIO
        bound = f"{MIN_ROWS_RATIO:g} to {MAX_ROWS_RATIO:g}"
        figure = {"figure": "rows_ratio", "value": round(ratio, 4), "bound": bound, "ok": is_ok}
        text = f"rows_ratio is {ratio:.3f}, must be {bound}"
        return GateReport(figures=(figure,), failed=() if is_ok else (text,))


class NoWrites:
    """The mirror of a generation that has never been written to."""

    def __init__(self, shards: int) -> None:
        self._none = MirrorProgress(positions=(0,) * shards, ends=(0,) * shards)

    async def progress(self) -> MirrorProgress:
        return self._none

    async def drain(self, final: tuple[int, ...], timeout_s: float) -> MirrorProgress:
        """Raises Unavailable: there are writes."""
        if any(final):
            raise Unavailable(
                f"{sum(final)} writes would be missing",
                expected="a generation that has not been written to",
                hint="--without-writes leaves them out",
            )
        return self._none

    async def stop(self) -> None:
        """There is nothing to end."""
