"""``data sessions``: click sessions as pairs of items, for item-to-item models."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from shardline.cluster.commands.data_options import out_option, overwrite_option, validated
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import MAX_K
from shardline.training.data.session_import import SessionConfig, import_sessions
from shardline.training.data.tables import open_dataset


@click.command()
@click.option("--source", required=True, help="Folder of the tables, the clicks, or a URL.")
@out_option
@click.option("--session-column", help="Column of session ids.  [default: session_id]")
@click.option("--item-column", help="Column of item ids.  [default: item_id]")
@click.option("--time-column", help="Column of times, or 'none' for the rows' order.")
@click.option(
    "--booked-column", help="True, or above 0, where a click ended in a booking or a purchase."
)
@click.option("--interactions-file", help="Table of clicks, where the source is a folder.")
@click.option("--items-file", help="Table of items in the source's folder; 'none' derives it.")
@click.option("--window", type=int, help="Clicks that items of a pair are apart.  [default: 5]")
@click.option("--val-share", type=float, help="Sessions held out to validate.  [default: 0.05]")
@click.option("--test-share", type=float, help="Latest sessions, to test.  [default: 0.1]")
@click.option("--on-error", type=click.Choice(["raise", "skip"]), help="A click of no known item.")
@click.option("--market-column", help="Column of items: negatives come from the same market.")
@click.option(
    "--negatives",
    type=click.Path(path_type=Path),
    help="Folder for those negatives, which `train --hard` takes.",
)
@click.option(
    "--per-item",
    type=click.IntRange(1, MAX_K),
    default=50,
    show_default=True,
    help="Negatives listed for an item.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws those negatives.")
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def sessions(
    source: str,
    out: Path,
    market_column: str | None,
    negatives: Path | None,
    per_item: int,
    seed: int,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make pairs of items of click sessions: each item asks for those clicked near it.

    The users of the data set are its items, so that towers may be tied. The latest sessions are
    held out: there an item asks for the next click.
    """
    values = {name: value for name, value in options.items() if value is not None}
    for name in ("items_file", "time_column"):
        if values.get(name) == "none":
            values[name] = None
    config = validated(SessionConfig, values | {"market_column": market_column})
    if (market_column is None) != (negatives is None):
        raise InvalidInput(
            "a market and a folder for its negatives go together",
            field="--market-column, --negatives",
            expected="both, or neither",
            got="--market-column" if market_column else "--negatives",
        )
    if negatives is not None:
        # torch is behind these, and most calls do not need it
        from shardline.training.mining.hard_negatives import check_target

        check_target(negatives, overwrite=overwrite)
    report = import_sessions(source, out, config, overwrite=overwrite)
    if market_column is not None and negatives is not None:
        _write_negatives(out, negatives, market_column, per_item, seed, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    pairs = ", ".join(f"{count:,} {name}" for name, count in report.pairs.items())
    click.echo(
        f"{out}: {report.sessions:,} sessions, {report.clicks:,} clicks, {report.booked:,} booked, "
        f"{report.items:,} items, pairs: {pairs}"
    )
    if report.unknown_items:
        click.echo(f"  unknown items: {report.unknown_items:,}")
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)


def _write_negatives(
    data: Path, folder: Path, column: str, per_item: int, seed: int, *, overwrite: bool
) -> None:
    from shardline.training.mining.hard_negatives import write_negatives
    from shardline.training.mining.market_negatives import market_negatives, market_origin

    dataset = open_dataset(data)
    mined = market_negatives(dataset, column, per_item=per_item, seed=seed)
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    origin = market_origin(column, per_item=per_item, seed=seed, created_at=created_at)
    write_negatives(folder, mined, dataset, origin, overwrite=overwrite)
    said = f"{folder}: negatives of {len(mined.users):,} items, {mined.starved:,} with fewer"
    click.echo(said, err=True)  # the report alone goes to standard output
