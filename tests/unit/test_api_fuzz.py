"""The API asked whatever its own OpenAPI description allows, and what it forbids.

Whatever is sent, the answer is one that the description names, nothing is answered by a stack
trace, and nothing is held once all is answered.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from shardline.router.http.api import create_app
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from tests.live_router import DIM, NUM_SHARDS, LiveRouter, running_router

load_all_checks()
KEY = "k" * 43
GUARD = Guard(AuthSettings(keyring=Keyring.of([Key(Scope.WRITE, KEY)])))
HEADERS = {"authorization": f"Bearer {KEY}"}
CONFIG = RouterConfig(max_body_bytes=64 << 10, body_timeout_ms=1000, max_batch=64)
EXAMPLES = 80  # of each operation, besides those that cover its description
# a deadline may be as short as the caller likes, and coverage is not the caller's fault
BUSY = {
    429: {"overloaded"},
    503: {"unavailable", "lists_unavailable"},
    504: {"deadline_exceeded"},
}


@schemathesis.serializer("application/msgpack")
def as_msgpack(_context: Any, value: Any) -> bytes:
    """A generated body; integers beyond 64 bits, which msgpack cannot hold, become floats."""
    body: bytes = msgpack.packb(packable(value))
    return body


def packable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): packable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [packable(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(value) if abs(value) < 2**1000 else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value


def description() -> dict[str, Any]:
    """The OpenAPI document, of an app that serves nothing."""

    async def get() -> dict[str, Any]:
        transport = httpx.ASGITransport(app=create_app(SearchService(CONFIG, b""), CONFIG))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            answer: dict[str, Any] = (await http.get("/openapi.json")).json()
            return answer

    return asyncio.run(get())


@pytest.fixture(scope="module")
def router() -> Iterator[LiveRouter]:
    with running_router(CONFIG, GUARD) as router:
        yield router
        assert {200, 400} <= seen.keys(), f"the fuzz got no further than {dict(seen)}"
        assert [shard.connections for shard in router.shards] == [1] * NUM_SHARDS
        with httpx.Client(base_url=router.url, headers=HEADERS) as http:
            assert http.get("/v1/status").json()["in_flight"] == 0
            # by a vector that was not asked for before: any item may be deleted by now, and the
            # cache may lack a write for a second that was not acknowledged
            query = {"vectors": [[0.125] * DIM], "k": 3, "params": {"nprobe": 77}}
            answer = http.post("/v1/search", json=query)
            assert http.get(f"/v1/items/{1 << 60}").status_code == 404
            coverage = answer.json()["coverage"]
            assert coverage["shards_answered"] == NUM_SHARDS
            assert coverage["rows_answered"] == sum(len(shard.ids) for shard in router.shards)
            item = {"item_id": 1 << 60, "vector": [0.5] * DIM}
            answered = http.put("/v1/items", json={"items": [item]})
            assert answered.status_code == 200, answered.text
        written = [each for shard in router.shards for each in shard.written]
        assert written, "no write got through"
        assert any((router.store / "lists").rglob("*.ids")), "no list got through"


seen: Counter[int] = Counter()  # answers by status
schema = schemathesis.openapi.from_dict(description())


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_a_described_one(case: Any, router: LiveRouter) -> None:
    response = case.call(base_url=router.url, headers=HEADERS)
    seen[response.status_code] += 1
    assert response.status_code != 500
    if response.status_code in BUSY:
        assert response.json()["code"] in BUSY[response.status_code]
    case.validate_response(
        response,
        checks=[status_code_conformance, content_type_conformance, response_schema_conformance],
    )
