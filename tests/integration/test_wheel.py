"""The built wheel in an environment that has its base dependencies and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from shardline.cluster.exits import EXTRAS
from tests.integration.conftest import Cluster

ROOT = Path(__file__).parents[2]
SOURCES = ("bench", "cluster", "router", "shards", "shardline", "training")
START_LIMIT_S = 2.0  # `shardline --help` takes a quarter of that when the machine is idle

USERS_SCRIPT = """
from shardline import AsyncClient, Client, Overloaded, Retry, SearchAnswer, SearchParams

def ask(client: Client) -> SearchAnswer:
    return client.search(vectors=[[0.0]], k=5, params=SearchParams(nprobe=4))

async def ask_too(client: AsyncClient) -> list[str]:
    answer = await client.search(item_ids=[1])
    return [reason.code for reason in answer.reasons]

try:
    with Client("http://127.0.0.1:9", retry=Retry(attempts=1)) as client:
        reveal_type(ask(client).ids)
except Overloaded as error:
    reveal_type(error.hint)
"""
WRONG_SCRIPT = """
from shardline import Client
Client("http://127.0.0.1:9").search(vector=[[0.0]])
from shardline import Clint
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: setuptools leaves its traces beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, folder], cwd=source, check=True, capture_output=True
    )
    (built,) = folder.glob("shardline-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and links to its base dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    for needed in _base(Distribution.at((site / name).parent)).values():
        for top in {file.parts[0] for file in needed.files or () if ".." not in file.parts}:
            source = Path(str(needed.locate_file(top)))
            if source.exists() and top != "__pycache__":
                (site / top).symlink_to(source)
    script = folder / "bin" / "shardline"
    script.write_text(f"#!{folder}/bin/python\nfrom shardline.cluster.cli import main\nmain()\n")
    script.chmod(0o755)
    return folder / "bin" / "python"


def _base(root: Distribution) -> dict[str, Distribution]:
    """What a distribution requires without any extra, and what that requires, by name."""
    found: dict[str, Distribution] = {}
    waiting = [root]
    while waiting:
        for line in waiting.pop().requires or ():
            need = Requirement(line)
            wanted = need.marker is None or need.marker.evaluate({"extra": ""})
            if wanted and need.name not in found:
                found[need.name] = distribution(need.name)
                waiting.append(found[need.name])
    return found


def run(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": os.environ["PATH"], "HOME": str(python.parent)}
    return subprocess.run(
        [python.parent / arguments[0], *arguments[1:]],
        env=kept | environment,
        cwd=python.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_wheel_adds_one_name_to_site_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"shardline"}
    assert "shardline/py.typed" in names
    modules = {name for name in names if name.endswith(".py")}
    for folder in set(SOURCES) - {"shardline"}:
        ours = {f"shardline/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
        assert ours and ours <= modules, f"pyproject.toml lists no package for {ours - modules}"


def test_the_client_loads_numpy_and_no_more(python: Path) -> None:
    code = (
        "import sys; from shardline import Client, SearchParams, Overloaded\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = set(run(python, "python", "-c", code).stdout.split()) - sys.stdlib_module_names
    libraries = {name for name in loaded if "cython" not in name} - {"__main__"}
    assert libraries == {"shardline", "numpy", "msgpack", "httptools"}
    heavy = {"asyncio", "ssl", "http", "email"}
    assert not heavy & set(run(python, "python", "-c", code).stdout.split())


def test_names_and_types_of_the_client_are_seen_from_outside(python: Path, tmp_path: Path) -> None:
    def check(text: str) -> str:
        (tmp_path / "user.py").write_text(text)
        mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
        return subprocess.run(
            [*mypy, "user.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
        ).stdout

    seen = check(USERS_SCRIPT)
    assert "Success" in seen
    assert "numpy.ndarray[" in seen and "_64Bit]" in seen, "ids are int64"
    assert 'Revealed type is "str | None"' in seen
    wrong = check(WRONG_SCRIPT)
    assert 'Unexpected keyword argument "vector" for "search"' in wrong
    assert 'has no attribute "Clint"' in wrong


def test_help_without_the_extras(python: Path) -> None:
    shown = run(python, "shardline", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "serve" in shown.stdout
    code = (
        "import time; began = time.perf_counter(); import shardline.cluster.cli\n"
        "print(time.perf_counter() - began)"
    )
    assert float(run(python, "python", "-c", code).stdout) < START_LIMIT_S


@pytest.mark.parametrize("command", ["serve", "build", "train", "evaluate", "demo", "doctor"])
def test_a_command_that_needs_an_extra_says_which(python: Path, command: str) -> None:
    options = ("--data", "data") if command in ("train", "evaluate") else ()
    ended = run(python, "shardline", command, *options)
    assert ended.returncode == 2, ended.stderr
    *before, line = ended.stderr.splitlines()
    assert not before or command == "demo", "demo lists its steps first"
    assert any(f"pip install 'shardline[{extra}]'" in line for extra in EXTRAS.values())
    assert "internal" not in line and "-v" not in line


def test_a_running_cluster_is_asked_without_the_extras(python: Path, cluster: Cluster) -> None:
    key = cluster.endpoint.address.key
    assert key is not None
    options = ("--url", cluster.endpoint.url, "--json")
    shown = run(python, "shardline", "status", *options, SHARDLINE_API_KEY=key)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout)["generation"] == cluster.endpoint.generation
    store = ("--store", str(cluster.store.root))
    found = run(python, "shardline", *store, "query", "--item", "42", "-k", "3", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    assert len(json.loads(found.stdout)["results"]) == 3
