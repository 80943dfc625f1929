"""``ab``: the arms of experiments compared by their events, and events as data to train on."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.console import print_table, print_warnings
from shardline.shards.core.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from shardline.bench.ab.arm_report import ArmFigures, ExperimentReport, Outcome
    from shardline.bench.ab.intervals import Estimate

UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def _moment(context: click.Context, option: click.Parameter, text: str | None) -> datetime | None:
    """``2026-03-01``, ``2026-03-01T12:00``, both in UTC unless they say otherwise, or ``7d``."""
    if text is None:
        return None
    try:
        if text[-1:] in UNITS and text[:-1].isdecimal():
            return datetime.now(UTC) - timedelta(**{UNITS[text[-1]]: int(text[:-1])})
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(
            f"{text!r} is no time: 2026-03-01, 2026-03-01T12:00:00+01:00, or 7d, 12h, 30m ago"
        ) from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


since_option = click.option(
    "--since",
    callback=_moment,
    metavar="TIME",
    help="Events from then on: 2026-03-01, or 7d, 12h, 30m ago.  [default: all]",
)


@click.group()
def ab() -> None:
    """Compare the arms of experiments, by the events in the store.

    docs/EXPERIMENTS.md says how searches become part of experiments, and how outcomes are sent.
    `shardline bench ab` compares two settings without any traffic.
    """


@ab.command()
@click.option("--experiment", help="Only this one.  [default: all that have events]")
@since_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def report(
    settings: Settings, experiment: str | None, since: datetime | None, as_json: bool
) -> None:
    """Latency, recall and outcomes of each arm, with 95 % intervals.

    Outcomes are counted by key: of the keys whose searches were in one arm alone, all events since
    the first search. The first arm is the one that the others are compared with.
    """
    from shardline.bench.ab.arm_report import report as report_of
    from shardline.bench.ab.event_table import load_events

    table = load_events(settings.store.events, since)
    print_warnings(f"left out: {each}" for each in table.damaged)
    configured = {each.name: each for each in settings.config.router.experiments}
    names = table.experiments() if experiment is None else [experiment]
    if not set(names) <= set(table.experiments()) or not names:
        raise NotFound(
            "no search of such an experiment is stored",
            field="--experiment",
            got=experiment or "none at all",
            hint=f"there are: {', '.join(table.experiments()) or 'none'}",
        )
    reports = [
        report_of(table, name, _shares(configured[name].arms) if name in configured else None)
        for name in names
    ]
    if as_json:
        click.echo(json.dumps([_plain(asdict(each)) for each in reports], indent=2))
        return
    for each in reports:
        _print(each)


@ab.command()
@click.option(
    "--event", "kinds", multiple=True, required=True, help="Events that count. Repeatable."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Parquet file to write.",
)
@since_option
@click.pass_obj
def interactions(
    settings: Settings, kinds: tuple[str, ...], out: Path, since: datetime | None
) -> None:
    """Write events as a table of interactions, for `shardline data import --source`.

    One row per event that has an item and a key, or the request_id of a stored search with a key:
    user_id (the key), item_id, timestamp.
    """
    from shardline.bench.ab.event_interactions import write_interactions
    from shardline.bench.ab.event_table import load_events

    if out.suffix != ".parquet":
        raise InvalidInput("not a Parquet file", field="--out", expected="a name in .parquet")
    table = load_events(settings.store.events, since)
    print_warnings(f"left out: {each}" for each in table.damaged)
    written = write_interactions(table, kinds, out)
    click.echo(f"{out}: {written.rows:,} interactions of {written.users:,} users")
    if written.left_out:
        click.echo(f"left out: {written.left_out:,} events without a key or an item")


def _shares(arms: Any) -> dict[str, float]:
    return {arm.name: arm.share for arm in arms}


def _plain(value: Any) -> Any:
    """Without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _print(found: "ExperimentReport") -> None:
    from shardline.bench.ab.arm_report import MISMATCH

    header = ["arm", "keys", "searches", "p50 ms", "p99 ms", "recall", "filled"]
    print_table(f"experiment {found.experiment}", header, [_row(arm) for arm in found.arms])
    lines = [line for arm in found.arms for line in _outcome_rows(arm)]
    if lines:
        columns = ["arm", "event", "keys with one", "per key", "value per key"]
        print_table("outcomes, 95 % intervals in brackets", columns, lines)
    differences = [line for arm in found.arms[1:] for line in _difference_rows(arm)]
    if differences:
        title = f"differences to arm {found.arms[0].arm}; * where zero lies outside the interval"
        print_table(title, ["arm", "what", "difference", "95 % interval", ""], differences)
    if found.mixed:
        click.echo(f"{found.mixed:,} keys were in several arms; outcomes leave them out")
    if found.unowned:
        click.echo(f"{found.unowned:,} events belong to no search of one arm stored here")
    if found.mismatch is not None and found.mismatch < MISMATCH:
        print_warnings(
            [
                f"the numbers of keys do not fit the configured shares (p = {found.mismatch:.1g}): "
                "outcomes are not to be trusted before it is known why"
            ]
        )


def _row(arm: "ArmFigures") -> list[str]:
    return [
        arm.arm,
        f"{arm.keys:,}",
        f"{arm.searches:,}",
        _with_interval(arm.p50_ms, ".2f"),
        _with_interval(arm.p99_ms, ".2f"),
        _with_interval(arm.recall, ".4f"),
        _number(arm.filled, ".4f"),
    ]


def _outcome_rows(arm: "ArmFigures") -> Iterator[list[str]]:
    for each in arm.outcomes:
        yield [
            arm.arm,
            each.event,
            _with_interval(each.converted, ".4f"),
            _with_interval(each.events, ".4f"),
            _with_interval(each.value, ".4g"),
        ]


def _difference_rows(arm: "ArmFigures") -> Iterator[list[str]]:
    yield _difference(arm.arm, "p50 ms", arm.p50_difference_ms)
    yield _difference(arm.arm, "p99 ms", arm.p99_difference_ms)
    yield _difference(arm.arm, "recall", arm.recall_difference)
    for each in arm.outcomes:
        yield from _outcome_differences(arm.arm, each)


def _outcome_differences(arm: str, found: "Outcome") -> Iterator[list[str]]:
    yield _difference(arm, f"{found.event}, keys with one", found.converted_difference)
    yield _difference(arm, f"{found.event}, per key", found.events_difference)
    if found.value.value:
        yield _difference(arm, f"{found.event}, value per key", found.value_difference)


def _difference(arm: str, what: str, found: "Estimate") -> list[str]:
    interval = f"{_number(found.low, '+.4g')} to {_number(found.high, '+.4g')}"
    return [arm, what, _number(found.value, "+.4g"), interval, "*" if found.tells else ""]


def _with_interval(found: "Estimate", form: str) -> str:
    if math.isnan(found.value):
        return "-"
    return f"{found.value:{form}} [{_number(found.low, form)}, {_number(found.high, form)}]"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"
