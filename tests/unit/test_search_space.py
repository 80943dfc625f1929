"""Which values a search tries, and configurations made of them."""

import numpy as np
import pytest

from shardline.training.config.training_config import TrainingConfig, differences
from shardline.training.search.choices import SearchSpace, describe
from shardline.training.search.proposals import first_candidates, next_candidates
from shardline.training.search.shape_defaults import DataShape, default_for
from shardline.training.search.worth import Worth, as_key, best_together, worths
from tests.tiny import tiny_config

IDS = DataShape(users=3000, items=2000, interactions=90_000, user_features=0, item_features=0)


def ids_config() -> TrainingConfig:
    return TrainingConfig.model_validate(default_for(IDS))


@pytest.mark.parametrize("base", [ids_config(), tiny_config()], ids=["ids alone", "features"])
def test_every_choice_is_a_configuration_that_differs_from_the_base(base: TrainingConfig) -> None:
    space = SearchSpace(base, num_items=2000, sizes=True)
    assert {"temperature", "loss", "logq strength", "popularity exponent", "negatives"} <= set(
        space.settings
    )
    assert {"learning rate", "embedding decay", "epochs", "dim"} <= set(space.settings)
    for setting, labels in space.settings.items():
        assert len(set(labels)) == len(labels)
        for label in labels:
            config = space.config({setting: label})
            assert config is not None
            assert differences(config.identity(), base.identity())
    assert space.config({}) == base


def test_the_values_are_around_the_base_and_those_that_mean_nothing_are_left_out() -> None:
    base = ids_config()
    space = SearchSpace(base, num_items=2000)
    assert space.settings["temperature"] == ("0.04", "0.056", "0.112", "0.16")
    assert space.settings["own item"] == ("left out",)
    assert space.settings["loss"] == ("bsl 1.1", "bsl 1.4", "infonce")
    assert space.settings["negatives"] == ("uniform 1000", "mined 5")
    assert not {"dim", "layers", "weight decay"} & set(space.settings)
    config = space.config({"own item": "left out", "temperature": "0.04"})
    assert config is not None
    assert differences(config.identity(), base.identity()) == [
        "loss.temperature: 0.04, was 0.08",
        *[each for each in differences(config.identity(), base.identity()) if "features" in each],
    ]
    towers = SearchSpace(tiny_config(), num_items=60).settings
    assert "own item" not in towers and "weight decay" in towers


def test_a_dimension_goes_for_the_inputs_of_a_sum_too() -> None:
    space = SearchSpace(ids_config(), num_items=2000, sizes=True)
    assert space.base.dim != 256
    config = space.config({"dim": "256"})
    assert config is not None and config.dim == 256
    assert config.towers.item.features is not None
    assert getattr(config.towers.item.features[0], "dim", 0) == 256
    assert "layers" not in space.settings
    layers = SearchSpace(tiny_config(), num_items=60, sizes=True)
    deep = layers.config({"layers": "256 128"})
    assert deep is not None and deep.towers.item.hidden == (256, 128)


def test_what_the_configuration_refuses_together_is_no_candidate() -> None:
    space = SearchSpace(ids_config(), num_items=2000)
    assert space.config({"logq": "none"}) is not None
    assert space.config({"logq": "none", "logq strength": "0.5"}) is None
    symmetric = tiny_config(loss={"symmetric": 0.3})
    found = SearchSpace(symmetric, num_items=60).config({"loss": "bsl 1.22"})
    assert found is not None and found.loss.symmetric == 0


def test_first_candidates_change_one_setting_each_and_every_setting_before_any_twice() -> None:
    space = SearchSpace(ids_config(), num_items=2000)
    settings = list(space.settings)
    found = first_candidates(space, len(settings) + 4, seed=1)
    assert found[0] == {}
    assert [next(iter(each)) for each in found[1 : len(settings) + 1]] == settings
    assert all(len(each) == 1 for each in found[1:])
    assert len({as_key(each) for each in found}) == len(found)
    assert found == first_candidates(space, len(settings) + 4, seed=1)
    assert found != first_candidates(space, len(settings) + 4, seed=2)


def test_next_candidates_combine_what_paid_and_repeat_nothing() -> None:
    space = SearchSpace(ids_config(), num_items=2000)
    paid = [
        Worth("temperature", "0.04", 1, 0.02),
        Worth("epochs", "23", 1, 0.01),
        Worth("loss", "infonce", 1, -0.1),
    ]
    label = space.settings["epochs"][0]
    paid[1] = Worth("epochs", label, 1, 0.01)
    tried = [{}, {"temperature": "0.04"}, {"epochs": label}]
    found = next_candidates(
        space, 8, seed=0, bracket=1, tried=tried, incumbent={"temperature": "0.04"}, found=paid
    )
    assert found[0] == {"temperature": "0.04", "epochs": label}
    assert len(found) == 8
    keys = [as_key(each) for each in [*tried, *found]]
    assert len(set(keys)) == len(keys)
    assert all(space.config(each) is not None for each in found)


def test_where_single_changes_are_used_up_two_are_made() -> None:
    space = SearchSpace(ids_config(), num_items=2000)
    tried = [{}, *({s: label} for s, labels in space.settings.items() for label in labels)]
    found = next_candidates(space, 3, seed=0, bracket=1, tried=tried, incumbent={}, found=[])
    assert [len(each) for each in found] == [2, 2, 2]


def test_effects_of_an_additive_model_are_found() -> None:
    rng = np.random.default_rng(0)
    true = {("a", "1"): 0.05, ("a", "2"): -0.02, ("b", "1"): 0.01, ("c", "1"): 0.0}
    trials = [({}, 0.3)]
    for _ in range(200):
        changes = dict(
            choice for choice in rng.permutation(list(true)).tolist() if rng.random() < 0.6
        )
        gain = sum(true[choice] for choice in changes.items())
        trials.append((changes, 0.3 + gain))
    found = {(worth.setting, worth.label): worth.effect for worth in worths(trials)}
    assert found == pytest.approx(true, abs=1e-3)
    assert best_together(worths(trials)) == {
        "a": "1",
        "b": "1",
        **({"c": "1"} if found["c", "1"] > 0 else {}),
    }
    assert worths([({}, 0.3)]) == []


def test_changes_are_described() -> None:
    assert describe({}) == "the default"
    assert describe({"temperature": "0.04", "epochs": "24"}) == "temperature 0.04, epochs 24"


def test_tied_towers_and_metric_dot_get_only_what_they_take() -> None:
    item = {"features": [{"kind": "id", "column": "item_id", "dim": 8}], "hidden": [16]}
    tied = TrainingConfig.model_validate({"dim": 16, "towers": {"tied": True, "item": item}})
    space = SearchSpace(tied, num_items=60, sizes=True)
    assert "popularity exponent" not in space.settings and "temperature" in space.settings
    deep = space.config({"layers": "256 128", "dim": "32"})
    assert deep is not None and deep.towers.query.hidden == deep.towers.item.hidden == (256, 128)
    dot = SearchSpace(TrainingConfig.model_validate({"metric": "dot"}), num_items=60)
    assert "popularity exponent" not in dot.settings
    assert set(dot.settings["temperature"]) == {"0.5", "0.7"}
