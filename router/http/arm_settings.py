"""Whether searches take the settings of the arms of experiments: checked as bodies of requests are.

Each arm's settings are put into one search of every kind, and into one of two queries, and that is
decoded: so whatever a body may hold, an arm may set, if it fits every search.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from shardline.router.experiments.assignment import KEY_FIELD
from shardline.router.experiments.experiment_config import ArmConfig
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.query import QueryKind
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import ConfigError, InvalidInput

# what a search is, and what is of one request alone
NOT_SET = (
    *(kind.value for kind in QueryKind),
    *(KEY_FIELD, "min_seq", "min_seq_of", "background", "return_original_ids"),
)
PROBES: tuple[dict[str, Any], ...] = (
    {QueryKind.VECTORS.value: [[1.0]]},
    {QueryKind.FEATURES.value: [{}]},
    {QueryKind.ITEM_IDS.value: [0]},
    {QueryKind.ITEM_IDS.value: [0, 1]},
    {QueryKind.TEXTS.value: ["a"]},
)


def check_arm_settings(config: RouterConfig) -> None:
    """Raises ConfigError: a setting of an arm that a search does not take; names it."""
    for path, arm in _arms(config):
        _check(config, f"{path}.search", arm)


def _arms(config: RouterConfig) -> Iterator[tuple[str, ArmConfig]]:
    for number, experiment in enumerate(config.experiments):
        for place, arm in enumerate(experiment.arms):
            yield f"router.experiments.{number}.arms.{place}", arm


def _check(config: RouterConfig, path: str, arm: ArmConfig) -> None:
    for name in NOT_SET:
        if name in arm.search:
            raise ConfigError(
                f"arm {arm.name} sets what each request says for itself",
                field=f"{path}.{name}",
                hint=f"arms may set every field of a search but {', '.join(NOT_SET)}",
            )
    for probe in PROBES:
        try:
            decode_query(_body(path, arm, probe), Media.JSON, config)
        except InvalidInput as error:
            (kind,) = probe
            raise ConfigError(
                f"a search by {kind} does not take the settings of arm {arm.name}: {error.message}",
                field=f"{path}.{error.field}",
                expected=error.expected,
                got=error.got,
                hint=error.hint,
            ) from error


def _body(path: str, arm: ArmConfig, probe: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps({**arm.search, **probe})
    except orjson.JSONEncodeError as error:
        raise ConfigError(
            f"arm {arm.name} has values that JSON does not have", field=path, got=str(error)
        ) from error
