"""The one configuration: a YAML file over the defaults, and ``--set key.path=value`` over both.

Each part of the program declares its own section where its fields are explained; this module
composes them and turns every mistake into one ConfigError that names the key.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardline.cluster.control.quality_config import QualityConfig
from shardline.cluster.housekeeping.housekeeping_config import HousekeepingConfig
from shardline.cluster.rollover.publish_config import PublishConfig
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import ConfigError, CorruptFile, NotFound
from shardline.shards.core.small_files import MAX_TEXT_BYTES, read_small
from shardline.shards.index.spec import IndexSpec
from shardline.shards.live.live_config import LiveConfig
from shardline.training.config.training_config import TrainingConfig


class ClusterConfig(BaseModel):
    """Where shards run, what they reserve from Ray, and where the HTTP front end listens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = Field(
        default="local",
        description='Ray cluster: "local" starts one here, "auto" joins one here, or HOST:PORT.',
    )
    shards: int = Field(
        default=4, ge=1, le=4096, description="[shards] Shards of a new generation."
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=16,
        description="[replicas] Replicas of each shard, on different hosts; not more than hosts.",
    )
    writes: bool = Field(
        default=True,
        description="Whether items may be written while they are served. false: for a store that "
        "shards can only read.",
    )
    threads_per_shard: int = Field(
        default=1, ge=1, le=256, description="[threads] faiss threads that one shard's search uses."
    )
    cpus_per_shard: float = Field(
        default=0, ge=0, le=256, description="[CPUs] CPUs that each shard actor reserves in Ray."
    )
    gpus_per_shard: float = Field(
        default=1, ge=0, le=8, description="[GPUs] GPUs that each shard on a GPU reserves in Ray."
    )
    cpu_when_gpu_fails: bool = Field(
        default=False,
        description="Whether a shard whose GPU has failed three times within ten minutes is served "
        "from the CPU, slower; `status` says so. Else it is tried on the GPU again and again.",
    )
    huge_pages: bool = Field(
        default=True,
        description="Move what shards and routers have loaded to huge pages, where the system has "
        "them: a fifth less time per search for 14 to 25 MiB more per process.",
    )
    shard_host: str = Field(
        default="127.0.0.1",
        description='Address shards listen on; "node": the address by which Ray knows the host, '
        "the only one for a cluster of several hosts.",
    )
    http_host: str = Field(
        default="127.0.0.1",
        description="Address of the HTTP front end: any of this machine's, IPv4 or IPv6; 0.0.0.0 "
        'is every one of IPv4, "::" of both. On a launched cluster only 0.0.0.0 or 127.0.0.1, '
        "with which a host cannot ask the routers of others while its own is away.",
    )
    key_file: Path | None = Field(
        default=None,
        description="File with the API keys. null: <store>/keys, which is made if it does not "
        "exist.",
    )
    insecure: bool = Field(
        default=False, description="Require no API key: whoever reaches the port may search."
    )
    http_port: int = Field(
        default=8000,
        ge=0,
        le=65535,
        description="[port] HTTP port; 0 picks a free one (local only).",
    )
    router_replicas: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="[processes] Router replicas behind HAProxy. null: one per host.",
    )
    start_timeout_s: float = Field(
        default=300,
        gt=0,
        description="Time limit for shards and routers to be ready at start. A shard that has not "
        "loaded in a third of it is tried on another host, where there is one.",
    )

    @property
    def routers_per_host(self) -> int:
        """Router replicas that one host must have room for."""
        return self.router_replicas or 1


class ShardlineConfig(BaseModel):
    """The whole configuration: one section per part of the program."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Path = Field(
        default=Path("shardline-store"),
        description="Folder of runs, embedding sets, generations; shared by all hosts.",
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    index: IndexSpec = Field(default_factory=IndexSpec)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    live: LiveConfig = Field(default_factory=LiveConfig)
    quality: QualityConfig = Field(default_factory=QualityConfig)
    housekeeping: HousekeepingConfig = Field(default_factory=HousekeepingConfig)
    publish: PublishConfig = Field(default_factory=PublishConfig)


def load_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    preferences: Mapping[str, object] | None = None,
) -> ShardlineConfig:
    """The configuration of a YAML file (all defaults when None) with overrides applied.

    Args:
        preferences: ``key.path`` -> value, of a command with defaults of its own: they hold where
            neither the file nor an override says anything.
        overrides: ``key.path=value`` strings; the value is read as YAML, so numbers are numbers.

    Raises:
        NotFound: the file does not exist.
        ConfigError: not YAML, an unknown key, or an illegal value; names the key.
    """
    content = _read_yaml(path) if path is not None else {}
    source = str(path) if path is not None else "--set"
    for override in overrides:
        _apply_override(content, override)
    for key, value in (preferences or {}).items():
        _set_if_absent(content, key, value)
    try:
        config = ShardlineConfig.model_validate(content)
    except ValidationError as error:
        raise config_error(error, ShardlineConfig, source) from error
    if config.router.experiments:
        # the checker of request bodies, which takes 30 ms to load, and needs orjson
        from shardline.router.http.arm_settings import check_arm_settings

        check_arm_settings(config.router)
    return config


def given_keys(section: str, overrides: Sequence[str]) -> set[str]:
    """The keys of a section that ``key.path=value`` overrides name, right or wrong."""
    keys: set[str] = set()
    for override in overrides:
        path, _, value = override.partition("=")
        first, *rest = path.split(".")
        if first == section:
            whole = None if rest else yaml.safe_load(value)
            keys |= {rest[0]} if rest else set(whole if isinstance(whole, dict) else ())
    return keys


def config_error(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """The first problem of a pydantic error as one ConfigError with the key's path."""
    problem = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, problem["loc"][:-1])
        return ConfigError(
            f"unknown key in {source}",
            field=path,
            expected=f"one of {', '.join(known)}" if known else None,
            hint=_did_you_mean(str(problem["loc"][-1]), known),
        )
    return ConfigError(
        f"illegal value in {source}: {problem['msg']}", field=path, got=repr(problem.get("input"))
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_small(path, MAX_TEXT_BYTES).decode())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no such configuration file") from error
    except CorruptFile as error:
        raise ConfigError(error.message, expected=error.expected, got=error.got) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML", got=" ".join(str(error).split())) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a mapping", got=type(content).__name__)
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError("bad --set", expected="key.path=value", got=override)
    try:
        value = yaml.safe_load(text)
        if isinstance(value, dict) and text.endswith(":"):
            value = text  # an IPv6 address: to YAML, names without values
    except yaml.YAMLError as error:
        raise ConfigError("bad --set: the value is not YAML", field=path, got=text) from error
    *parents, last = path.split(".")
    for name in parents:
        section = content.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError("bad --set: not a section", field=path, got=repr(section))
        content = section
    content[last] = value


def _set_if_absent(content: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for name in parents:
        section = content.setdefault(name, {})
        if not isinstance(section, dict):
            return  # validation will say what is wrong with it
        content = section
    content.setdefault(last, value)


def _known_keys(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """Field names of the section at ``path``; empty where the path leaves plain sections."""
    section: Any = model
    for name in path:
        field = section.model_fields.get(str(name))
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)


def _did_you_mean(key: str, known: list[str]) -> str | None:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else None
