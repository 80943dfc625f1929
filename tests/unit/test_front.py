"""Requests go to our app before Serve's wrapping of it, and only those that are ours."""

import asyncio
import inspect

import pytest
from ray.serve._private import constants, http_util, replica
from ray.serve._private.http_util import validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path

from shardline.router.serve.environment import serving_environment
from shardline.router.serve.front import HOOK, Front


@pytest.fixture
def ask(monkeypatch):
    """Who gets a request: ``ask(scope, ours=True)`` returns the names of the apps called."""

    def ask(scope, *, ours):
        called = []

        def app(name):
            async def record(scope, receive, send):
                called.append(name)

            return record

        monkeypatch.setattr(Front, "ours", app("ours") if ours else None)
        asyncio.run(Front(app("serve"))(scope, None, None))
        return called

    return ask


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("path", ["/v1/search", "/healthz", "/", "", "/nothing"])
def test_our_app_answers_in_a_process_that_has_one(ask, kind, path):
    assert ask({"type": kind, "path": path}, ours=True) == ["ours"]


@pytest.mark.parametrize("path", ["/-/healthz", "/-/routes"])
def test_serve_answers_for_itself(ask, path):
    assert ask({"type": "http", "path": path}, ours=True) == ["serve"]


def test_serve_answers_in_a_process_without_our_app(ask):
    assert ask({"type": "http", "path": "/v1/search"}, ours=False) == ["serve"]


def test_the_servers_own_life_is_serves(ask):
    assert ask({"type": "lifespan"}, ours=True) == ["serve"]


def test_this_ray_reads_the_hook():
    assert HOOK in inspect.getsource(constants)
    assert "http_options.middlewares" in inspect.getsource(http_util.start_asgi_http_server)
    assert "configure_http_middlewares" in inspect.getsource(replica)


def test_serve_finds_the_hook_by_the_name_in_its_environment_and_takes_what_it_returns():
    (made,) = validate_http_proxy_callback_return(
        call_function_from_import_path(serving_environment()[HOOK])
    )
    assert made.cls is Front
