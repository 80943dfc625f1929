"""Why an answer under caps has fewer than k items, as reasons. Pure."""

import numpy as np

from shardline.router.contract import Reason, ReasonCode
from shardline.router.query import Rearranged


def cap_reasons(told: Rearranged) -> tuple[Reason, ...]:
    """Of each query whose caps leave fewer than k items: how many they refuse."""
    is_short = (told.refused > 0) | told.is_cut
    return tuple(
        Reason(
            query=query,
            code=ReasonCode.CAP,
            text=_text(int(told.refused[query]), int(told.considered[query]), told.is_cut[query]),
            count=int(told.refused[query]),
        )
        for query in np.flatnonzero(is_short).tolist()
    )


def _text(refused: int, considered: int, is_cut: bool) -> str:
    items = "1 item" if considered == 1 else f"{considered} items"
    end = "there may be others that they allow" if is_cut else "they allow no other"
    return f"caps refuse {refused} of {items} considered; {end}"
