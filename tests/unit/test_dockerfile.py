"""deploy/docker/Dockerfile, read as text: what it takes, what it leaves out, as whom it runs.

``python -m tests.dockerfile ROOT`` carries its steps out.
"""

import fnmatch
import re
import subprocess
import tomllib

import pytest

from shardline.cluster.config import load_config
from tests.dockerfile import DOCKERFILE, IGNORED, ROOT, read_steps, steps_of

STEPS = read_steps(DOCKERFILE.read_text())


def test_a_line_that_is_no_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="not an instruction: 'ADD"):
        read_steps("FROM debian:12.12-slim\nADD https://example.org/x /x\n")
    joined = read_steps("# comment\nRUN one \\\n    # not a step\n    && two\n")
    assert [(step.kind, step.text) for step in joined] == [("RUN", "one && two")]


def test_it_starts_from_one_pinned_release() -> None:
    assert [step.kind for step in STEPS].count("FROM") == 1
    assert STEPS[0].kind == "FROM"
    assert re.fullmatch(r"debian:\d+\.\d+-slim", STEPS[0].text)


def test_it_runs_as_a_user_who_is_not_root_and_owns_what_it_needs() -> None:
    kinds = [step.kind for step in STEPS]
    (user,) = steps_of(STEPS, "USER")
    assert user.text == "1000:1000"
    assert kinds.index("USER") < kinds.index("COPY")
    made = next(step.text for step in steps_of(STEPS, "RUN") if "useradd" in step.text)
    assert "--uid 1000" in made
    store = str(load_config(ROOT / "deploy" / "docker" / "cluster-config.yaml").store)
    assert f"chown shardline:shardline {store}" in made
    assert [step.text for step in steps_of(STEPS, "VOLUME")] == [store]
    assert {step.options["chown"] for step in steps_of(STEPS, "COPY")} == {user.text}


def test_it_brings_the_code_and_no_more() -> None:
    brought = [
        word
        for step in steps_of(STEPS, "COPY")
        for word in step.words[:-1]
        if not word.startswith("--")
    ]
    assert all((ROOT / name).exists() for name in brought)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert {name.split(".")[1] for name in packages if "." in name} <= set(brought)
    assert not {".", "tests", "docs", ".git", ".venv"} & set(brought)

    rules = [line for line in IGNORED.read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"  # a store or a key that lies beside the code is not even sent
    assert {rule[1:] for rule in rules if rule[0] == "!"} == set(brought)
    assert any(fnmatch.fnmatch("cluster/__pycache__", rule) for rule in rules)


def test_nothing_secret_can_come_in_by_a_variable() -> None:
    named = [step.text for kind in ("ARG", "ENV") for step in steps_of(STEPS, kind)]
    assert [text for text in named if re.search(r"TOKEN|KEY|SECRET|PASSW", text.upper())] == []


@pytest.mark.parametrize("step", steps_of(STEPS, "RUN"), ids=lambda step: step.text[:20])
def test_each_step_is_shell_that_stops_at_the_first_failure(step) -> None:
    subprocess.run(["sh", "-n", "-c", step.text], check=True)
    assert ";" not in step.text
    if "apt-get" in step.text:
        assert step.text.startswith("apt-get update && apt-get install --yes")
        assert "--no-install-recommends" in step.text
        assert step.text.endswith("rm -rf /var/lib/apt/lists/*")
    if "pip" in step.text:
        assert "--no-cache-dir --constraint constraints.txt" in step.text


def test_the_extras_are_those_that_serve_and_run_batch_jobs() -> None:
    (argument,) = steps_of(STEPS, "ARG")
    name, _, value = argument.text.partition("=")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert name == "EXTRAS"
    assert value.split(",") == ["cluster", "cpu", "batch"]
    assert set(value.split(",")) <= set(project["optional-dependencies"])


def test_it_is_healthy_when_the_router_is_ready() -> None:
    config = load_config(ROOT / "deploy" / "docker" / "cluster-config.yaml")
    (health,) = steps_of(STEPS, "HEALTHCHECK")
    assert f"http://127.0.0.1:{config.cluster.http_port}/readyz" in health.text
    assert [step.text for step in steps_of(STEPS, "EXPOSE")] == [str(config.cluster.http_port)]
    assert config.cluster.http_host == "0.0.0.0"
    assert config.cluster.address == "local"


def test_it_starts_as_described() -> None:
    (entry,), (command,) = steps_of(STEPS, "ENTRYPOINT"), steps_of(STEPS, "CMD")
    assert entry.words == ["shardline"]
    assert command.words[-1] == "serve"
    (folder,) = steps_of(STEPS, "WORKDIR")
    assert (ROOT / command.words[1]).is_file()
    paths = [step.text for step in steps_of(STEPS, "ENV") if step.text.startswith("PATH=")]
    assert paths[0].startswith(f"PATH={folder.text}/.venv/bin:")
