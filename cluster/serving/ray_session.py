"""Starting and stopping Ray on this machine, and leaving nothing behind.

``local_ray`` starts a private Ray in a folder of its own, so several may run side by side, and
removes it at the end: Serve first (HAProxy outlives ``ray stop``), then Ray, then the folder.
``attached_ray`` joins a cluster that somebody else started, ``ray up`` for one.
"""

import contextlib
import functools
import io
import logging
import os
import random
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import ray
from ray._private.services import canonicalize_bootstrap_address

from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.folders import OBJECT_STORE_BYTES, temporary_root
from shardline.cluster.preflight.machine import before_ray
from shardline.cluster.preflight.network import port_is_free
from shardline.cluster.preflight.open_files import haproxy_connections, hard_limit
from shardline.cluster.serving.endpoint import is_alive
from shardline.cluster.serving.serving_keys import KEY_VARIABLES
from shardline.router.router_config import RouterConfig
from shardline.router.serve.environment import private_environment
from shardline.shards.core.errors import Unavailable, last_line

logger = logging.getLogger(__name__)

NAMESPACE = "shardline"
SESSION_PREFIX = "shardline-"
STOP_TIMEOUT_S = 10.0
# Between Ray's workers (from 10002) and Serve's replicas (from 30000), below what Linux gives to
# connections (from 32768): HAProxy binds its ports seconds after they were found free.
QUIET_PORTS = range(20_000, 30_000)
CONNECT_TIMEOUT_S = 5.0
DEFAULT_IN_FLIGHT: int = RouterConfig.model_fields["max_in_flight"].default
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "grpc_proxy")
# Variables that lead to another Ray, or carry the settings of a job in one: a private Ray's
# processes, and libraries that ask for them while they run, must not find any.
OTHER_RAYS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


@contextlib.contextmanager
def local_ray(
    *, num_cpus: int, verbose: bool = False, in_flight: int | None = DEFAULT_IN_FLIGHT
) -> Iterator[Path]:
    """A private Ray on this machine for the length of the block; yields its folder.

    ``num_cpus`` is logical: it bounds how many tasks run at once, not which cores they use.
    ``in_flight``: requests that its routers are to work on at once; None: it is to serve nothing.

    Raises:
        Unavailable: this machine does not have what Ray needs, Ray did not start, or this process
            is attached to another one already.
    """
    if ray.is_initialized():
        raise Unavailable("Ray is already running in this process", hint="stop it first")
    reap_orphans()
    enforce(before_ray(in_flight))
    session = _session_folder()
    connections = haproxy_connections(in_flight or DEFAULT_IN_FLIGHT, hard_limit())
    inherited = private_environment(session, iter(free_port, None), connections)
    values: dict[str, str | None] = dict.fromkeys(OTHER_RAYS)
    with _environment(values | inherited | {"RAY_AUTH_TOKEN": _auth_token()}):
        try:
            with _hidden_from_children():
                _init_local(session, num_cpus=num_cpus, verbose=verbose)
            yield session
        finally:
            try:
                _stop_ray()
            finally:
                _stop_leftovers(session)
                shutil.rmtree(session, ignore_errors=True)


@contextlib.contextmanager
def attached_ray(address: str, *, verbose: bool = False) -> Iterator[None]:
    """Joins the Ray cluster at ``address`` ("auto": RAY_ADDRESS, or the one of this machine).

    Raises:
        Unavailable: no cluster answers there.
    """
    try:
        _check_answers(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=verbose)
    except Exception as error:  # of any kind, as those of a start
        raise Unavailable(
            f"no Ray cluster at {address!r}", got=last_line(error), hint="start one with `ray up`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def ray_for(
    address: str, *, num_cpus: int, verbose: bool = False, in_flight: int | None
) -> contextlib.AbstractContextManager[object]:
    """``local_ray`` for the address "local", ``attached_ray`` for any other."""
    if address == "local":
        return local_ray(num_cpus=num_cpus, verbose=verbose, in_flight=in_flight)
    return attached_ray(address, verbose=verbose)


def cores() -> int:
    """Cores this process may use, fewer than the machine has under taskset or in a container."""
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """A TCP port that nobody listens on, nor will by chance before it is used.

    Raises:
        Unavailable: none was found.
    """
    for port in random.SystemRandom().sample(QUIET_PORTS, len(QUIET_PORTS)):
        if port_is_free(port):
            return port
    raise Unavailable(
        "no free port", expected=f"one of {QUIET_PORTS.start} to {QUIET_PORTS.stop - 1}"
    )


def reap_orphans() -> list[int]:
    """Ends processes left by sessions whose owner was killed; removes their folders; their pids.

    The name of a session's folder holds its owner's pid, and every process of the session,
    HAProxy included, has that folder on its command line or a file in it open. No other process
    is touched, nor another user's session.
    """
    reaped: list[int] = []
    for folder in temporary_root().glob(f"{SESSION_PREFIX}*-*"):
        owner = folder.name.removeprefix(SESSION_PREFIX).split("-")[0]
        if owner.isdigit() and _may_end(folder) and not _owns(int(owner), folder):
            reaped += _stop_leftovers(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return reaped


def _may_end(folder: Path) -> bool:
    """Whether the session is this user's; root may end everybody's."""
    try:
        return os.geteuid() in (0, folder.lstat().st_uid)
    except FileNotFoundError:  # another command is ending it
        return False


def _owns(pid: int, folder: Path) -> bool:
    """Whether the session's owner still runs; a younger process may carry its pid by now."""
    try:
        return is_alive(pid) and psutil.Process(pid).create_time() <= folder.stat().st_ctime + 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def _check_answers(address: str) -> None:
    """Whether anybody listens there: Ray itself writes to the terminal for over a minute, then ends
    the process.

    Raises:
        OSError, ValueError: nobody does, or ``address`` is none; says which address was asked.
    """
    try:
        asked = canonicalize_bootstrap_address(address.removeprefix("ray://"))
    except ConnectionError as error:
        raise ConnectionError("none runs on this machine, and RAY_ADDRESS names none") from error
    if asked is None:
        raise ValueError("RAY_ADDRESS is 'local', which starts a Ray instead of joining one")
    host, _, port = asked.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        source = " (RAY_ADDRESS)" if address == "auto" and "RAY_ADDRESS" in os.environ else ""
        raise ConnectionError(f"no answer from {asked}{source}: {error}") from error


def _session_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{SESSION_PREFIX}{os.getpid()}-", dir=temporary_root()))


@functools.cache
def _auth_token() -> str:
    """One token per process, because Ray caches the first it sees.

    ray.init() turns token mode on by itself; finding a token in the environment it does not write
    one to the home folder, where it would change how later clusters start.
    """
    return secrets.token_hex(32)


@contextlib.contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables for the block, and removes those of value None."""
    before = {name: os.environ.get(name) for name in (*values, "RAY_AUTH_MODE")}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _hidden_from_children() -> Iterator[None]:
    """Removes API keys and proxies from the environment for the block: Ray's processes would
    inherit them. Its dashboard asks for metadata of a cloud, whatever is set, through any proxy.
    """
    names = [name for name in os.environ if name.lower() in PROXIES or name in KEY_VARIABLES]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _init_local(session: Path, *, num_cpus: int, verbose: bool) -> None:
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(
            "local",  # else RAY_ADDRESS would be followed
            num_cpus=num_cpus,
            namespace=NAMESPACE,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(session),
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except Exception as error:
        raise Unavailable("Ray did not start", got=last_line(error)) from error


def _stop_ray() -> None:
    """Serve first, where it was used: HAProxy outlives a plain shutdown of Ray."""
    if not ray.is_initialized():
        return
    # Ray reports the end of Serve's controller as a failed task, on our standard output
    with contextlib.redirect_stdout(io.StringIO()):
        if "ray.serve" in sys.modules:
            from ray import serve

            try:
                serve.shutdown()
            except (ray.exceptions.RayError, RuntimeError, TimeoutError) as error:
                logger.warning("Ray Serve did not shut down in order: %s", error)
        ray.shutdown()


def _stop_leftovers(session: Path) -> list[int]:
    """Terminates, then kills, every process that names the session's folder; their pids."""
    found = [process for process in psutil.process_iter() if _belongs_to(process, session)]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=STOP_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    return [process.pid for process in found]


def _belongs_to(process: psutil.Process, session: Path) -> bool:
    """By command line, or by the log files it holds open: Ray's workers rename themselves."""
    if process.pid == os.getpid():
        return False
    try:
        traces = [*process.cmdline(), *(file.path for file in process.open_files())]
        return any(str(session) in trace for trace in traces)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
