"""Names of columns on a command line: a line of CSV, so that a name may hold a comma."""

import csv
import io
import shlex
from collections.abc import Iterable

from shardline.shards.core.errors import InvalidInput


def split_names(option: str, text: str) -> list[str]:
    """The values in one line of CSV: a name with a comma in it stands in quotes.

    Raises:
        InvalidInput: a quote is not closed, or the line breaks outside of quotes.
    """
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise InvalidInput("not a line of CSV", field=option, got=f"{text!r} ({error})") from error


def joined_names(names: Iterable[str]) -> str:
    """What ``split_names`` splits into these, quoted for a shell where that is needed."""
    line = io.StringIO()
    csv.writer(line).writerow(names)
    return shlex.quote(line.getvalue().removesuffix("\r\n"))
