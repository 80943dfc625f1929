"""Where the lists of a store are: folders, and the names of files in them."""

import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from shardline.shards.core.errors import ListsUnavailable

LISTS_FOLDER = "lists"  # of a store
GENERATIONS_FOLDER = "generations"  # every store that is served has it
TEMPORARY_FOLDER = "tmp"
BUCKETS = tuple(f"{number:02x}" for number in range(256))
VERSION = re.compile(r"(\d{12})\.ids")


def lists_folder(generation_dir: str) -> Path:
    """Of the store that has the generation in this folder.

    Raises:
        ListsUnavailable: the folder is not one of a store.
    """
    generation = Path(generation_dir)
    if generation.parent.name != GENERATIONS_FOLDER:
        raise ListsUnavailable("it is not known where the store is")
    return generation.parent.parent / LISTS_FOLDER


def bucket_of(name: str) -> str:
    return BUCKETS[zlib.crc32(name.encode("ascii")) & 0xFF]


def folder_name(name: str) -> str:
    """No name begins with a dot then, as those of hidden files do; % is in no list's name."""
    return f"%2E{name[1:]}" if name.startswith(".") else name


def list_name(folder: str) -> str:
    """The reverse of ``folder_name``."""
    return f".{folder[3:]}" if folder.startswith("%2E") else folder


def file_name(version: int) -> str:
    return f"{version:012d}.ids"


def names_in(folder: Path) -> list[str]:
    """What is in a folder; nothing where it does not exist. Raises OSError."""
    try:
        return os.listdir(folder)  # noqa: PTH208, half the time of Path.iterdir
    except FileNotFoundError:
        return []


def versions_in(names: Iterable[str]) -> list[int]:
    """The versions among the names in a list's folder, oldest first."""
    return sorted(int(match[1]) for name in names if (match := VERSION.fullmatch(name)))
