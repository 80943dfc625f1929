"""Pairs of a row and a column that share a key, found for some rows at a time.

A row wants keys, such as the items its user is known to like; a column has one or more. All pairs
of a global batch would be more than its vectors, so a join holds both sides sorted and works out
the pairs of a block of rows when it is asked: the cost is that of the pairs, not of rows x columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Join:
    """Wanted keys, grouped by row, and the columns' keys in ascending order; int64 throughout.

    bounds (rows + 1,): row i wants ``wanted[bounds[i]:bounds[i + 1]]``, on the CPU.
    keys (E,) ascending and columns (E,): column ``columns[e]`` has ``keys[e]``.
    """

    bounds: Tensor
    wanted: Tensor
    keys: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls, num_rows: int, rows: Tensor, wanted: Tensor, columns: Tensor, keys: Tensor
    ) -> "Join":
        """From pairs (row, wanted key) and (column, key), in any order."""
        rows, by_row = torch.sort(rows, stable=True)
        # row i's wanted keys begin where i would be inserted; the last bound ends them all
        bounds = torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device))
        keys, by_key = torch.sort(keys, stable=True)
        # bounds on the CPU: ``pairs`` slices by them, and reading them there waits for no kernel
        return cls(bounds.cpu(), wanted[by_row], keys, columns[by_key])

    @classmethod
    def equal(cls, wanted: Tensor, keys: Tensor) -> "Join":
        """Row i wants wanted[i], column j has keys[j]."""
        rows = torch.arange(len(wanted), device=wanted.device)
        columns = torch.arange(len(keys), device=keys.device)
        return cls.of(len(wanted), rows, wanted, columns, keys)

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(rows, columns) of all pairs of rows start .. stop - 1, rows counted from start.

        A pair comes once for each key that its row and column share.
        """
        bounds = self.bounds[start : stop + 1]
        wanted = self.wanted[int(bounds[0]) : int(bounds[-1])]
        lengths = (bounds[1:] - bounds[:-1]).to(wanted.device)
        rows = torch.repeat_interleave(
            torch.arange(stop - start, device=wanted.device), lengths, output_size=len(wanted)
        )
        # the columns of a wanted key are one run of the sorted keys: counts from ``first`` on
        first = torch.searchsorted(self.keys, wanted)
        counts = torch.searchsorted(self.keys, wanted, right=True) - first
        ends = torch.cumsum(counts, 0)
        total = int(ends[-1]) if len(ends) else 0
        # the runs end to end: place p of the output is place p - (start of its run) of its run
        places = torch.arange(total, device=wanted.device)
        shift = torch.repeat_interleave(first - (ends - counts), counts, output_size=total)
        found_rows = torch.repeat_interleave(rows, counts, output_size=total)
        return found_rows, self.columns[shift + places]


def is_pair(rows: Tensor, keys: Tensor, of_rows: Tensor, of_keys: Tensor) -> Tensor:
    """(n,) bool: whether (rows[i], keys[i]) is among the pairs (of_rows, of_keys); all >= 0."""
    if not len(of_rows):
        return torch.zeros_like(rows, dtype=torch.bool)
    # a pair as one number, row x width + key, so that one ``isin`` answers for all
    width = int(torch.maximum(keys.max(), of_keys.max())) + 1 if len(keys) else 1
    return torch.isin(rows * width + keys, of_rows * width + of_keys)
