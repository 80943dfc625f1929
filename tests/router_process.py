"""The live router of ``live_router`` as a process: its sockets and its time are its own."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from tests.live_router import running_router

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def router_process(config: RouterConfig, search_key: str = "") -> Iterator[int]:
    """The port it listens on. Without a key it asks for none."""
    process = start_router(config, search_key)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.communicate(timeout=30)  # the end of its input is the end


def start_router(
    config: RouterConfig, search_key: str = "", store: Path | None = None
) -> "subprocess.Popen[str]":
    """It writes its port to its output, and ends with its input. store: as ``running_router``."""
    options = [config.model_dump_json(), search_key, *([] if store is None else [str(store)])]
    command = [sys.executable, "-m", "tests.router_process", *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def main(config: str, search_key: str, store: str | None = None) -> None:
    keyring = Keyring.of([Key(Scope.SEARCH, search_key)]) if search_key else None
    guard = Guard(AuthSettings(keyring=keyring))
    folder = None if store is None else Path(store)
    with running_router(RouterConfig.model_validate_json(config), guard, folder) as router:
        print(router.url.rpartition(":")[2], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
