"""CURRENT and the numbering of generations."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from shardline.cluster.store import COUNTER_LOCK, Store
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
    assert store.next_generation() == 9, "what is left in the store counts"
    (damage,) = store.damaged_state()
    assert "generations.json: not a counter" in str(damage)
    store.remember_generation(9)
    assert store.damaged_state() == []
    assert store.next_generation() == 10


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"one\n", b"\x003\n", b"3\x00", b"-3", b"3 4", b"3.0", b"0x3", b"\xff\xfe3\x00"),
        *("\u0663\n".encode(), "\u00b3".encode(), b"9" * 19, b"9" * 5000),
    ],
)
def test_a_damaged_current_is_refused(tmp_path: Path, content: bytes) -> None:
    """Digits of other alphabets and superscripts are digits to Python, and 9 * 5000 to no int()."""
    (tmp_path / "CURRENT").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"CURRENT: not a generation number; .*generations list"):
        Store(tmp_path).current()


def test_folders_with_digits_of_other_alphabets_are_no_generations(tmp_path: Path) -> None:
    store = Store(tmp_path)
    complete_generation(store, 3)
    for name in ("\u0664", "9" * 30, "7x", "\u00b2"):
        (store.generations / name).mkdir()
        files.write_manifest(store.generations / name, kind="generation", version=1, body={})
    assert store.generation_numbers() == [3]
    assert store.next_generation() == 4


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


DAMAGED = {
    "empty": b"",
    "no counter": b"{}",
    "a list": b"[]",
    "a text": b'{"counter": "x"}',
    "null": b'{"counter": null}',
    "a flipped brace": b'z"counter": 57}',
    "a number alone": b"57",
    "negative": b'{"counter": -1}',
    "a float": b'{"counter": 1e300}',
    "too many digits": b'{"counter": ' + b"9" * 5000 + b"}",
    "above every number": b'{"counter": 99999999999999999999}',
    "deep": b"[" * 60_000,
    "no text": b"\xff\x00\xfe",
    "too large": b" " * (1 << 20),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_counter_counts_as_none_is_named_and_written_anew(
    tmp_path: Path, content: bytes
) -> None:
    store = Store(tmp_path)
    (tmp_path / "counter.json").write_bytes(content)
    assert store.counter() == 0
    (damage,) = store.damaged_state()
    assert isinstance(damage, CorruptFile)
    assert "counter.json: " in str(damage)
    store.raise_counter(12)
    assert (store.counter(), store.damaged_state()) == (12, [])


def test_counters_of_an_older_version_count_where_the_newer_one_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for generation, content in ((3, b'{"counter": 12}'), (57, b"{"), (58, b"")):
        path = tmp_path / "epochs" / f"{generation:06d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert store.counter() == 12
    assert len(store.damaged_state()) == 2
    (tmp_path / "counter.json").write_bytes(b"{")
    assert store.counter() == 12
    store.raise_counter(13)
    assert (store.counter(), store.damaged_state()) == (13, [])


def test_folders_in_place_of_the_counters_are_put_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("counter.json", "generations.json", "counter.lock"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs").touch()
    assert (store.counter(), store.next_generation(), len(store.damaged_state())) == (0, 1, 2)
    store.raise_counter(5)
    store.remember_generation(6)
    assert (store.counter(), store.next_generation(), store.damaged_state()) == (5, 7, [])
    assert len(list(tmp_path.glob("*.json.*/*.json/theirs"))) == 2, "nothing of theirs is lost"


def test_pipes_in_place_of_the_files_of_state_keep_nobody_waiting(tmp_path: Path) -> None:
    """No process has the other end of any: to open one is to wait for it."""
    store = Store(tmp_path)
    for name in ("CURRENT", "counter.json", "generations.json", "counter.lock"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CorruptFile, match="CURRENT: not a regular file; got a named pipe"):
        store.current()
    assert store.counter() == 0
    assert store.next_generation() == 1
    assert [str(damage).split(";")[0] for damage in store.damaged_state()] == [
        f"{tmp_path / name}: not a regular file" for name in ("counter.json", "generations.json")
    ]
    store.raise_counter(5)
    store.remember_generation(6)
    assert (store.counter(), store.next_generation()) == (5, 7)


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


def test_what_is_retired_goes_live_no_more(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def in_use() -> set[int]:
        """Nothing may go live between this look and the removal."""
        handle = os.open(store.root / COUNTER_LOCK, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        return {1}

    for number in (1, 2):
        complete_generation(store, number)
    assert not store.retire(1, in_use)
    assert store.retire(2, in_use)
    assert store.generation_numbers() == [1]
    with pytest.raises(NotFound, match="no complete generation"):
        store.set_current(2)
    store.set_current(1)
