"""Deploys deploy/serve.yaml on a private Ray as ``serve deploy`` does; says how it went, as JSON.

    python -m tests.integration.deployed_by_serve STORE PORT

A process of its own, because the tests' process is attached to another Ray. First the file with a
generation that does not exist, then as it is, then once more with another limit of the router.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from shardline.cluster.config import load_config
from shardline.cluster.serving.deployment import shard_reports
from shardline.cluster.serving.front_end import APPLICATION
from shardline.cluster.serving.launched import ask_controller
from shardline.cluster.serving.ray_session import NAMESPACE, local_ray
from shardline.cluster.serving.serving_keys import serving_keys
from shardline.cluster.serving.stopping import stop_serving
from shardline.router.client.sync_client import Client
from shardline.router.serve.environment import write_launcher
from shardline.shards.core.errors import ShardlineError

FILE = Path(__file__).parents[2] / "deploy" / "serve.yaml"
WITHIN_S = 60.0
K = 5


def main(store: str, port: int) -> dict[str, Any]:
    overrides = [f"store={store}", f"cluster.http_port={port}", "cluster.address=auto"]
    config = load_config(None, overrides)
    content = yaml.safe_load(FILE.read_text())
    content["proxy_location"] = "HeadOnly"
    content["http_options"] = {"host": "127.0.0.1", "port": port}
    arguments: dict[str, Any] = {"overrides": overrides}
    content["applications"][0]["args"] = arguments
    found: dict[str, Any] = {}
    with local_ray(num_cpus=4):
        write_launcher(config.router, insecure=False, address="127.0.0.1")
        serve.start(proxy_location="HeadOnly", http_options=content["http_options"])

        arguments["generation"] = 99
        found["refused"] = deploy(content)
        found["left"] = shard_actors()
        del arguments["generation"]
        found["deployed"] = deploy(content)
        found["controllers"] = [name for name in named() if name == "shardline-controller"]
        with Client(f"http://127.0.0.1:{port}", key=serving_keys(config).own) as client:
            found["ids"] = first_answer(client)
        before = shard_reports()
        overrides.append("router.max_in_flight=7")
        found["again"] = deploy(content)
        found["same_shards"] = [r["pid"] for r in shard_reports()] == [r["pid"] for r in before]
        found["cluster_id"] = ask_controller().report["cluster_id"]
        found["stopped"] = stop_serving()
        found["after"] = [*named(), *shard_actors()]
    return found


def deploy(content: dict[str, Any]) -> dict[str, str]:
    """The state of the application once it runs, or has failed."""
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(content))
    time.sleep(0.5)  # until then it may be the state of the deployment before
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        told = serve.status().applications.get(APPLICATION)
        ends = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOY_FAILED)
        if told is not None and told.status in ends:
            break
        time.sleep(0.1)
    return {"status": str(told.status.value), "message": told.message} if told else {}


def first_answer(client: Client) -> list[int]:
    """The items most similar to the first, once the router is connected to every shard."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            found: list[int] = client.search(item_ids=[0], k=K).ids[0].tolist()
            return found
        except ShardlineError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def named() -> list[str]:
    every = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in every if each["namespace"] == NAMESPACE]


def shard_actors() -> list[str]:
    return [name for name in named() if name.startswith("shardline-shard-")]


if __name__ == "__main__":
    found = main(sys.argv[1], int(sys.argv[2]))
    sys.stdout.write(f"{json.dumps(found)}\n")
