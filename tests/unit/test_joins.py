"""Joins against double loops."""

import numpy as np
import pytest
import torch

from shardline.training.loss.joins import Join, is_pair


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_every_block_against_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = sorted({(int(rng.integers(7)), int(rng.integers(9))) for _ in range(20)})
    rng.shuffle(wanted)  # the order of the pairs is free
    held = sorted({(int(rng.integers(11)), int(rng.integers(9))) for _ in range(15)})
    rng.shuffle(held)
    join = Join.of(
        7, *(torch.tensor(part) for pairs in (wanted, held) for part in zip(*pairs, strict=True))
    )
    for start in range(8):
        for stop in range(start, 8):
            expected = sorted(
                (row - start, column)
                for row, key in wanted
                for column, other in held
                if start <= row < stop and key == other
            )
            rows, columns = join.pairs(start, stop)
            assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


def test_equal_keys() -> None:
    join = Join.equal(torch.tensor([4, 8, 4]), torch.tensor([8, 4, 1, 4]))
    pairs = zip(*(part.tolist() for part in join.pairs(0, 3)), strict=True)
    assert sorted(pairs) == [(0, 1), (0, 3), (1, 0), (2, 1), (2, 3)]


def test_nothing_on_either_side() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert Join.of(3, nothing, nothing, nothing, nothing).pairs(0, 3)[0].tolist() == []
    assert Join.equal(torch.tensor([1]), nothing).pairs(0, 1)[1].tolist() == []
    assert not is_pair(torch.tensor([1]), torch.tensor([2]), nothing, nothing).any()
    assert is_pair(nothing, nothing, torch.tensor([1]), torch.tensor([2])).tolist() == []


def test_is_pair_against_a_set() -> None:
    rng = np.random.default_rng(0)
    rows, keys, of_rows, of_keys = (torch.from_numpy(rng.integers(0, 6, 30)) for _ in range(4))
    known = set(zip(of_rows.tolist(), of_keys.tolist(), strict=True))
    expected = [pair in known for pair in zip(rows.tolist(), keys.tolist(), strict=True)]
    assert is_pair(rows, keys, of_rows, of_keys).tolist() == expected
