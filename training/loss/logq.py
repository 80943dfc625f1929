"""How often each item is drawn as a negative, and what that takes off its logit.

In-batch negatives come by popularity, uniform ones do not. With B draws by the shares p of train
(the in-batch columns and those kept from past steps) and U uniform draws among N items, item j is
expected n_j = B p_j + U / N times. The correction c_j is subtracted from logits:

    standard        c_j = log(n_j / (B + U)), from the positive too: the usual log q
                    (Yi et al., RecSys 2019, section 3; the mixture as in Yang et al., WWW 2020)
    expected_count  c_j = log n_j, the positive left as it is, so that the sum over the draws
                    estimates the sum over all items (arXiv 2507.09331)

Shares are counted over all of train, or estimated while its items stream by.
"""

import torch
from torch import Tensor, nn


class CountedShares(nn.Module):
    """Shares of train, known beforehand: (items,) int64 counts. No state."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        total = counts.sum()
        # an item that train lacks may still be mined or drawn uniformly: half an occurrence
        shares = counts.double().clamp(min=0.5) / total
        self.register_buffer("_shares", shares.float(), persistent=False)
        self._shares: Tensor

    def see(self, items: Tensor) -> None:
        """Nothing to learn from a batch."""

    def of(self, items: Tensor) -> Tensor:
        """(n,) float32 shares of the items (n,)."""
        return self._shares[items]


class StreamedShares(nn.Module):
    """Shares estimated from the gaps between an item's occurrences (Yi et al. 2019, algorithm 2).

    The share is 1 / the moving average of the gap. Gaps are counted in examples, not in steps, so
    an item may occur many times per batch: k occurrences since it was seen last, g examples ago,
    are k gaps of g / k. Every item has a counter of its own, by its row. All ranks feed the global
    batch and hold the same state.
    """

    def __init__(self, num_items: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # examples so far
        self.register_buffer("last", torch.zeros(num_items, dtype=torch.int64))
        self.register_buffer("gap", torch.zeros(num_items, dtype=torch.float64))  # 0: never seen
        self.seen: Tensor
        self.last: Tensor
        self.gap: Tensor

    @torch.no_grad()
    def see(self, items: Tensor) -> None:
        """Takes in the item rows (B,) of one global batch."""
        self.seen += len(items)
        found, counts = torch.unique(items, return_counts=True)
        gap, before = (self.seen - self.last[found]) / counts, self.gap[found]
        kept = torch.where(before > 0, (1 - self.rate) ** counts.double(), 0.0)
        self.gap[found] = kept * before + (1 - kept) * gap
        self.last[found] = self.seen

    def of(self, items: Tensor) -> Tensor:
        """(n,) float32 shares of the items (n,); half an occurrence for one never seen."""
        gap = self.gap[items]
        unseen = 2.0 * self.seen.clamp(min=1)
        return (1 / torch.where(gap > 0, gap, unseen)).float()


Shares = CountedShares | StreamedShares


def expected_counts(shares: Tensor, by_share: int, uniform: int, num_items: int) -> Tensor:
    """n_j of items with the given shares, for ``by_share`` and ``uniform`` draws per step."""
    return shares * by_share + uniform / num_items
