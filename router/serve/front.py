"""Our API in front of what Ray Serve puts around the app of a replica.

Serve (2.60) wraps every request in ids, contexts, two tasks, metrics and a log record; without that
a replica answers twice as many empty requests a second (docs/PERFORMANCE.md). Our API counts,
refuses and cancels by itself, so requests go to it directly, through Serve's hook for middleware:
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names ``middleware``, which every process of Serve with an
HTTP server calls. Serve's own paths (/-/healthz) and whatever runs in a process without an app of
ours go on as before.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
SERVES_OWN = "/-/"


class Front:
    """Sends a request to the app of this process, if there is one, else to Serve's."""

    ours: ASGIApp | None = None  # of the one replica that runs in this process

    def __init__(self, serves: ASGIApp) -> None:
        self._serves = serves

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = Front.ours
        if ours is None or scope["type"] == "lifespan" or scope["path"].startswith(SERVES_OWN):
            await self._serves(scope, receive, send)
        else:
            await ours(scope, receive, send)


def middleware() -> list[Middleware]:
    """What Serve asks for."""
    return [Middleware(Front)]
