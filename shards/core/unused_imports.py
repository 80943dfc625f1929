"""Packages that a dependency imports when it finds them, and that nobody here uses."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Absent(MetaPathFinder):
    """Finds that a package is not installed."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == self._package:
            raise ModuleNotFoundError(f"{fullname} is not for this process", name=fullname)
        return None


def forgo_pandas() -> None:
    """For a process that converts few values, at its start: pyarrow imports pandas, where it is
    installed, to see whether the first value that it converts is one of pandas'. That takes 0.3 s,
    of a search if it is the first one with a filter, and 40 MB. Nothing where it is imported
    already."""
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _Absent("pandas"))
