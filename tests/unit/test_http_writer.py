"""Attempts of a writer are journaled, and what is lost, returned or counted twice is told."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from shardline.bench.http_writer import CODED, OK, HttpWriter, look_at
from shardline.bench.journal import ABSENT, Journal, Versions, Write, vectors_of
from shardline.router.client.sync_client import Client
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotPrimary,
    ShardlineError,
)
from tests.fake_items import FakeItems

DIM = 4
ITEMS = (1, 2, 3)


class Here:
    def __init__(self) -> None:
        self.client, self.journal = FakeItems(), Journal()
        self.versions = Versions(dict.fromkeys(ITEMS, ABSENT))
        self.writer = HttpWriter(
            number=0,
            run="run",
            client=cast(Client, self.client),
            journal=self.journal,
            versions=self.versions,
            vectors=lambda write: vectors_of(1, write, DIM),
            titled=True,
        )

    def write(self, items: Sequence[int], *, is_upsert: bool = True) -> Write:
        made = self.writer.write(items, is_upsert=is_upsert)
        assert self.writer.attempt(made) == OK
        return made

    def differing(self) -> tuple[list[int], list[int]]:
        kept = look_at(cast(Client, self.client), self.versions, ITEMS, titled=True)
        assert kept.asked == len(ITEMS)
        return kept.lost, kept.returned


def test_what_is_acknowledged_is_there() -> None:
    here = Here()
    here.write([1, 2, 3])
    here.write([2], is_upsert=False)
    here.write([3])
    assert here.writer.seq == (3,)
    assert here.differing() == ([], [])
    assert (here.journal.violations, here.journal.writes) == ([], 3)


def test_what_is_lost_or_returned_is_told() -> None:
    here = Here()
    here.write([1, 2, 3])
    old = here.client.items[1]
    here.write([1])
    here.write([2], is_upsert=False)
    del here.client.items[3]
    assert here.differing() == ([3], [])
    here.client.items |= {1: old, 2: old}
    assert here.differing() == ([1, 3], [2]), "an older version is a loss"


@pytest.mark.parametrize("is_applied", [False, True])
def test_a_write_without_an_acknowledgement_is_repeated_with_its_key(is_applied: bool) -> None:
    here = Here()
    here.client.fails = [(DeadlineExceeded("late"), is_applied), (NotPrimary("no"), False)]
    write = here.writer.write([1], is_upsert=True)
    assert [here.writer.attempt(write) for _ in range(2)] == ["deadline_exceeded", "not_primary"]
    assert here.differing() == ([], []), "either is right until it is acknowledged"
    assert here.writer.attempt(write) == OK
    assert here.writer.repeat(write) == OK
    assert {sent["key"] for sent in here.client.sent} == {"run-0-1"}
    journal = here.journal
    assert (journal.refusals, journal.unknown) == ({"not_primary": 1}, {"deadline_exceeded": 1})
    assert (journal.violations, journal.repeats) == ([], 1)


def test_a_vector_of_codes_counts_as_the_one_that_was_written_where_that_is_allowed() -> None:
    here = Here()
    here.write([1])
    vector, title = here.client.items[1]
    here.client.items[1] = vector + np.float32(0.1), title
    asked = cast(Client, here.client)
    assert look_at(asked, here.versions, [1], least_cosine=CODED).lost == []
    assert look_at(asked, here.versions, [1]).lost == [1]
    here.client.items[1] = -vector, title
    assert look_at(asked, here.versions, [1], least_cosine=CODED).lost == [1]


def test_errors_that_no_write_may_end_with_are_violations() -> None:
    here = Here()
    here.client.fails = [(InvalidInput("a bad field"), False), (ShardlineError("internal"), False)]
    write = here.writer.write([1], is_upsert=True)
    assert [here.writer.attempt(write) for _ in range(2)] == ["invalid_input", "error"]
    assert len(here.journal.violations) == 2


def test_a_write_with_two_effects_is_told() -> None:
    here = Here()
    write = here.write([1])
    here.client.answers.clear()  # of its keys
    here.writer.repeat(write)
    assert "repeated" in here.journal.violations[0]
    here.client.items.clear()
    here.write([1])
    assert "1 items existed" in here.journal.violations[1]
    here.client.seq = 0
    here.write([2])
    assert "were both acknowledged as 1" in here.journal.violations[2]
    assert "had been acknowledged before" in here.journal.violations[3]


def test_another_generation_counts_anew_and_may_apply_a_repeated_write_twice() -> None:
    here = Here()
    here.write([1, 2])
    here.client.fails = [(DeadlineExceeded("late"), True)]
    write = here.writer.write([3], is_upsert=True)
    here.writer.attempt(write)
    here.client.answers.clear()
    here.client.seq, here.client.generation = 0, 2
    assert here.writer.attempt(write) == OK
    here.write([1])
    assert here.journal.violations == []
    assert here.writer.seq == (2,)
    assert here.differing() == ([], [])
