"""Which arm of each experiment a search gets: by a hash of its key, or because a header says so.

A key's point in [0, 1) is the same for ever, and another one in every experiment; the arms take the
range from 0 to 1 in their order, each as much as its share. So a key keeps its arm for as long as
the boundaries around it stay: where an arm is added at the end, or the last arm's share grows, keys
move from the arm before to the last one, and no others.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from shardline.router.experiments.experiment_config import (
    PARAMS,
    ArmConfig,
    ExperimentConfig,
    setting_paths,
)
from shardline.shards.core.errors import InvalidInput

ARM_HEADER = "x-shardline-arm"
KEY_FIELD = "experiment_key"
MAX_KEY_CHARS = 256
MAX_GOT = 100  # characters of a refused header that an error shows
POINT_BYTES = 6  # of a hash: 48 bits, which a float holds exactly

Arms = tuple[tuple[str, str], ...]  # (experiment, arm), in the order of the configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Of one search. key: None where a header alone put it into its arms. is_whole: the request
    itself gives neither params nor any setting of its arms, so that what is seen of it says how
    good they are."""

    arms: Arms
    key: str | None
    is_whole: bool


@dataclass(frozen=True, slots=True)
class _Arm:
    name: str
    search: Mapping[str, Any]


class Experiments:
    """The experiments of a router's configuration, ready to assign. Immutable."""

    def __init__(self, configured: Sequence[ExperimentConfig] = ()) -> None:
        self._arms = {
            each.name: {arm.name: _Arm(arm.name, arm.search) for arm in each.arms}
            for each in configured
        }
        self._boundaries = {each.name: boundaries_of(each.arms) for each in configured}
        self.all_arms: Arms = tuple(
            (name, arm) for name, arms in self._arms.items() for arm in arms
        )

    def __bool__(self) -> bool:
        return bool(self._arms)

    def arms_of(self, key: str) -> Arms:
        """The arm of every experiment that the key gets."""
        return tuple((name, self._by_hash(name, key)) for name in self._arms)

    def parsed(self, header: str) -> dict[str, str]:
        """``experiment=arm``, or several with commas between them, as a map.

        Raises:
            InvalidInput: another form, no such experiment or arm, or an experiment given twice.
        """
        found: dict[str, str] = {}
        for part in header.split(","):
            name, equals, arm = (each.strip() for each in part.partition("="))
            if not equals:
                raise _bad_header("experiment=arm, with commas between several", part)
            if name not in self._arms:
                known = ", ".join(self._arms) or "none are configured"
                raise _bad_header(f"an experiment: {known}", name)
            if arm not in self._arms[name]:
                raise _bad_header(f"an arm of {name}: {', '.join(self._arms[name])}", arm)
            if name in found:
                raise _bad_header("each experiment once", f"{name} twice")
            found[name] = arm
        return found

    def assign(self, key: str | None, forced: Mapping[str, str]) -> Arms:
        """The arms of a search. key None: those of ``forced`` alone."""
        names = self._arms if key is not None else [name for name in self._arms if name in forced]
        return tuple(
            (name, forced[name] if name in forced else self._by_hash(name, key or ""))
            for name in names
        )

    def enter(
        self, content: Mapping[Any, Any], forced: Mapping[str, str]
    ) -> tuple[Mapping[Any, Any], Assignment | None]:
        """The fields of a body with its arms' settings, and which arms those are; as it is and None
        where it is in none. A key of another form is left to who checks the fields."""
        key = content.get(KEY_FIELD)
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= MAX_KEY_CHARS):
            return content, None
        arms = self.assign(key, forced)
        if not arms:
            return content, None
        whole, is_whole = self.filled(content, arms)
        return whole, Assignment(arms=arms, key=key, is_whole=is_whole)

    def filled(self, content: Mapping[Any, Any], arms: Arms) -> tuple[dict[Any, Any], bool]:
        """The fields of a body with the settings of its arms, where it does not give them itself;
        and whether it gives neither one of them nor params. Null is not given. What is no map of
        fields for ``params`` stays as it is, to be refused."""
        whole = dict(content)
        is_whole = not content.get(PARAMS)
        for name, arm in arms:
            for field, value in self._arms[name][arm].search.items():
                given = whole.get(field)
                if field == PARAMS and isinstance(given, Mapping) and isinstance(value, Mapping):
                    # of the request, or of the arm of another experiment, which sets other parts
                    kept = {part: each for part, each in given.items() if each is not None}
                    whole[PARAMS] = {**value, **kept}
                elif given is None:
                    whole[field] = value
                else:
                    is_whole = False
        return whole, is_whole

    def of_arm(self, error: InvalidInput, assignment: Assignment) -> InvalidInput:
        """The error, with a hint where the field that it names has its value from an arm."""
        field = error.field or ""
        for name, arm in assignment.arms:
            paths = setting_paths(self._arms[name][arm].search)
            if any(field == path or field.startswith((f"{path}.", f"{path}[")) for path in paths):
                told = f"the value is that of arm {arm} of experiment {name}"
                error.hint = told if error.hint is None else f"{error.hint}; {told}"
        return error

    def _by_hash(self, name: str, key: str) -> str:
        place = bisect_right(self._boundaries[name], point_of(name, key))
        arms = list(self._arms[name])
        return arms[min(place, len(arms) - 1)]


def point_of(name: str, key: str) -> float:
    """Where a key lies in [0, 1), evenly over keys; another place under every name."""
    digest = hashlib.sha256(f"{name}\0{key}".encode()).digest()
    return float(int.from_bytes(digest[:POINT_BYTES]) / (1 << 8 * POINT_BYTES))


def boundaries_of(arms: Sequence[ArmConfig]) -> list[float]:
    """Where each arm's range ends; the last one's too, which rounding may put beside 1."""
    return list(accumulate(arm.share for arm in arms))


def _bad_header(expected: str, got: str) -> InvalidInput:
    return InvalidInput(
        "not an arm", field=ARM_HEADER, expected=expected, got=repr(got.strip()[:MAX_GOT])
    )
