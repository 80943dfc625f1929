"""The weights of another run as the initial ones of a new run: daily retraining, fine-tuning.

The new run has data, vocabularies and a schedule of its own. Row by row of every embedding table:
values that both runs know keep their vector, new ones get a fresh one, lost ones are dropped. All
other weights are taken as they are, so both towers must have the same architecture. Numbers stay
scaled as the older run scaled them, which is what its weights were trained on; only the time that
ages are counted from moves on. The optimiser's moments, streamed item frequencies and the memory
of past vectors are not taken over.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from shardline.shards.core.errors import ConfigError, DataError
from shardline.training.config.tower_config import AudienceFeature, FeatureConfig, TowerConfig
from shardline.training.config.training_config import TrainingConfig, flattened
from shardline.training.features.columns import Standardiser, TextHash
from shardline.training.features.fitted import Columns, FeatureSpace
from shardline.training.model.checkpoint import (
    CACHE,
    GO_ON,
    Run,
    TrainState,
    is_dataset_of,
    latest_state,
    load_best,
    open_run,
)
from shardline.training.model.towers import TwoTower, build_model

WARM = "warm.safetensors"  # inside the cache: the weights that the run was started with
# settings of a tower or a feature that change no weight's shape or meaning
FREE = {"dropout", "init_norm", "min_count", "keep_target"}
ONE_ARCHITECTURE = "give the settings of that run, or train without --from"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableGrowth:
    """Values of an embedding table that both runs know, that are new, and that were dropped."""

    kept: int
    new: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """The older run: what it declared, and the weights of its best checkpoint, on the CPU."""

    folder: Path
    run: Run
    weights: dict[str, Tensor]
    epoch: int
    step: int

    def origin(self, growth: Mapping[str, TableGrowth]) -> dict[str, Any]:
        """What the record of the new run says of it, plain JSON."""
        return {
            "run": str(self.folder),
            "epoch": self.epoch,
            "step": self.step,
            "weights_sha256": digest(self.weights),
            "fit_splits": self.run.config.fit_splits,
            "tables": {name: asdict(table) for name, table in growth.items()},
        }


def ended_state(folder: Path) -> TrainState:
    """Where a run ended that another one shall start from.

    Raises:
        NotFound, CorruptFile, NewerFormat: no run there, or not as it was written.
        DataError: its training has not ended.
    """
    run, state = open_run(folder), latest_state(folder)
    if state is None or not state.has_ended(run.config):
        raise DataError(
            f"{folder}: the training to start from has not ended",
            field="from",
            expected=f"{run.config.epochs} epochs, or an early stop",
            got="no checkpoint" if state is None else f"{state.epoch} epochs, {state.step} steps",
            hint=GO_ON,
        )
    return state


def open_warm_start(folder: Path) -> WarmStart:
    """The run to start from, with its weights; raises as ``ended_state``."""
    folder = folder.resolve()
    state = ended_state(folder)
    run, model = load_best(folder)
    return WarmStart(
        folder=folder,
        run=run,
        weights=dict(model.state_dict()),
        epoch=state.epoch if state.best_epoch is None else state.best_epoch,
        step=state.step if state.best_step is None else state.best_step,
    )


def with_features_of(config: TrainingConfig, older: TrainingConfig) -> TrainingConfig:
    """``config``, towers without named features with those of the older run.

    New rows of a table could suggest another kind of feature, and that is another architecture.
    """
    towers = {
        name: tower.model_copy(update={"features": getattr(older.towers, name).features})
        for name, tower in (("query", config.towers.query), ("item", config.towers.item))
        if tower.features is None
    }
    return config.model_copy(update={"towers": config.towers.model_copy(update=towers)})


def check_architecture(config: TrainingConfig, older: TrainingConfig, folder: Path) -> None:
    """Raises ConfigError, which names the keys, where the towers differ; features are named."""
    ours, theirs = _architecture(config), _architecture(older)
    if ours.keys() == theirs.keys():
        # the order of inputs decides which weight is whose; of other inputs it would say nothing
        ours |= {name: str(list(columns)) for name, columns in _orders(config).items()}
        theirs |= {name: str(list(columns)) for name, columns in _orders(older).items()}
    keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if keys:
        raise ConfigError(
            f"{folder}: that run has another architecture",
            field=", ".join(f"training.{key}" for key in keys),
            expected="; ".join(f"{key} {_shown(theirs, key)}" for key in keys),
            got="; ".join(f"{key} {_shown(ours, key)}" for key in keys),
            hint=ONE_ARCHITECTURE,
        )


def check_validation(config: TrainingConfig, warm: WarmStart, dataset: dict[str, Any]) -> None:
    """Refuses to validate on items that the older run was fitted on, ``dataset`` its identity.

    Raises:
        ConfigError: it was fitted on val of the same data, and this run would be measured there.
    """
    seen = "val" in warm.run.config.fitted_splits and "val" not in config.fitted_splits
    if seen and is_dataset_of(warm.folder, dataset):
        raise ConfigError(
            f"{warm.folder}: fitted on val of the same data, so validation would be too high",
            field="training.fit_splits",
            expected="train+val",
            got=config.fit_splits,
            hint="--all, or start from a run that was fitted on train alone",
        )


def carried_space(space: FeatureSpace, older: FeatureSpace, folder: Path) -> FeatureSpace:
    """The newly fitted ``space`` with the older run's scaling of numbers.

    Raises:
        DataError: a column has another type or width than it had for the older run.
    """
    # tied towers have the same columns on both sides, and so the same scaling
    return replace(
        space,
        query=_carried_columns(space.query, older.query, f"{folder}: towers.query"),
        item=_carried_columns(space.item, older.item, f"{folder}: towers.item"),
    )


def carried_weights(
    config: TrainingConfig, space: FeatureSpace, warm: WarmStart
) -> tuple[dict[str, Tensor], dict[str, TableGrowth]]:
    """Initial weights of the new run by name, and how each table grew, by ``<tower>.<column>``.

    A learned temperature goes on from where the older run left it, within the new limits; a fixed
    one is that of ``config``. Text tables have no values, only buckets: they are taken whole.
    """
    model = build_model(config, space)
    fresh, older = dict(model.state_dict()), warm.weights
    growth: dict[str, TableGrowth] = {}
    tables: set[str] = set()
    sides = [("item", space.item, warm.run.space.item)]
    if not config.towers.tied:
        sides.insert(0, ("query", space.query, warm.run.space.query))
    for tower, columns, before in sides:
        for kind, ours, theirs in (
            ("embeddings", columns.vocabularies, before.vocabularies),
            ("bags", columns.bags, before.bags),
        ):
            for place, (column, its_older) in enumerate(zip(ours, theirs, strict=True)):
                if isinstance(column, TextHash) or isinstance(its_older, TextHash):
                    continue
                name = f"{tower}_rows.{kind}.{place}.weight"
                rows, growth[f"{tower}.{column.column}"] = _rows_of(column.values, its_older.values)
                known = rows >= 0
                table = fresh[name].clone()
                table[torch.from_numpy(known)] = older[name][torch.from_numpy(rows[known])]
                fresh[name] = table
                tables.add(name)
    for name, tensor in older.items():
        if name not in tables:
            assert fresh[name].shape == tensor.shape, f"{name} of one architecture"
            if name != "log_temperature":
                fresh[name] = tensor
    if config.loss.learn_temperature:
        model.log_temperature.data.copy_(older["log_temperature"])
        model.clamp_temperature()
        fresh["log_temperature"] = model.log_temperature.detach()
    return fresh, growth


def load_warm(run_folder: Path, model: TwoTower) -> None:
    """Gives the model the weights that the run was declared with; checksums are the caller's."""
    model.load_state_dict(load_file(run_folder / CACHE / WARM))


def check_same_start(run_folder: Path, declared: Run, warm: WarmStart) -> None:
    """Raises ConfigError where a run to resume was not started from these weights."""
    origin = declared.origin
    if origin is None or origin["weights_sha256"] != digest(warm.weights):
        raise ConfigError(
            f"{run_folder}: the run was not started from {warm.folder} as it is now",
            field="from",
            expected="no --from" if origin is None else f"{origin['run']}, epoch {origin['epoch']}",
            got=f"{warm.folder}, epoch {warm.epoch}",
            hint="leave out --from to go on as it was started; --run names another folder",
        )


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights as they are written, names in order."""
    portable = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    return hashlib.sha256(save(portable)).hexdigest()


def describe_origin(origin: Mapping[str, Any]) -> list[str]:
    """Lines for the user: where the weights come from, and how each table grew."""
    lines = [
        f"weights of {origin['run']}, epoch {origin['epoch']}; the optimiser's moments start anew"
    ]
    if "val" in origin["fit_splits"]:
        lines.append(
            "warning: that run was fitted on validation rows too; where they are in this data, "
            "validation says more than is true"
        )
    for name, table in origin["tables"].items():
        lines.append(
            f"  {name}: {table['kept']:,} values kept, {table['new']:,} new, "
            f"{table['dropped']:,} dropped"
        )
    return lines


def _architecture(config: TrainingConfig) -> dict[str, Any]:
    """Dotted name -> value of what decides the shape and the meaning of the weights."""
    towers = {
        name: _tower_shape(tower)
        for name, tower in (("query", config.towers.query), ("item", config.towers.item))
    }
    both = {"dim": config.dim, "metric": config.metric}
    return dict(flattened(both | {"towers": towers | {"tied": config.towers.tied}}))


def _tower_shape(tower: TowerConfig) -> dict[str, Any]:
    settings = tower.model_dump(mode="json", exclude={"features", *FREE})
    return settings | {
        "features": {_name_of(feature): _feature_shape(feature) for feature in tower.features or ()}
    }


def _name_of(feature: FeatureConfig) -> str:
    return feature.kind if isinstance(feature, AudienceFeature) else feature.column


def _feature_shape(feature: FeatureConfig) -> dict[str, Any]:
    free = {"column", *FREE} | ({"max_length"} if feature.kind == "multi_valued" else set())
    return feature.model_dump(mode="json", exclude=free)


def _orders(config: TrainingConfig) -> dict[str, Sequence[str]]:
    return {
        f"towers.{name}.features": [_name_of(feature) for feature in tower.features or ()]
        for name, tower in (("query", config.towers.query), ("item", config.towers.item))
    }


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return str(settings[key]) if key in settings else "none"


def _carried_columns(columns: Columns, older: Columns, where: str) -> Columns:
    pairs = [
        *zip(columns.vocabularies, older.vocabularies, strict=True),
        *zip(columns.bags, older.bags, strict=True),
    ]
    for ours, theirs in pairs:
        if isinstance(ours, TextHash) or isinstance(theirs, TextHash):
            continue
        if ours.value_type != theirs.value_type:
            raise _another_column(where, ours.column, theirs.value_type, ours.value_type)
    return replace(
        columns,
        standardisers=tuple(
            _carried_scale(ours, theirs, where)
            for ours, theirs in zip(columns.standardisers, older.standardisers, strict=True)
        ),
    )


def _carried_scale(ours: Standardiser, theirs: Standardiser, where: str) -> Standardiser:
    shapes = [_number_kind(each) for each in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise _another_column(where, ours.column, *shapes)
    return replace(theirs, newest=ours.newest)


def _number_kind(scale: Standardiser) -> str:
    if scale.newest is not None:
        return "a timestamp"
    return f"a vector of {len(scale.mean)} numbers" if scale.vector else "a number"


def _another_column(where: str, column: str, expected: str, got: str) -> DataError:
    return DataError(
        "the column is not what the run to start from was trained on",
        field=f"{where}: {column}",
        expected=expected,
        got=got,
        hint="train without --from",
    )


def _rows_of(
    values: Sequence[Any], older: Sequence[Any]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], TableGrowth]:
    """(rows,) int64: the older row of each row of the new table, -1 for none; row 0 is unknown."""
    places = {value: place for place, value in enumerate(older, start=1)}
    found = [places.get(value, -1) for value in values]
    rows = np.array([0, *found], dtype=np.int64)
    kept = int(np.count_nonzero(rows > 0))
    return rows, TableGrowth(kept=kept, new=len(values) - kept, dropped=len(older) - kept)
