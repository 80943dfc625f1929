"""From where on a log is replayed, and where that cannot bring all writes."""

import random
from dataclasses import dataclass, field, replace

import pytest

from shardline.cluster.rollover.mirror_plan import Unreplayed
from shardline.cluster.rollover.mirror_start import Made, start_of
from shardline.cluster.rollover.replayed_note import Replayed
from shardline.shards.core.errors import WritesLost
from shardline.shards.storage.cut import MOST_BEFORE, Cut, cut_from_json, cut_of


def made(generation: int, cut: Cut | None = None) -> Made:
    return Made(generation=generation, num_shards=2, cut=cut)


def noted(generation: int, *seqs: int, unreplayed: int = 0) -> Replayed:
    left_out = Unreplayed(rows=unreplayed)
    return Replayed(generation=generation, seqs=seqs, sending=seqs, run="r", unreplayed=left_out)


def cut(generation: int, *seqs: int, before: Cut | None = None) -> Cut:
    return Cut(generation=generation, seqs=seqs, before=before)


@pytest.mark.parametrize(
    ("note", "of_target", "expected"),
    [
        (None, None, (0, 0)),
        (None, cut(1, 3, 4), (3, 4)),
        (None, cut(9, 3, 4), (0, 0)),
        (None, cut(9, 3, 4, before=cut(1, 5, 6)), (5, 6)),
        (None, cut(1, 3, 4, 5), (0, 0)),
        (noted(1, 5, 6), cut(1, 3, 4), (5, 6)),
        (noted(1, 3, 4), cut(1, 3, 4), (3, 4)),
        (noted(9, 5, 6), cut(1, 3, 4), (3, 4)),
        (noted(1, 5), None, (0, 0)),
        (noted(1, 2, 4), cut(1, 3, 4), (3, 4)),
    ],
)
def test_where_it_begins(note, of_target, expected) -> None:
    found = start_of(note, made(1), made(2, of_target), "new")
    assert found.seqs == expected
    is_noted = note is not None and note.generation == 1 and note.seqs == expected
    assert found is note if is_noted else found.run == "new", "a run goes on, or one begins"


@pytest.mark.parametrize(
    ("of_source", "of_target", "is_shown"),
    [
        (cut(1, 3, 4), cut(1, 3, 4), True),
        (cut(1, 3, 4), cut(1, 9, 4), True),
        (cut(1, 3, 4), cut(1, 9, 3), False),
        (cut(1, 3, 4), None, False),
        (cut(1, 3, 4), cut(1, 9), False),
        (cut(1, 0, 0), None, True),
        (cut(4, 0, 0, before=cut(1, 3, 4)), None, False),
        (cut(4, 0, 0, before=cut(1, 3, 4)), cut(1, 3, 4), True),
        (cut(2, 3, 4, before=cut(1, 3, 4)), None, True),  # of what the target itself was written
        (cut(1, 3, 4), cut(4, 0, 0, before=cut(1, 3, 4)), True),
        (cut(4, 3, 4, before=cut(1, 3, 4)), cut(1, 9, 9), False),
    ],
)
def test_what_the_rows_of_the_source_have_the_target_must_have(
    of_source: Cut, of_target: Cut | None, is_shown: bool
) -> None:
    source, target = made(3, of_source), made(2, of_target)
    if is_shown:
        assert start_of(None, source, target, "new").seqs == (0, 0)
    else:
        with pytest.raises(WritesLost, match="generation 3 was built with writes of generation"):
            start_of(None, source, target, "new")


def test_a_note_shows_it_too_and_what_it_left_out_stays_counted() -> None:
    source = made(3, cut(1, 3, 4))
    assert start_of(noted(1, 3, 4, unreplayed=2), source, made(2), "new").unreplayed.rows == 2
    assert start_of(noted(1, 3, 4), source, made(2), "new").unreplayed.rows == 0
    with pytest.raises(WritesLost):
        start_of(noted(1, 3, 3), source, made(2), "new")


def test_what_two_went_apart_with_is_no_proof_but_a_start() -> None:
    apart = replace(noted(1, 3, 4), is_apart=True)
    assert start_of(apart, made(1), made(2), "new") is apart
    with pytest.raises(WritesLost):
        start_of(apart, made(3, cut(1, 3, 4)), made(2), "new")


@dataclass
class Item:
    """An item's newest write, and all generations: slow and obvious. A generation is the writes in
    its rows, the writes in its log, and its cut."""

    rows: dict[int, set[int]] = field(default_factory=dict)
    logs: dict[int, list[int]] = field(default_factory=dict)
    cuts: dict[int, Cut | None] = field(default_factory=dict)

    def has(self, generation: int) -> set[int]:
        return self.rows[generation] | set(self.logs[generation])

    def build(self, of: int, seq: int) -> None:
        """From the rows of a generation as of one of its writes."""
        number = len(self.rows) + 1
        self.rows[number] = self.rows[of] | set(self.logs[of][:seq])
        self.logs[number], self.cuts[number] = [], cut_of(of, (seq,), self.cuts[of])


@pytest.mark.parametrize("seed", range(50))
def test_whatever_was_built_of_what_no_write_is_lost_silently(seed: int) -> None:
    """Generations are built of older ones, and go live one after the other, older ones too."""
    rng = random.Random(seed)
    item = Item({1: set()}, {1: []}, {1: None})
    live, notes, shown = 1, {}, 0
    for write in range(40):
        item.logs[live].append(write)
        if rng.random() < 0.3:
            of = rng.choice(list(item.rows))
            item.build(of, rng.randint(0, len(item.logs[of])))
        if rng.random() < 0.3 and (target := rng.choice(list(item.rows))) != live:
            source = Made(generation=live, num_shards=1, cut=item.cuts[live])
            to = Made(generation=target, num_shards=1, cut=item.cuts[target])
            try:
                start = start_of(notes.get(target), source, to, "new")
            except WritesLost:
                continue
            shown += 1
            item.logs[target] += item.logs[live][start.seqs[0] :]
            assert item.has(target) >= item.has(live)
            notes[target] = noted(live, len(item.logs[live]))
            notes[live] = noted(target, len(item.logs[target]))
            live = target
    assert shown


def test_a_cut_remembers_those_before_it_up_to_a_number() -> None:
    found = None
    for generation in range(1, 20):
        found = cut_of(generation, (generation, 0), found)
    assert found is not None
    assert [each.generation for each in found.all] == [*range(19, 19 - MOST_BEFORE - 1, -1)]
    assert cut_from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="cut"):
        cut_from_json({"generation": 2, "seqs": [1], "before": {"generation": -1, "seqs": []}})
