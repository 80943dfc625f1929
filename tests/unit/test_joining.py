"""Which Ray clusters are joined, and what is said of those that cannot be."""

from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from ray.exceptions import RayError

from shardline.cluster.serving import joining
from shardline.cluster.serving import ray_session as session
from shardline.cluster.serving.joining import check_address, check_token, use_token
from shardline.shards.core.errors import ConfigError, Unavailable

TOKEN = "0123456789abcdef" * 4


class Head(grpc.GenericRpcHandler):
    """Stands for Ray's head: answers any question with a right token, as the GCS does."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        proof = dict(details.invocation_metadata).get("authorization")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if proof != f"Bearer {TOKEN}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def head():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Head(),))
    port = server.add_insecure_port("0.0.0.0:0")  # Ray asks at the address of the host
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("address", "environ", "named"),
    [
        ("ray://10.0.0.1:10001", {}, "'ray://10.0.0.1:10001'"),
        ("auto", {"RAY_ADDRESS": "ray://h:1"}, "(RAY_ADDRESS)"),
    ],
)
def test_an_address_of_ray_client_is_refused_by_name(
    address: str, environ: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError, match=r"cluster.address: .*HOST:PORT.*--url") as caught:
        check_address(address, environ)
    assert named in str(caught.value)


def test_ray_is_not_asked_about_an_address_of_ray_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.ray, "init", lambda *_, **__: pytest.fail("Ray asked"))
    with pytest.raises(ConfigError), session.attached_ray("ray://127.0.0.1:1"):
        pass


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379"])
def test_other_addresses_pass(address: str) -> None:
    check_address(address, {})
    check_address("10.0.0.1:6379", {"RAY_ADDRESS": "ray://not-asked:1"})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_a_token_file_turns_tokens_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(joining, "Config", SimpleNamespace(initialize=read.append))
    environ: dict[str, str] = {}
    use_token(environ)
    assert (environ, read) == ({}, [])
    (home / ".ray" / "auth_token").write_text(TOKEN)
    use_token(environ)
    assert (environ, read) == ({"RAY_AUTH_MODE": "token"}, [""])


def test_what_was_said_of_tokens_is_kept(home: Path) -> None:
    (home / ".ray" / "auth_token").write_text(TOKEN)
    environ = {"RAY_AUTH_MODE": "disabled"}
    use_token(environ)
    assert environ == {"RAY_AUTH_MODE": "disabled"}


def test_tokens_that_are_asked_for_and_missing_are_named(home: Path) -> None:
    with pytest.raises(Unavailable, match=r"\.ray/auth_token: no token.*mode 600"):
        use_token({"RAY_AUTH_MODE": "token"})


@pytest.mark.parametrize(
    ("written", "environ", "said"),
    [
        (None, {}, "there is no .*auth_token: copy the file of its head"),
        ("f" * 64, {"RAY_AUTH_MODE": "token"}, "auth_token is not the cluster's"),
        (TOKEN, {"RAY_AUTH_MODE": "disabled"}, "set RAY_AUTH_MODE=token"),
        (None, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, "RAY_AUTH_TOKEN is not"),
    ],
)
def test_a_head_that_refuses_the_token_is_told_apart_at_once(
    head: str, home: Path, written: str | None, environ: dict[str, str], said: str
) -> None:
    if written is not None:
        (home / ".ray" / "auth_token").write_text(written)
    with pytest.raises(Unavailable, match=f"asks for another token.*{said}"):
        check_token(head, environ)


def test_a_right_token_passes(head: str, home: Path) -> None:
    (home / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    check_token(head, {"RAY_AUTH_MODE": "token"})
    check_token(head, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN})


def test_a_head_that_does_not_know_the_question_is_left_to_ray() -> None:
    check_token("127.0.0.1:1", {})


def test_a_refusal_comes_before_ray_tries_for_long(
    head: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(session.ray, "init", lambda *_, **__: pytest.fail("Ray asked"))
    with pytest.raises(Unavailable, match="another token"), session.attached_ray(head):
        pass


def test_what_ray_says_of_a_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    def init(*_: object, **__: object) -> None:
        raise RayError("Traceback\nVersion mismatch: 2.59 and 2.60")

    monkeypatch.setattr(session, "check_token", lambda head: None)
    monkeypatch.setattr(session.ray, "init", init)
    with pytest.raises(Unavailable) as caught, session.attached_ray(head):
        pass
    assert str(caught.value) == (
        f"the Ray cluster at {head!r} cannot be joined; got Version mismatch: 2.59 and 2.60"
    )
