"""Experiments in the configuration: arms of search settings, and the share of keys that each gets.

Whether a search would take an arm's settings is checked by ``http.arm_settings``, which has the
checker of request bodies.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_EXPERIMENTS = 16
MAX_ARMS = 16
# in headers, metrics and columns of tables: nothing that needs quoting, and no = and ,
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
SHARE_TOLERANCE = 1e-6
PARAMS = "params"  # the field whose parts are settings of their own


class ArmConfig(BaseModel):
    """One arm of an experiment: settings of its searches, and its share of the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=f"^{NAME.pattern}$",
        description="Name, in answers, metrics and reports: letters, digits, `_`, `.` and `-`.",
    )
    share: float = Field(
        gt=0,
        le=1,
        description="[share] Share of the keys that get this arm; those of an experiment's arms "
        "sum to 1.",
    )
    search: dict[str, Any] = Field(
        default={},
        description="Fields of a search, as in the body of a request, for searches that do not "
        "give them themselves.",
    )


class ExperimentConfig(BaseModel):
    """An experiment of the router: every experiment_key gets one of its arms, always the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=f"^{NAME.pattern}$",
        description="Name, in answers, metrics and reports: letters, digits, `_`, `.` and `-`.",
    )
    arms: tuple[ArmConfig, ...] = Field(
        min_length=1,
        max_length=MAX_ARMS,
        description="The arms; reports compare the others with the first.",
    )

    @model_validator(mode="after")
    def _arms_are_whole(self) -> Self:
        _refuse_repeated("arms", (arm.name for arm in self.arms))
        total = math.fsum(arm.share for arm in self.arms)
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ValueError(f"the shares of its arms sum to {total:.9g}, not to 1")
        return self

    @property
    def settings(self) -> frozenset[str]:
        """What any of its arms sets: fields of a search, ``params.<name>`` each for itself."""
        return frozenset(path for arm in self.arms for path in setting_paths(arm.search))


def setting_paths(search: Mapping[str, Any]) -> Iterable[str]:
    """Names of the settings that a map of body fields holds."""
    for name, value in search.items():
        if name == PARAMS and isinstance(value, Mapping):
            yield from (f"{PARAMS}.{part}" for part in value)
        else:
            yield name


def check_together(experiments: tuple[ExperimentConfig, ...]) -> None:
    """Raises ValueError: two have the same name, or set the same field of a search."""
    _refuse_repeated("experiments", (each.name for each in experiments))
    owners: dict[str, str] = {}
    for each in experiments:
        for path in sorted(each.settings):
            if path in owners:
                raise ValueError(
                    f"{path} is set by two experiments, {owners[path]} and {each.name}; "
                    "make them the arms of one"
                )
            owners[path] = each.name


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two {what} are called {name}")
        seen.add(name)
