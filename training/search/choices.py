"""The search space: other values of a configuration's settings, and configurations made of them.

Every setting is one or a few keys of ``training.config``; its values lie around the base's own, or
on a short ladder. A candidate is a mapping from settings to labels, {"temperature": "0.04"}; {} is
the base. Combinations that the configuration refuses are no candidates. Kind sigmoid is left out:
its temperature and learning rate have other ranges.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from shardline.training.config.training_config import TrainingConfig

Changes = Mapping[str, str]  # setting -> label
Change = Callable[[dict[str, Any]], None]  # on the dump of a TrainingConfig, in place

TEMPERATURES = (0.5, 0.7, 1.4, 2.0)  # factors
RATES = (0.3, 0.5, 2.0, 3.0)  # factors
EPOCHS = (0.5, 2.0)  # factors
STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)
EXPONENTS = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2)
BSL_WEIGHTS = (1.1, 1.22, 1.4)
TABLE_DECAYS = (0.0, 0.01, 0.1, 0.3, 0.5, 0.8)
MATRIX_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
UNIFORM, MINED = 1024, 5  # items per step; items per row
DIMS = (32, 64, 128, 256)
LAYERS: tuple[tuple[int, ...], ...] = ((), (128,), (256, 128))


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of one setting, and how it enters a configuration."""

    setting: str
    label: str
    change: Change


class SearchSpace:
    """The alternatives to one configuration whose features are named.

    ``sizes``: the dimension and the layers too.
    """

    def __init__(self, base: TrainingConfig, *, num_items: int, sizes: bool = False) -> None:
        self.base = base
        offered = [*_loss(base, num_items), *_features(base), *_optimiser(base)]
        if sizes:
            offered += _sizes(base)
        self._choices: dict[str, dict[str, Choice]] = {}
        for choice in offered:
            self._choices.setdefault(choice.setting, {})[choice.label] = choice
        for setting, values in list(self._choices.items()):
            kept = {label: c for label, c in values.items() if self._differs({setting: label})}
            self._choices[setting] = kept
            if not kept:
                del self._choices[setting]

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        """The labels of each setting's alternatives, settings in the order they are tried."""
        return {setting: tuple(values) for setting, values in self._choices.items()}

    def config(self, changes: Changes) -> TrainingConfig | None:
        """The base with the changes made; None where the configuration refuses them together."""
        dump = copy.deepcopy(self.base.model_dump())
        for setting, values in self._choices.items():  # one order, whatever that of the mapping
            if setting in changes:
                values[changes[setting]].change(dump)
        try:
            return TrainingConfig.model_validate(dump)
        except ValidationError:
            return None

    def _differs(self, changes: Changes) -> bool:
        config = self.config(changes)
        return config is not None and _trained(config) != _trained(self.base)


def _trained(config: TrainingConfig) -> dict[str, Any]:
    """What decides the weights; a strategy is but a name of other settings."""
    named = config.identity()
    return named | {"loss": {**named["loss"], "strategy": None}}


def describe(changes: Changes) -> str:
    """As text for people: "temperature 0.04, epochs 24"; "the default" for no changes."""
    text = ", ".join(f"{setting} {label}" for setting, label in changes.items())
    return text or "the default"


def _set(setting: str, label: str, values: Mapping[str, Any]) -> Choice:
    """A choice that sets keys by their dotted paths."""

    def change(dump: dict[str, Any]) -> None:
        for path, value in values.items():
            *sections, key = path.split(".")
            place = dump
            for section in sections:
                place = place[section]
            place[key] = value

    return Choice(setting, label, change)


def _numbers(setting: str, path: str, values: Iterable[float]) -> list[Choice]:
    return [_set(setting, f"{value:.3g}", {path: float(f"{value:.3g}")}) for value in values]


def _loss(base: TrainingConfig, num_items: int) -> list[Choice]:
    loss = base.loss
    found = _numbers(
        "temperature", "loss.temperature", (loss.temperature * factor for factor in TEMPERATURES)
    )
    if loss.learn_temperature:
        found.append(_set("temperature", "fixed", {"loss.learn_temperature": False}))
    bare: dict[str, Any] = {"loss.symmetric": 0.0, "loss.batch_hard": 0}  # parts of infonce alone
    if loss.strategy == "batch-hard":
        bare["loss.strategy"] = "in-batch"
    found += [
        _set("loss", f"bsl {w:g}", {"loss.kind": "bsl", "loss.bsl_negative_weight": w, **bare})
        for w in BSL_WEIGHTS
    ]
    found.append(_set("loss", "infonce", {"loss.kind": "infonce"}))
    found += _rates(base)
    found += _numbers("popularity exponent", "popularity_exponent", EXPONENTS)
    found += [
        _set("logq", "none", {"loss.logq": "none", "loss.logq_strength": 1.0}),
        _set("logq", "standard", {"loss.logq": "standard"}),
        _set("logq", "expected count", {"loss.logq": "expected_count"}),
    ]
    if loss.logq != "none":
        found += _numbers("logq strength", "loss.logq_strength", STRENGTHS)
    uniform = min(UNIFORM, num_items // 2) // base.num_workers * base.num_workers
    if uniform:
        found.append(_set("negatives", f"uniform {uniform}", {"loss.uniform_negatives": uniform}))
    mined = {"loss.hard_negatives": MINED, "mining.every_epochs": 1}
    found.append(_set("negatives", f"mined {MINED}", mined))
    if loss.in_batch:
        none = {
            "loss.uniform_negatives": 0,
            "loss.random_negatives": 0,
            "loss.hard_negatives": 0,
            "loss.batch_hard": 0,
            "mining.every_epochs": 0,
        }
        found.append(_set("negatives", "in-batch", {**none, "loss.strategy": "in-batch"}))
    return found


def _rates(base: TrainingConfig) -> list[Choice]:
    """The learning rate, that of embeddings with it, and the decay of embeddings."""
    optimiser, found = base.optimiser, []
    for factor in RATES:
        values = {"optimiser.learning_rate": float(f"{optimiser.learning_rate * factor:.3g}")}
        if optimiser.embedding_learning_rate is not None:
            own = float(f"{optimiser.embedding_learning_rate * factor:.3g}")
            values["optimiser.embedding_learning_rate"] = own
        found.append(_set("learning rate", f"{optimiser.learning_rate * factor:.3g}", values))
    decay = "optimiser.embedding_weight_decay"
    return found + _numbers("embedding decay", decay, TABLE_DECAYS)


def _optimiser(base: TrainingConfig) -> list[Choice]:
    found = []
    for factor in EPOCHS:
        epochs = max(1, round(base.epochs * factor))
        found.append(_set("epochs", str(epochs), {"epochs": epochs}))
    if any(tower.projection == "linear" for tower in (base.towers.query, base.towers.item)):
        found += _numbers("weight decay", "optimiser.weight_decay", MATRIX_DECAYS)
    return found


def _features(base: TrainingConfig) -> list[Choice]:
    """Whether an example's own item stays in its history: of sums of ids without layers alone."""
    query = base.towers.query
    features = query.features or ()
    places = [i for i, feature in enumerate(features) if feature.kind == "history"]
    if not places or query.hidden or query.projection != "identity":
        return []

    def keeping(kept: bool) -> Change:
        def change(dump: dict[str, Any]) -> None:
            dump["towers"]["query"]["features"][places[0]]["keep_target"] = kept

        return change

    return [
        Choice("own item", "kept", keeping(True)),
        Choice("own item", "left out", keeping(False)),
    ]


def _sizes(base: TrainingConfig) -> list[Choice]:
    def width(dim: int) -> Change:
        def change(dump: dict[str, Any]) -> None:
            dump["dim"] = dim
            for tower in (dump["towers"]["query"], dump["towers"]["item"]):
                # the inputs of a tower without weights are as wide as its output
                wide = tower["projection"] == "identity"
                for feature in (tower["features"] or ()) if wide else ():
                    if "dim" in feature:
                        feature["dim"] = dim

        return change

    found = [Choice("dim", str(dim), width(dim)) for dim in DIMS]
    towers = (("query", base.towers.query), ("item", base.towers.item))
    linear = [name for name, tower in towers if tower.projection == "linear"]
    for layers in LAYERS if linear else ():
        label = " ".join(map(str, layers)) or "none"
        values = {f"towers.{name}.hidden": layers for name in linear}
        found.append(_set("layers", label, values))
    return found
