"""CURRENT and the numbering of generations."""

import threading
from pathlib import Path

import pytest

from shardline.cluster.store import Store
from shardline.shards.core import files
from shardline.shards.core.errors import CorruptFile, NotFound


def complete_generation(store: Store, number: int) -> None:
    store.generation(number).mkdir(parents=True)
    files.write_manifest(store.generation(number), kind="generation", version=1, body={})


def test_an_empty_store_has_no_live_generation(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.generation_numbers() == []
    assert store.next_generation() == 1
    with pytest.raises(NotFound, match="shardline build"):
        store.current()
    with pytest.raises(NotFound, match="shardline export"):
        store.newest_embeddings()


def test_current_names_a_complete_generation_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    complete_generation(store, 1)
    store.generation(2).mkdir()
    store.set_current(1)
    with pytest.raises(NotFound, match="000002"):
        store.set_current(2)
    assert store.current() == 1
    assert store.generation_numbers() == [1]
    assert store.next_generation() == 3, "an incomplete folder's number is never reused"


def test_the_number_of_a_deleted_generation_is_not_given_out_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    complete_generation(store, 1)
    store.remember_generation(4)
    store.remember_generation(2)
    assert Store(tmp_path).next_generation() == 5
    complete_generation(store, 8)
    assert store.next_generation() == 9, "of a store written before numbers were remembered"
    (tmp_path / "generations.json").write_text("{}")
    with pytest.raises(CorruptFile, match=r"generations\.json: not a counter"):
        store.next_generation()


def test_a_damaged_current_is_refused(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("one\n")
    with pytest.raises(CorruptFile, match="CURRENT"):
        Store(tmp_path).current()


def test_numbers_go_on_from_the_largest_of_any_generation(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.counter() == 0
    for generation, counter in ((3, 12), (57, 57), (58, 9)):  # as older versions kept them
        files.write_json(tmp_path / "epochs" / f"{generation:06d}.json", {"counter": counter})
    assert store.counter() == 57
    store.raise_counter(58)
    assert Store(tmp_path).counter() == 58
    store.raise_counter(40)
    assert Store(tmp_path).counter() == 58, "never lowered, by a second cluster on the store say"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"counter": "x"}', '{"counter": null}'])
def test_a_damaged_counter_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "counter.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"counter\.json: not a counter"):
        Store(tmp_path).counter()


def test_two_controllers_raise_one_counter_and_never_lower_it(tmp_path: Path) -> None:
    """Threads stand for processes: the lock is one of the file, taken anew each time."""
    store = Store(tmp_path)
    store.raise_counter(1)
    seen: list[int] = []

    def raise_all(numbers: range) -> None:
        for number in numbers:
            store.raise_counter(number)
            seen.append(store.counter() - number)

    threads = [threading.Thread(target=raise_all, args=(range(start, 400, 2),)) for start in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(seen) >= 0
    assert store.counter() == 399
