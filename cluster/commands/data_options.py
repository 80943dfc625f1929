"""What the commands that write data sets have in common: options, and their values checked."""

from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from shardline.cluster.config import config_error

Model = TypeVar("Model", bound=BaseModel)

out_option = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")


def validated(model: type[Model], values: dict[str, Any]) -> Model:
    """The pydantic model of these values. Raises ConfigError, naming the first wrong one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise config_error(error, model, "the command line") from error
