"""The settings a run begins with, by the shape of its data."""

from pathlib import Path

import pytest
import yaml

from shardline.shards.core.errors import ConfigError
from shardline.training.config.training_config import TrainingConfig, differences
from shardline.training.search.shape_defaults import (
    IDS_DIM,
    MOST_USER_VECTORS,
    DataShape,
    default_for,
    shape_of,
    with_default,
    with_settings_of,
)
from tests.tiny import NUM_ITEMS, NUM_USERS, PER_USER, tiny_dataset

CONFIGS = Path(__file__).parents[2] / "bench" / "configs"
GOWALLA = DataShape(
    users=29_858, items=40_981, interactions=720_554, user_features=0, item_features=0
)


def test_ids_alone_get_the_settings_that_were_chosen_on_gowalla() -> None:
    text = (CONFIGS / "gowalla.yaml").read_text().replace("dim: 64", f"dim: {IDS_DIM}")
    known = yaml.safe_load(text)["training"]
    ours = TrainingConfig.model_validate(default_for(GOWALLA))
    changed = differences(ours.identity(), TrainingConfig.model_validate(known).identity())
    assert changed == ["validation.every_epochs: 1, was 3"]


@pytest.mark.parametrize("interactions", [8, 100, 5000, 80_000, 3_000_000, 200_000_000])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_batch_fits_the_data_and_epochs_stay_in_bounds(interactions: int, ranks: int) -> None:
    for features in (0, 2):
        shape = DataShape(
            users=1000,
            items=1000,
            interactions=interactions,
            user_features=features,
            item_features=0,
        )
        given = {"num_workers": ranks}
        config = TrainingConfig.model_validate(default_for(shape, ranks) | given)
        assert config.batch_size <= max(2048, ranks)
        assert config.batch_size <= max(interactions // 8, 2 * ranks)
        assert 8 <= config.epochs <= 40


def test_features_decide_by_density_and_many_users_get_no_vectors() -> None:
    dense = DataShape(users=943, items=1682, interactions=81_000, user_features=3, item_features=4)
    config = TrainingConfig.model_validate(default_for(dense))
    assert (config.towers.query.hidden, config.loss.temperature) == ((), 0.2)
    assert config.towers.query.features is None  # inferred from the columns
    sparse = DataShape(
        users=100_000, items=1_000_000, interactions=10_000_000, user_features=3, item_features=4
    )
    assert default_for(sparse) == {"batch_size": 2048}
    many = DataShape(
        users=MOST_USER_VECTORS + 1,
        items=1000,
        interactions=5_000_000,
        user_features=0,
        item_features=0,
    )
    features = TrainingConfig.model_validate(default_for(many)).towers.query.features or ()
    assert [feature.kind for feature in features] == ["history"]


def test_keys_that_were_given_stay_and_a_given_model_is_left_alone() -> None:
    given = TrainingConfig.model_validate({"epochs": 3, "validation": {"k": 7}, "batch_size": 99})
    config = with_default(given, GOWALLA)
    assert (config.epochs, config.validation.k, config.batch_size) == (3, 7, 99)
    assert (config.validation.max_users, config.loss.kind) == (10_000, "bsl")
    for model in (
        {"dim": 32},
        {"metric": "dot"},
        {"loss": {"temperature": 0.1}},
        {"optimiser": {}},
    ):
        own = TrainingConfig.model_validate(model)
        assert with_default(own, GOWALLA) is own


def test_the_shape_counts_train_alone(tmp_path: Path) -> None:
    shape = shape_of(tiny_dataset(tmp_path / "data"))
    assert shape == DataShape(
        users=NUM_USERS,
        items=NUM_ITEMS,
        interactions=NUM_USERS * (PER_USER - 2),
        user_features=3,
        item_features=3,
    )
    assert not shape.ids_alone
    assert shape.density == pytest.approx((PER_USER - 2) / NUM_ITEMS)


def test_epochs_follow_a_batch_size_that_was_given() -> None:
    given = ({"batch_size": 1024}, {}, {"batch_size": 8192})
    found = [with_default(TrainingConfig.model_validate(each), GOWALLA).epochs for each in given]
    assert found == [8, 12, 40]


def test_weights_of_interactions_go_with_the_default() -> None:
    given = TrainingConfig.model_validate({"loss": {"weight_exponent": 0.5}})
    config = with_default(given, GOWALLA)
    assert (config.loss.weight_exponent, config.loss.kind, config.dim) == (0.5, "bsl", IDS_DIM)


def test_what_is_left_out_is_as_in_another_run() -> None:
    older = with_default(TrainingConfig(), GOWALLA)
    given = TrainingConfig.model_validate({"optimiser": {"learning_rate": 0.0007}, "epochs": 1})
    warm = with_settings_of(given, older, whole=False)
    assert (warm.loss, warm.towers, warm.dim) == (older.loss, older.towers, older.dim)
    assert warm.optimiser == older.optimiser.model_copy(update={"learning_rate": 0.0007})
    assert (warm.epochs, warm.batch_size) == (1, TrainingConfig().batch_size), "its own schedule"
    again = with_settings_of(TrainingConfig(), older, whole=True)
    assert again == older, "a run that is resumed with nothing said"
    symmetric = TrainingConfig.model_validate({"loss": {"symmetric": 0.3}})
    bsl = TrainingConfig.model_validate({"loss": {"kind": "bsl"}})
    with pytest.raises(ConfigError, match="does not go with"):
        with_settings_of(bsl, symmetric, whole=False)
