"""Why an answer under caps has fewer than k items. Pure."""

from shardline.router.contract import Reason, ReasonCode
from shardline.router.query import Rearranged


def cap_reason(told: Rearranged, query: int) -> Reason | None:
    """Of a query with fewer than k items: how many of those considered its caps refuse; None: they
    are not why."""
    refused, is_cut = int(told.refused[query]), bool(told.is_cut[query])
    if not refused and not is_cut:
        return None
    considered = int(told.considered[query])
    items = "1 item" if considered == 1 else f"{considered} items"
    end = "there may be others that they allow" if is_cut else "they allow no other"
    return Reason(
        query=query,
        code=ReasonCode.CAP,
        text=f"caps refuse {refused} of {items} considered; {end}",
        count=refused,
    )
