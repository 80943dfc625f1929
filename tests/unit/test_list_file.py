"""One version of a list as a file: what is read is what was written, or it is refused."""

import numpy as np
import pytest

from shardline.router.list_names import LARGEST_LIST, MAX_NAME, check_list_name, is_list_name
from shardline.router.lists.list_file import (
    HEADER,
    MAX_FILE_BYTES,
    StoredList,
    decode_list,
    encode_list,
)
from shardline.shards.core.errors import CorruptFile, InvalidInput, NewerFormat


def stored(version=3, ids=(1, 5, 2**62), **fields):
    return StoredList(version=version, ids=np.array(ids, np.int64), **fields)


@pytest.mark.parametrize("name", ["a", "seen:17", "x" * MAX_NAME])
@pytest.mark.parametrize("ids", [(), (0,), (1, 5, 2**63 - 1)])
def test_what_is_written_is_read(name, ids):
    read = decode_list(encode_list(name, stored(ids=ids)), name, 3, "file")
    assert read.ids.tolist() == list(ids)
    assert (read.version, read.is_gone, read.exists) == (3, False, True)
    assert read.ids.flags.aligned
    assert not read.ids.flags.writeable


def test_a_deleted_list_is_a_version_without_ids():
    content = encode_list("a", stored(ids=(), is_gone=True))
    read = decode_list(content, "a", 3, "file")
    assert read.is_gone
    assert not read.exists
    assert len(content) == HEADER.size + 1


def test_every_bit_counts():
    content = encode_list("seen:17", stored())
    for place in range(len(content) * 8):
        altered = bytearray(content)
        altered[place // 8] ^= 1 << place % 8
        with pytest.raises((CorruptFile, NewerFormat)):
            decode_list(bytes(altered), "seen:17", 3, "file")


def test_every_length_but_its_own_is_refused():
    content = encode_list("seen:17", stored())
    for size in range(len(content)):
        with pytest.raises(CorruptFile):
            decode_list(content[:size], "seen:17", 3, "file")
    with pytest.raises(CorruptFile):
        decode_list(content + b"\0", "seen:17", 3, "file")


@pytest.mark.parametrize(("name", "version"), [("seen:18", 3), ("seen:17", 4)])
def test_a_file_in_the_place_of_another_is_refused(name, version):
    with pytest.raises(CorruptFile, match="another"):
        decode_list(encode_list("seen:17", stored()), name, version, "file")


def test_the_largest_list_can_be_read_again():
    largest = stored(ids=range(LARGEST_LIST))
    assert len(encode_list("x" * MAX_NAME, largest)) == MAX_FILE_BYTES


@pytest.mark.parametrize("name", ["a", "seen:17", "a.b", "..a", "...", "A-Z_~!$&'()*+,;=:@9"])
def test_names(name):
    assert check_list_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "a b",
        "a\n",
        "a\0",
        "a%2Fb",
        "ä",
        "a" * 129,
        "a?",
        "a#",
        'a"',
        "\x7f",
        7,
    ],
)
def test_what_is_no_name(name):
    assert not is_list_name(name)
    with pytest.raises(InvalidInput) as caught:
        check_list_name(name)
    assert caught.value.field == "name"
    assert caught.value.expected
