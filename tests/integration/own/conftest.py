"""A Ray of the module's own, which serves nothing; and the order of the modules, which run three at
a time, for each of them waits a lot: the longest first, so that none is left alone at the end."""

from collections.abc import Iterator

import pytest

from shardline.cluster.serving.ray_session import local_ray

LONGEST = (
    "test_ray_train_killed",
    "test_cli",
    "test_every_type",
    "test_application",
    "test_one_at_a_time",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    with local_ray(num_cpus=4, in_flight=None):
        yield
