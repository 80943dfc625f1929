"""What the sections of the training configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Refuses unknown keys by name; its values stay as they were given."""

    model_config = ConfigDict(extra="forbid", frozen=True)
