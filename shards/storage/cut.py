"""Which writes of a live generation rows contain: what ``publish`` need not replay to them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Of shard s of ``generation`` the first ``seqs[s]`` writes; any later one may be missing."""

    generation: int
    seqs: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As manifests keep it."""
        return {"generation": self.generation, "seqs": list(self.seqs)}


def cut_from_json(value: Any) -> Cut | None:
    """What ``to_json`` made; None for None, as older manifests have it.

    Raises:
        ValueError, TypeError, KeyError: anything else.
    """
    if value is None:
        return None
    numbers = [value["generation"], *value["seqs"]]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"cut: {value}")
    return Cut(generation=numbers[0], seqs=tuple(numbers[1:]))
