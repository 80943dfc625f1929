"""The text encoder that routers are to run: whether it is one, before any of them starts."""

from pathlib import Path

from shardline.cluster.preflight.check import Check, failed, passed
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import ConfigError, CorruptFile, NotFound
from shardline.shards.text.model_folder import describe_model, find_model

KEY = "router.text_encoder"


def check_text_encoder(name: str) -> Check:
    """That it is a model of a known kind on this machine; hosts with routers need it as well."""
    try:
        model = describe_model(find_model(name))
    except (NotFound, ConfigError, CorruptFile) as error:
        refused = ConfigError(
            error.message, field=KEY, expected=error.expected, got=error.got, hint=error.hint
        )
        return failed("text encoder", refused)
    return passed("text encoder", f"{model.name}, {model.width} dimensions, encoder {model.id}")


def with_absolute_folder(config: RouterConfig) -> RouterConfig:
    """A folder by its absolute path: routers run in another working folder than this command."""
    if config.text_encoder is None or not Path(config.text_encoder).expanduser().is_dir():
        return config
    folder = Path(config.text_encoder).expanduser().resolve()
    return config.model_copy(update={"text_encoder": str(folder)})
