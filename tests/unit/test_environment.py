"""The table of environment variables: each known to the Ray installed, and held by a test."""

import inspect
import os
import sys
from pathlib import Path

import pytest
import ray

from shardline.cluster.serving import ray_session
from shardline.router.router_config import RouterConfig
from shardline.router.serve.environment import (
    HEAD,
    LAUNCHED,
    PORT,
    PRIVATE,
    SERVING,
    Variable,
    launched_environment,
    private_environment,
    serving_environment,
    write_launcher,
)
from shardline.router.serve.haproxy import Limits
from shardline.router.serve.haproxy_start import BINARY

RAY = Path(ray.__file__).parent
EVERY = (*SERVING, *PRIVATE, *LAUNCHED, *HEAD)


@pytest.fixture(scope="module")
def sources() -> str:
    """What of Ray reads environment variables: its Python, and the names in its libraries."""
    python = [
        *RAY.glob("serve/_private/*.py"),
        *RAY.glob("_private/*.py"),
        *RAY.glob("_common/*/*.py"),
    ]
    native = (RAY / "_raylet.so").read_bytes().decode("latin-1")
    return native + "".join(path.read_text() for path in python)


@pytest.mark.parametrize("variable", EVERY, ids=lambda variable: variable.name)
def test_the_ray_installed_reads_every_variable(sources: str, variable: Variable) -> None:
    # of settings in its C++ part Ray has the name without the prefix
    names = (variable.name, variable.name.removeprefix("RAY_"))
    found = names[:1] if variable.name.isupper() else names
    assert any(name in sources for name in found)
    assert "RAY_SERVE_NO_SUCH_VARIABLE" not in sources


@pytest.mark.parametrize("variable", EVERY, ids=lambda variable: variable.name)
def test_every_variable_says_why_and_which_test_holds_it(variable: Variable) -> None:
    file, _, name = variable.test.partition("::")
    assert f"def {name}(" in (Path(__file__).parent / file).read_text()
    assert len(variable.why) > 5


def test_no_variable_is_set_elsewhere_in_the_product() -> None:
    """But Ray's token, which is no setting."""
    source = inspect.getsource(ray_session)
    assert "RAY_SERVE" not in source
    for table in ((*SERVING, *PRIVATE), (*SERVING, *LAUNCHED, *HEAD)):
        assert len({variable.name for variable in table}) == len(table)


def test_the_head_has_more_than_the_other_hosts_and_paths_below_its_home() -> None:
    head, other = (launched_environment("/home/u", head=head) for head in (True, False))
    assert head.items() > other.items() > serving_environment().items()
    assert head["RAY_gcs_storage_path"] == "/home/u/shardline-gcs"
    assert other[BINARY] == "/home/u/shardline/deploy/ray/haproxy.sh"
    assert not [value for value in head.values() if "{" in value]


def test_a_private_ray_keeps_to_its_folder_and_its_ports(tmp_path: Path) -> None:
    found = private_environment(tmp_path, iter(range(20_001, 20_010)), 99)
    assert found.items() >= serving_environment().items()
    ports = [found[variable.name] for variable in PRIVATE if variable.value == PORT]
    assert ports == ["20001", "20002"]
    paths = [value for value in found.values() if value.startswith("/")]
    assert len(paths) == 6
    assert all(Path(value) == tmp_path or tmp_path in Path(value).parents for value in paths)
    assert not [value for value in found.values() if "{" in value]


def test_the_launcher_carries_the_routers_limits_and_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BINARY, str(tmp_path / "haproxy"))
    config = RouterConfig(max_in_flight=48, max_timeout_ms=1500)
    write_launcher(config, insecure=True, address="::1")
    text = (tmp_path / "haproxy").read_text()
    assert text.startswith(f'#!/bin/sh\nexec "{sys.executable}" -I ')
    limits = Limits.of_json(text.split("'")[1])
    assert (limits.max_in_flight, limits.max_timeout_ms, limits.insecure) == (48, 1500, True)
    assert limits.address == "::1"
    assert text.endswith(' "$@"\n')
    assert os.access(tmp_path / "haproxy", os.X_OK)
