"""The application builder, as Ray Serve's own `serve deploy` calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from shardline.cluster.build import build_generation
from shardline.cluster.serving.ray_session import free_port
from shardline.cluster.store import Store
from tests.engine import plan_of, write_set
from tests.integration.deployed_by_serve import K


def test_serve_deploys_the_file_and_what_runs_already_stays(tmp_path: Path) -> None:
    vectors = np.random.default_rng(4).standard_normal((300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = Store(tmp_path / "store")
    embeddings = write_set(store.embeddings / "m1", vectors)
    manifest = build_generation(store, embeddings.folder, plan_of(2, kind="flat"))
    store.set_current(manifest.generation)

    module = "tests.integration.deployed_by_serve"
    done = subprocess.run(
        [sys.executable, "-m", module, str(store.root), str(free_port())],
        capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["refused"]["status"] == "DEPLOY_FAILED"
    assert "controller and shards did not start; got " in found["refused"]["message"]
    assert "generation 99" in found["refused"]["message"]
    assert found["left"] == []
    assert found["deployed"]["status"] == "RUNNING", found["deployed"]
    assert found["controllers"] == ["shardline-controller"]
    order = np.argsort(-(vectors @ vectors[0]))
    assert found["ids"] == order[1 : K + 1].tolist()  # not the item itself
    assert found["again"]["status"] == "RUNNING", found["again"]
    assert found["same_shards"]
    assert len(found["cluster_id"]) == 16
    assert found["stopped"]
    assert found["after"] == []
