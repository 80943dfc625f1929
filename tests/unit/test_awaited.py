"""Items awaited in another thread: all of them, their error, or what keeps them away."""

import threading
from collections.abc import Callable, Iterator

import pytest

from shardline.cluster.batch.awaited import awaited
from shardline.shards.core.errors import DataError, Unavailable

LOST = Unavailable("no room")


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets the items go on at the end, so that no thread is left."""
    before = set(threading.enumerate())
    event = threading.Event()
    yield event
    event.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) == before


def looks(*troubles: Unavailable | None, then: Callable[[], object] = lambda: None) -> Callable:
    """``trouble`` that gives these in order, then the last one for ever; calls ``then`` once all
    were given."""
    left = list(troubles)

    def trouble() -> Unavailable | None:
        if len(left) == 1:
            then()
            return left[0]
        return left.pop(0)

    return trouble


def never() -> Unavailable | None:
    raise AssertionError("items come at once")


def test_items_come_in_their_order(release: threading.Event) -> None:
    assert list(awaited(iter(range(1000)), never, look_s=30)) == list(range(1000))
    assert list(awaited([], never, look_s=30)) == []


def test_what_they_raise_is_raised_after_the_items_before(release: threading.Event) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("row 7")

    came = awaited(items(), never, look_s=30)
    assert next(came) == 1
    with pytest.raises(DataError, match="row 7"):
        next(came)


def waiting(release: threading.Event) -> Iterator[int]:
    yield 1
    assert release.wait(30)
    yield 2


def test_a_trouble_that_stays_ends_the_wait(release: threading.Event) -> None:
    came = awaited(waiting(release), looks(LOST), look_s=0.01, in_vain_s=0.05)
    assert next(came) == 1
    with pytest.raises(Unavailable, match="no room"):
        next(came)


def test_a_trouble_that_passes_does_not(release: threading.Event) -> None:
    four = [LOST] * 4
    trouble = looks(*four, None, *four, None, then=release.set)
    assert list(awaited(waiting(release), trouble, look_s=0.01, in_vain_s=0.05)) == [1, 2]
