"""What a publish is asked for, how far it is, and what is left of it: plain data.

``publishing`` runs it, ``publish_note`` keeps it in the store, ``status`` shows it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

from shardline.cluster.control.fleet_state import Role
from shardline.shards.core.messages import Absence


class PublishStage(StrEnum):
    """In their order; live and failed are ends."""

    CHECKING = "checking"
    LOADING = "loading"
    REPLAYING = "replaying"
    GATE = "gate"
    SWITCHING = "switching"
    LIVE = "live"
    FAILED = "failed"


class PublishKind(StrEnum):
    """publish: of a generation that has to pass the gate. rollback: to the one before, which was
    live already."""

    PUBLISH = "publish"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOptions:
    """generation: which is to be live. with_writes: it is to have what was written to the live one.
    skip_gate: why it need not pass the gate; None: it must. bounds: values of the section
    ``publish`` of the configuration, as JSON has them, that count for this one. one_at_a_time: the
    shards of the live generation take over its index, one after the other; token: as of
    ``OwnIndex``, then."""

    generation: int
    kind: PublishKind = PublishKind.PUBLISH
    with_writes: bool = True
    skip_gate: str | None = None
    bounds: Mapping[str, Any] = field(default_factory=dict)
    one_at_a_time: bool = False
    token: str = ""

    @property
    def has_gate(self) -> bool:
        return self.kind is PublishKind.PUBLISH and self.skip_gate is None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishProgress:
    """How far a publish is, or how it ended.

    number: which it is, above those before. source: the generation that was live when it began.
    since_s: when it came to its stage, in seconds since 1970. text: what it is at, for people. done
    of total: replicas, or writes. tries: to switch, or controllers that ran it. figures: what the
    gate has measured, each with its bound.
    """

    number: int
    options: PublishOptions
    source: int
    stage: PublishStage = PublishStage.CHECKING
    since_s: float = 0.0
    text: str = ""
    done: int = 0
    total: int = 0
    tries: int = 1
    unreplayed: int = 0
    examples: tuple[int, ...] = ()
    figures: tuple[dict[str, Any], ...] = ()
    reason: Absence | None = None

    @property
    def is_over(self) -> bool:
        return self.stage in (PublishStage.LIVE, PublishStage.FAILED)

    def as_json(self) -> dict[str, Any]:
        """Its fields, the options among them, and ``is_over``."""
        found = asdict(self)
        options: dict[str, Any] = found.pop("options")
        if not self.options.one_at_a_time:  # older versions know neither
            del options["one_at_a_time"], options["token"]
        return options | found | {"is_over": self.is_over}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError, ValueError: it is none."""
        given = {name: value for name, value in said.items() if name != "is_over"}
        options = PublishOptions(
            generation=int(given.pop("generation")),
            kind=PublishKind(given.pop("kind")),
            with_writes=given.pop("with_writes") is True,
            skip_gate=given.pop("skip_gate"),
            bounds=dict(given.pop("bounds", {})),  # not in notes of older versions
            one_at_a_time=given.pop("one_at_a_time", False) is True,
            token=str(given.pop("token", "")),
        )
        reason = given.pop("reason")
        progress = cls(
            options=options, reason=None if reason is None else Absence(**reason), **given
        )
        return replace(
            progress,
            stage=PublishStage(progress.stage),
            examples=tuple(progress.examples),
            figures=tuple(progress.figures),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """What the store's note says: the generation beside the live one, and the newest publish.

    live: what was live then. beside: None: nothing was. since_s: when it got its role, in seconds
    since 1970. before: what was live before the newest switch; None: nothing that is known of.
    """

    live: int
    beside: int | None = None
    role: Role = Role.CANDIDATE
    is_mirrored: bool = False
    since_s: float = 0.0
    publish: PublishProgress | None = None
    before: int | None = None


def after_restart(noted: Noted | None, live: int) -> Noted | None:
    """What is beside the generation that is live now, for a controller that has begun anew; None:
    nothing that is known of.

    A controller that died when it had made the candidate the live one, and had not noted it, has
    kept the one before, which gets the writes from then on, as after every switch.
    """
    if noted is None or noted.beside is None:
        return noted
    if noted.live == live and noted.beside != live:
        return noted
    if noted.beside == live:
        return replace(noted, live=live, beside=noted.live, role=Role.KEPT, is_mirrored=True)
    return replace(noted, live=live, beside=None)
