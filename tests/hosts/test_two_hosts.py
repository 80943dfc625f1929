"""Shardline on two hosts: start, queries from both, stop; a minute, so a part of `make test`."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.chaos.corpus import make_store
from tests.chaos.oracle import Corpus
from tests.hosts.launched import CHECKOUT, HTTP_PORT, Launched, wait_until
from tests.hosts.rig import STORE, Host, environment_folders, raised

K = 10


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    with raised(2, [*environment_folders(), CHECKOUT]) as rig:
        launched = Launched(rig)
        launched.up_by_ssh()
        yield launched


@pytest.fixture(scope="module")
def corpus(launched: Launched) -> Corpus:
    return make_store(launched.rig.store)


@pytest.mark.timeout(300)
def test_serve_query_from_both_hosts_down(launched: Launched, corpus: Corpus) -> None:
    said = launched.shardline(launched.head, "serve", timeout_s=200).stderr
    assert f"serving generation {corpus.generation} at" in said
    number = 7
    expected = nearest(corpus, number)
    for host in launched.rig.hosts:
        assert asked(launched, host, int(corpus.ids[number])) == expected, host.name
    assert sum(shards_on(host) for host in launched.rig.hosts) == len(corpus.rows)
    assert "stopped" in launched.shardline(launched.head, "down").stdout
    wait_until(
        lambda: not any(shards_on(host) for host in launched.rig.hosts),
        within_s=10,
        what="no shard left",
    )


def asked(launched: Launched, host: Host, item: int) -> list[int]:
    """The ids that `shardline query` answers with on that host."""
    where = f"--url http://{launched.head.address}:{HTTP_PORT} --key-file {STORE}/keys"
    done = launched.shardline(host, f"query {where} --item {item} -k {K} --json")
    answer = json.loads(done.stdout)
    assert answer["coverage"]["shards_answered"] == answer["coverage"]["shards_asked"]
    return [each["item_id"] for each in answer["results"]]


def nearest(corpus: Corpus, number: int) -> list[int]:
    """Ids of the items nearest to the corpus' item of that row, itself left out."""
    scores = corpus.vectors @ corpus.vectors[number]
    scores[number] = -np.inf
    best: list[int] = corpus.ids[np.argsort(-scores)[:K]].tolist()
    return best


def shards_on(host: Host) -> int:
    """How many processes hold a shard there."""
    return sum(words[0].startswith("ray::Shard") for words in host.processes().values())
