"""``--cap``, ``--boost``, ``--diversify`` of ``shardline query``: short forms, or maps of JSON."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from shardline.shards.core.errors import InvalidInput

NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
# a column whose name has a colon needs the map
CAP = re.compile(r"(?P<column>[^:]+):(?P<max>[0-9]+)")
BOOST = re.compile(rf"(?P<column>[^:]+):(?P<weight>{NUMBER})(?::(?P<half_life_days>{NUMBER})d)?")
DIVERSIFY = re.compile(rf"(?P<lambda>{NUMBER})(?::(?P<pool>[0-9]+))?")

Command = TypeVar("Command", bound=Callable[..., Any])


def rearrange_options(command: Command) -> Command:
    """The three options, for a command that takes ``caps``, ``boosts`` and ``diversify``."""
    options = (
        click.option(
            "--cap",
            "caps",
            multiple=True,
            help="At most so many items with the same value of an attribute, e.g. seller:2. "
            "Repeatable.",
        ),
        click.option(
            "--boost",
            "boosts",
            multiple=True,
            help="Add to scores: weight times a number, e.g. rating:0.1, or, of a date, with a "
            "half-life in days: published_at:0.1:7d. Repeatable.",
        ),
        click.option(
            "--diversify",
            help="Items like others before them make way: lambda, 1 for relevance alone, and "
            "maybe how many items are considered, e.g. 0.7 or 0.7:200.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def rearrange_fields(
    caps: Sequence[str], boosts: Sequence[str], diversify: str | None
) -> dict[str, Any]:
    """The fields of a search that these options stand for, as JSON has them.

    Raises:
        InvalidInput: one is of none of its forms.
    """
    fields: dict[str, Any] = {}
    if caps:
        fields["cap"] = [_read(each, "--cap", CAP, "seller:2") for each in caps]
    if boosts:
        fields["boost"] = [_read(each, "--boost", BOOST, "published_at:0.1:7d") for each in boosts]
    if diversify is not None:
        fields["diversify"] = _read(diversify, "--diversify", DIVERSIFY, "0.7")
    return fields


def _read(text: str, option: str, form: re.Pattern[str], example: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            given: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise _wrong(text, option, example) from error
        return given
    found = form.fullmatch(text)
    if found is None:
        raise _wrong(text, option, example)
    return {
        name: value if name == "column" else _number(value)
        for name, value in found.groupdict().items()
        if value is not None
    }


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _wrong(text: str, option: str, example: str) -> InvalidInput:
    return InvalidInput(
        "not understood",
        field=option,
        expected=f"a form as in {example}, or a map of JSON (docs/RESULTS.md)",
        got=text[:60],
    )
