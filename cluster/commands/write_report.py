"""What ``upsert`` and ``delete`` say at their end."""

import json
from dataclasses import asdict

import click

from shardline.router.client.answers import DeleteAnswer, UpsertAnswer
from shardline.shards.core.errors import ShardlineError


def say_written(answer: UpsertAnswer | DeleteAnswer, seconds: float, as_json: bool) -> None:
    """One line for people, or the sums as JSON."""
    if as_json:
        click.echo(json.dumps({**asdict(answer), "seconds": round(seconds, 3)}, indent=2))
        return
    if isinstance(answer, UpsertAnswer):
        counts = f"{answer.created:,} items created, {answer.updated:,} updated"
    else:
        counts = f"{answer.deleted:,} items deleted, {answer.missing:,} were not there"
    repeated = f", {answer.duplicates:,} came twice" if answer.duplicates else ""
    rate = answer.rows / seconds if seconds > 0 else 0.0
    click.echo(
        f"{counts}{repeated} in generation {answer.generation}, "
        f"{seconds:.1f} s, {rate:,.0f} items/s"
    )


def written_before(error: ShardlineError, done: int, how: str = "written") -> ShardlineError:
    """The error, with the number of items whose requests were answered before it."""
    if done:
        before = f"{done:,} items were {how} before"
        error.hint = before if error.hint is None else f"{error.hint}; {before}"
    return error
