"""Ray Serve is asked to deploy before all hosts have joined, as under KubeRay."""

import time
from collections.abc import Iterator

import pytest
import yaml

from tests.chaos.corpus import make_store
from tests.hosts.launched import CHECKOUT, CONFIG, SETTINGS, Launched, wait_until
from tests.hosts.rig import environment_folders, raised

SETTINGS_OF_RUN = [*SETTINGS, "cluster.replicas=2"]
ALONE_S = 15.0  # the head has room for a replica of each shard, and nobody comes for so long


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    with raised(2, [*environment_folders(), CHECKOUT]) as rig:
        launched = Launched(rig)
        launched.set_up_by_ssh()
        make_store(rig.store)
        yield launched


@pytest.mark.timeout(300)
def test_a_deployment_waits_for_the_hosts_that_are_still_to_come(launched: Launched) -> None:
    head, late = launched.rig.hosts
    file = yaml.safe_load((CHECKOUT / "deploy" / "serve.yaml").read_text())
    arguments = file["applications"][0]["args"]
    arguments |= {"config": f"~/shardline/{CONFIG}", "overrides": SETTINGS_OF_RUN, "hosts": 2}
    (head.home / "serve.yaml").write_text(yaml.safe_dump(file))

    launched.start_head()
    head.run("cd ~/shardline && serve run --non-blocking ~/serve.yaml", timeout_s=120)
    wait_until(
        lambda: any("shardline.cluster.serving.application" in w for w in words_on(launched)),
        within_s=60,
        what="Serve runs the builder",
    )
    time.sleep(ALONE_S)
    assert not any(word.startswith("ray::Shard") for word in words_on(launched))

    launched.join(late)
    wait_until(
        lambda: launched.is_whole(late), within_s=90, what="two routers, two replicas of each shard"
    )
    assert "stopped" in launched.shardline(head, "down").stdout


def words_on(launched: Launched) -> list[str]:
    """Words of the command lines of all processes of the head."""
    return [word for words in launched.head.processes().values() for word in words]
