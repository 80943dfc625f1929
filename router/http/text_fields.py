"""Texts in HTTP bodies."""

from typing import Annotated, Any

from pydantic import Field

from shardline.router.http.problems import wrong_type
from shardline.router.limits import check_text, too_many

# Of keys and ids that are stored with events: reports put NUL before ids of searches without a key.
KeyText = Annotated[str, Field(pattern=r"^[^\x00]*$")]


def to_texts(value: Any, max_rows: int) -> list[str]:
    """Texts to search by, none of them empty.

    Raises:
        InvalidInput: no list of texts, more than ``max_rows``, or one that is empty or too long.
    """
    if not isinstance(value, list):
        raise wrong_type("texts", "a list of texts", value)
    if len(value) > max_rows:
        raise too_many("texts", len(value), max_rows)
    for row, text in enumerate(value):
        if type(text) is not str:
            hint = "even one query is a list of one"
            raise wrong_type(f"texts[{row}]", "a text", text, hint)
        check_text(text, f"texts[{row}]")
    return value
