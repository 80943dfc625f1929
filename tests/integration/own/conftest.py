"""A Ray of the module's own, which serves nothing."""

from collections.abc import Iterator

import pytest

from shardline.cluster.serving.ray_session import local_ray


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    with local_ray(num_cpus=4, in_flight=None):
        yield
