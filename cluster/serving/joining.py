"""What is settled before a process joins the Ray cluster of an address: is it one that can be
joined, does anybody listen there, and which token proves this process to it.

Ray itself writes to the terminal for over a minute where nobody listens, and ends the process; with
a wrong token, or none, it prints tracebacks.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import grpc
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import Config

from shardline.shards.core.errors import ConfigError, Unavailable

ADDRESS_KEY = "cluster.address"
RAY_CLIENT = "ray://"
CONNECT_TIMEOUT_S = 5.0
MODE_VARIABLE = "RAY_AUTH_MODE"
TLS_VARIABLE = "RAY_USE_TLS"
# any question to the head that changes nothing: it is answered in a millisecond
QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"


def check_address(address: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuses Ray Client: what it starts belongs to a proxy on the head, and Serve cannot be told
    apart from it.

    Raises:
        ConfigError: the address, or the RAY_ADDRESS that "auto" stands for, is one of Ray Client.
    """
    named = environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if named.startswith(RAY_CLIENT):
        source = "RAY_ADDRESS" if address == "auto" else None
        raise ConfigError(
            "an address of Ray Client cannot be used" + (f" ({source})" if source else ""),
            field=ADDRESS_KEY,
            expected='"auto" on a host of the cluster, or HOST:PORT of its head (port 6379)',
            got=repr(named),
            hint="run the command on a host of the cluster, or ask it over HTTP with --url",
        )


def check_answers(address: str) -> str:
    """Where somebody listens: HOST:PORT of the head.

    Raises:
        OSError, ValueError: nobody does, or ``address`` is none; says which address was asked.
    """
    try:
        asked = canonicalize_bootstrap_address(address)
    except ConnectionError as error:
        raise ConnectionError("none runs on this machine, and RAY_ADDRESS names none") from error
    if asked is None:
        raise ValueError("RAY_ADDRESS is 'local', which starts a Ray instead of joining one")
    try:
        _connect(asked)
    except OSError as error:
        source = " (RAY_ADDRESS)" if address == "auto" and "RAY_ADDRESS" in os.environ else ""
        raise ConnectionError(f"no answer from {asked}{source}: {error}") from error
    return str(asked)


def answers_at(head: str) -> bool:
    """Whether anybody listens at HOST:PORT."""
    try:
        _connect(head)
    except OSError:
        return False
    return True


def _connect(head: str) -> None:
    host, _, port = head.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()


def token_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where Ray looks for the token of a cluster, unless the environment holds the token itself."""
    named = environ.get(PATH_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"


def use_token(environ: MutableMapping[str, str] = os.environ) -> None:
    """Turns token authentication on where there is a token and nothing else was said: for an
    address given by hand Ray does not look for one.

    Raises:
        Unavailable: tokens are asked for, and there is none.
    """
    mode, path = environ.get(MODE_VARIABLE), token_path(environ)
    has_token = bool(environ.get(TOKEN_VARIABLE)) or path.is_file()
    if mode is None and has_token:
        environ[MODE_VARIABLE] = "token"
        Config.initialize("")  # Ray read the variable when it was imported
    elif mode == "token" and not has_token:
        raise Unavailable(
            f"{path}: no token for Ray, which {MODE_VARIABLE}=token asks for",
            hint="copy the file from the head of the cluster, mode 600",
        )


def check_token(head: str, environ: Mapping[str, str] = os.environ) -> None:
    """Asks the head whether it takes this process's token; without, Ray tries for 20 seconds.

    Raises:
        Unavailable: it does not, or it asks for one and there is none.
    """
    if environ.get(TLS_VARIABLE, "0") != "0":  # Ray's own start says what is wrong then
        return
    token = _token(environ)
    with grpc.insecure_channel(head) as channel:
        ask = channel.unary_unary(QUESTION)
        try:
            ask(b"", timeout=CONNECT_TIMEOUT_S, metadata=_proof(token))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise Unavailable(
                    f"the Ray cluster at {head} asks for another token than this process has",
                    hint=_without_token(environ),
                ) from error


def _token(environ: Mapping[str, str]) -> str | None:
    if environ.get(MODE_VARIABLE) != "token":
        return None
    try:
        return environ.get(TOKEN_VARIABLE) or token_path(environ).read_text().strip()
    except OSError as error:
        raise Unavailable(
            f"{token_path(environ)}: the token for Ray cannot be read", got=error.strerror
        ) from error


def _proof(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def _without_token(environ: Mapping[str, str]) -> str:
    if environ.get(MODE_VARIABLE) not in (None, "token"):
        return f"set {MODE_VARIABLE}=token"
    if environ.get(TOKEN_VARIABLE):
        return f"{TOKEN_VARIABLE} is not the cluster's: copy the token of its head"
    path = token_path(environ)
    if path.is_file():
        return f"{path} is not the cluster's: copy the file of its head, mode 600"
    return f"there is no {path}: copy the file of its head, mode 600"
