"""deploy/kuberay: complete, of one piece, and of one mind with the rest of deploy/.

Its RayService has been held against the schemas of KubeRay 1.6 and 1.7 (docs/DEPLOY.md).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from shardline.cluster.config import ShardlineConfig, load_config
from shardline.cluster.control.hosts import Host, fits
from shardline.cluster.serving.application import ServeArguments, build
from shardline.router.serve.environment import HEAD, launched_environment, limits_of
from tests.dockerfile import DOCKERFILE, ROOT, read_steps, steps_of

FOLDER = ROOT / "deploy" / "kuberay"
PATHS = (FOLDER / "store.yaml", FOLDER / "shardline.yaml")
REQUIRED = {"apiVersion", "kind", "metadata"}
HOME = "/home/shardline"
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


@pytest.fixture(scope="module")
def parts() -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    every = [part for path in PATHS for part in yaml.safe_load_all(path.read_text())]
    named = {(part["kind"], part["metadata"]["name"]): part for part in every}
    assert len(named) == len(every)
    return named


@pytest.fixture(scope="module")
def service(parts: dict) -> dict[str, Any]:
    spec: dict[str, Any] = parts["RayService", "shardline"]["spec"]
    return spec


@pytest.fixture(scope="module")
def pods(service: dict) -> dict[str, dict[str, Any]]:
    """The pod templates of the head and of the one group of workers."""
    cluster = service["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"], "shards": group["template"]}


@pytest.fixture(scope="module")
def loader(parts: dict) -> dict[str, Any]:
    """The pod that fills the store."""
    pod: dict[str, Any] = parts["Pod", "shardline-loader"]
    return pod


@pytest.fixture(scope="module")
def config(parts: dict, tmp_path_factory: pytest.TempPathFactory) -> ShardlineConfig:
    path = tmp_path_factory.mktemp("config") / "cluster-config.yaml"
    path.write_text(parts["ConfigMap", "shardline-config"]["data"]["cluster-config.yaml"])
    return load_config(path)


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return dict(container)


def test_every_part_says_what_it_is(parts: dict) -> None:
    kinds = [(part["apiVersion"], part["kind"]) for part in parts.values()]
    assert sorted(set(kinds)) == [
        ("networking.k8s.io/v1", "NetworkPolicy"),
        ("ray.io/v1", "RayService"),
        ("v1", "ConfigMap"),
        ("v1", "PersistentVolumeClaim"),
        ("v1", "Pod"),
    ]
    for (kind, _), part in parts.items():
        assert part.keys() >= REQUIRED
        # the network policy is about the pods of the cluster, and not about the loader
        assert part["metadata"].get("labels") == (None if kind == "Pod" else {"app": "shardline"})
        assert "namespace" not in part["metadata"]  # the one it is applied in


def test_no_secret_is_in_the_file(service: dict) -> None:
    assert sorted(FOLDER.glob("*.yaml")) == sorted(PATHS)
    assert [path for path in PATHS if "kind: Secret" in path.read_text()] == []
    assert service["rayClusterConfig"]["authOptions"] == {
        "mode": "token",
        "secretName": "shardline-ray",
    }
    assert "create secret generic shardline-ray --from-literal=auth_token=" in PATHS[1].read_text()


def test_what_ray_finds_in_its_environment_is_the_table(parts: dict, pods: dict) -> None:
    common = parts["ConfigMap", "shardline-environment"]["data"]
    assert common == launched_environment(HOME, head=False)
    for pod in pods.values():
        assert container_of(pod)["envFrom"] == [{"configMapRef": {"name": "shardline-environment"}}]
    own = {each["name"]: each["value"] for each in container_of(pods["head"])["env"]}
    assert common | own == launched_environment(HOME, head=True)
    assert own.keys() == {variable.name for variable in HEAD}
    assert "env" not in container_of(pods["shards"])


def test_what_it_refers_to_is_in_the_files(parts: dict, pods: dict, loader: dict) -> None:
    for pod in (*pods.values(), loader):
        mounted = {each["name"] for each in container_of(pod)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
        for kind, name in referred(pod["spec"]["volumes"]):
            assert (kind, name) in parts
    claims = {name: part for (kind, name), part in parts.items() if kind.startswith("Persistent")}
    assert claims["shardline-store"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert all(claim["spec"]["storageClassName"] for claim in claims.values())


def referred(volumes: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for volume in volumes:
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        else:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]


def test_paths_are_those_of_the_image_and_of_the_configuration(
    parts: dict, pods: dict, loader: dict, config: ShardlineConfig
) -> None:
    (folder,) = steps_of(read_steps(DOCKERFILE.read_text()), "WORKDIR")
    assert folder.text == f"{HOME}/shardline"
    binary = parts["ConfigMap", "shardline-environment"]["data"]["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert (ROOT / Path(binary).relative_to(folder.text)).is_file()
    assert mounts(container_of(loader)) == {"store": str(config.store)}
    paths = {name: mounts(container_of(pod)) for name, pod in pods.items()}
    for each in paths.values():
        assert each["store"] == str(config.store)
        assert each["config"] == "/etc/shardline"
    assert paths["head"]["gcs"] == launched_environment(HOME, head=True)["RAY_gcs_storage_path"]


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["mountPath"] for each in container["volumeMounts"]}


def test_serve_accepts_its_part_and_finds_the_builder(
    parts: dict, service: dict, config: ShardlineConfig
) -> None:
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    assert deployed.http_options.port == config.cluster.http_port
    assert deployed.http_options.host == config.cluster.http_host
    (application,) = deployed.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    arguments = ServeArguments.model_validate(application.args)
    mounted = Path("/etc/shardline")
    assert arguments.config is not None
    assert arguments.config.parent == mounted
    assert arguments.config.name in parts["ConfigMap", "shardline-config"]["data"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert arguments.hosts == group["replicas"]  # each gets a router, also one that joins late


def test_serves_own_file_is_the_same_application(service: dict) -> None:
    file = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(file)
    ours, theirs = yaml.safe_load(service["serveConfigV2"]), file
    assert ours["http_options"] == theirs["http_options"]
    assert ours["proxy_location"] == theirs["proxy_location"]
    for name in ("name", "route_prefix", "import_path"):
        assert ours["applications"][0][name] == theirs["applications"][0][name]
    ServeArguments.model_validate(theirs["applications"][0]["args"])


def test_haproxy_has_the_figures_of_the_configuration(config: ShardlineConfig) -> None:
    """deploy/ray/haproxy.sh, in the image, has those of a configuration that sets none."""
    usual = load_config(ROOT / "deploy" / "ray" / "cluster-config.yaml")
    assert limits_of(config.router, insecure=config.cluster.insecure) == limits_of(
        usual.router, insecure=usual.cluster.insecure
    )


@pytest.mark.parametrize("away", [0, 1])
def test_the_shards_fit_the_workers_also_when_one_is_away(
    service: dict, pods: dict, config: ShardlineConfig, away: int
) -> None:
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert service["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    resources = container_of(pods["shards"])["resources"]
    assert resources["requests"] == resources["limits"]  # Ray takes its CPUs from the limit
    cpus, cluster = float(resources["limits"]["cpu"]), config.cluster
    names = [f"worker{number}" for number in range(group["replicas"] - away)]
    workers = [Host(node_id=name, address=name, cpus=cpus) for name in names]
    asked = {"shards": cluster.shards, "replicas": cluster.replicas}
    assert fits(workers, **asked, cpus_per_shard=cluster.cpus_per_shard, gpus_per_shard=0) is None


def test_one_worker_and_so_one_router_per_node(pods: dict) -> None:
    affinity = pods["shards"]["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert (
        rule["labelSelector"]["matchLabels"].items() <= pods["shards"]["metadata"]["labels"].items()
    )
    assert (
        not rule["labelSelector"]["matchLabels"].items()
        <= pods["head"]["metadata"]["labels"].items()
    )


def test_a_pod_gets_requests_when_its_router_is_ready(
    service: dict, pods: dict, config: ShardlineConfig
) -> None:
    container = container_of(pods["shards"])
    (port,) = container["ports"]
    assert port == {"name": "serve", "containerPort": config.cluster.http_port}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    assert service["excludeHeadPodFromServeSvc"]
    assert service["upgradeStrategy"] == {"type": "None"}


def test_ports_are_open_to_those_alone_who_need_them(
    parts: dict, pods: dict, config: ShardlineConfig
) -> None:
    policy = parts["NetworkPolicy", "shardline"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    selected = policy["podSelector"]["matchLabels"]
    for pod in pods.values():
        assert selected.items() <= pod["metadata"]["labels"].items()
    each_other, clients, operator = policy["ingress"]
    assert each_other == {"from": [{"podSelector": {"matchLabels": selected}}]}
    assert [port["port"] for port in clients["ports"]] == [config.cluster.http_port]
    assert all("namespaceSelector" not in source for source in clients["from"])
    (source,) = operator["from"]
    assert source["podSelector"] == {"matchLabels": OPERATOR}
    assert 6379 not in [port["port"] for port in operator["ports"]]


def test_pods_run_as_the_user_of_the_image_and_can_become_no_other(
    pods: dict, loader: dict
) -> None:
    (user,) = steps_of(read_steps(DOCKERFILE.read_text()), "USER")
    for pod in (*pods.values(), loader):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user.text
        assert context["fsGroup"] == context["runAsGroup"]
        assert context["fsGroupChangePolicy"] == "OnRootMismatch"
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert container_of(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


def test_versions_are_those_of_the_tested_environment(
    service: dict, pods: dict, loader: dict
) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert service["rayClusterConfig"]["rayVersion"] == pins["ray"]
    images = {container_of(pod)["image"] for pod in (*pods.values(), loader)}
    assert len(images) == 1
