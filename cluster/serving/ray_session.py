"""Starting and stopping Ray on this machine, and leaving nothing behind.

``local_ray`` starts a private Ray in a folder of its own, so several may run side by side, and
removes it at the end: Serve first (HAProxy outlives ``ray stop``), then Ray, then the folder.
``attached_ray`` joins a cluster that somebody else started, ``ray up`` for one. ``ray_for`` is for
commands: there signals and the death of Ray are watched for too (``cluster.serving.ending``).
"""

import contextlib
import functools
import io
import logging
import os
import random
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray._private import ray_constants, services, utils

from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.folders import OBJECT_STORE_BYTES, temporary_root
from shardline.cluster.preflight.machine import before_ray
from shardline.cluster.preflight.network import port_is_free
from shardline.cluster.preflight.open_files import haproxy_connections, hard_limit
from shardline.cluster.serving.ending import Ending
from shardline.cluster.serving.join_note import JoinNote, leave_join_note
from shardline.cluster.serving.joining import (
    TOKEN_VARIABLE,
    check_address,
    check_answers,
    check_token,
    use_token,
)
from shardline.cluster.serving.leftovers import SESSION_PREFIX, end_session, reap_orphans
from shardline.cluster.serving.serving_keys import KEY_VARIABLES
from shardline.router.router_config import RouterConfig
from shardline.router.serve.environment import private_environment
from shardline.shards.core.errors import Unavailable, last_line

logger = logging.getLogger(__name__)

NAMESPACE = "shardline"
# Between Ray's workers (from 10002) and Serve's replicas (from 30000), below what Linux gives to
# connections (from 32768): HAProxy binds its ports seconds after they were found free.
QUIET_PORTS = range(20_000, 30_000)
DEFAULT_IN_FLIGHT: int = RouterConfig.model_fields["max_in_flight"].default
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "grpc_proxy")
# Variables that lead to another Ray, or carry the settings of a job in one: a private Ray's
# processes, and libraries that ask for them while they run, must not find any.
OTHER_RAYS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


@contextlib.contextmanager
def local_ray(
    *,
    num_cpus: int,
    verbose: bool = False,
    in_flight: int | None = DEFAULT_IN_FLIGHT,
    ending: Ending | None = None,
) -> Iterator[Path]:
    """A private Ray on this machine for the length of the block; yields its folder.

    ``num_cpus`` is logical: it bounds how many tasks run at once, not which cores they use.
    ``in_flight``: requests that its routers are to work on at once; None: it is to serve nothing.
    ``ending`` None: nobody else has to end what is started here.

    Raises:
        Unavailable: this machine does not have what Ray needs, Ray did not start, or this process
            is attached to another one already.
    """
    if ray.is_initialized():
        raise Unavailable("Ray is already running in this process", hint="stop it first")
    reap_orphans()
    enforce(before_ray(in_flight))
    ending = ending or Ending()
    session = _session_folder()
    connections = haproxy_connections(in_flight or DEFAULT_IN_FLIGHT, hard_limit())
    inherited = private_environment(session, iter(free_port, None), connections)
    values: dict[str, str | None] = dict.fromkeys(OTHER_RAYS)
    with _environment(values | inherited | {"RAY_AUTH_TOKEN": _auth_token()}):
        try:
            with ending.held(), _hidden_from_children():
                ending.begin(session)
                _init_local(session, ending, num_cpus=num_cpus, verbose=verbose)
                if ending.is_active:
                    ending.follow(_own_processes())
            yield session
        finally:
            with ending.stopping_ray():
                try:
                    _stop_ray()
                finally:
                    end_session(session)
                    ending.finish()


@contextlib.contextmanager
def attached_ray(
    address: str, *, verbose: bool = False, ending: Ending | None = None
) -> Iterator[str]:
    """Joins the Ray cluster at ``address`` ("auto": RAY_ADDRESS, or the one of this machine);
    yields HOST:PORT of its head.

    Raises:
        ConfigError: it is an address of Ray Client.
        Unavailable: no cluster answers there, or it does not take this process: another token,
            another version of Ray or Python.
    """
    check_address(address)
    use_token()
    try:
        head = check_answers(address)
    except Exception as error:  # of any kind, as those of a start
        raise Unavailable(
            f"no Ray cluster at {address!r}",
            got=last_line(error),
            hint="start one with `ray up`; while a head is away, routers still answer at --url",
        ) from error
    check_token(head)
    ending = ending or Ending()
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with ending.held(), _handlers_kept(ending):
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except Exception as error:
        raise Unavailable(
            f"the Ray cluster at {address!r} cannot be joined", got=last_line(error)
        ) from error
    try:
        yield head
    finally:
        ray.shutdown()


@contextlib.contextmanager
def ray_for(
    address: str, *, num_cpus: int, verbose: bool = False, in_flight: int | None
) -> Iterator[Ending]:
    """For a command: ``local_ray`` for the address "local", ``attached_ray`` for any other.

    Yields what the command ends by.
    """
    with Ending() as ending:
        if address == "local":
            with local_ray(num_cpus=num_cpus, verbose=verbose, in_flight=in_flight, ending=ending):
                yield ending
        else:
            with attached_ray(address, verbose=verbose, ending=ending):
                yield ending


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


def _init_local(session: Path, ending: Ending, *, num_cpus: int, verbose: bool) -> None:
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with _handlers_kept(ending), _children_apart(ending):
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
        _leave_note(session)
    except Exception as error:
        raise Unavailable("Ray did not start", got=last_line(error)) from error


def _leave_note(session: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    leave_join_note(session, JoinNote(address, os.environ[TOKEN_VARIABLE]))


@contextlib.contextmanager
def _handlers_kept(ending: Ending) -> Iterator[None]:
    """Without Ray's handlers of SIGTERM, in Python and in C++: both end this process in the middle
    of what it does, the second with a dump of the stack and SIGABRT."""
    if not ending.is_active:
        yield
        return
    with (
        _replaced(utils, "set_sigterm_handler", lambda handler: None),
        _replaced(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", True),
    ):
        yield


@contextlib.contextmanager
def _children_apart(ending: Ending) -> Iterator[None]:
    """Starts Ray's processes in sessions of their own, away from the terminal and from signals to
    this process's group: who is signalled together with its children cannot end them in order.
    """
    started_by_ray = services.ConsolePopen

    def start(*command: Any, **options: Any) -> Any:
        with ending.starting_process():
            return started_by_ray(*command, start_new_session=True, **options)

    with _replaced(services, "ConsolePopen", start):
        yield


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _own_processes() -> dict[str, int]:
    """The pids of the two processes of Ray that repair all others, and are repaired by none."""
    named = {
        ray_constants.PROCESS_TYPE_GCS_SERVER: "Ray's GCS",
        ray_constants.PROCESS_TYPE_RAYLET: "Ray's raylet",
    }
    started = ray._private.worker._global_node.all_processes
    return {name: started[kind][0].process.pid for kind, name in named.items()}


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
