"""What long work reports: (stage, done, total); a total of 0 means that it is not known."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
