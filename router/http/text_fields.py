"""Types of text in HTTP bodies."""

from typing import Annotated

from pydantic import Field

# Of keys and ids that are stored with events: reports put NUL before ids of searches without a key.
KeyText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
