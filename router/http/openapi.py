"""The API's description: OpenAPI from the models of the bodies, and a page that needs no network.

The page is rendered here instead of by Swagger UI, whose scripts would come from a CDN: clusters
are often cut off from the internet, and the API has a handful of operations.
"""

from html import escape
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from shardline.router.contract import WRITE_KEY_HEADER
from shardline.router.experiments.assignment import ARM_HEADER
from shardline.router.http.auth import needed_scope
from shardline.router.http.event_models import EventsBody, EventsResponse
from shardline.router.http.filter_schema import FILTER_SCHEMAS
from shardline.router.http.list_models import (
    ListBody,
    ListChangeBody,
    ListNamesResponse,
    ListResponse,
    ListWrittenResponse,
)
from shardline.router.http.models import ItemResponse, Problem, SearchBody, SearchResponse
from shardline.router.http.rearrange_schema import REARRANGE_SCHEMAS
from shardline.router.http.write_models import (
    DeleteBody,
    DeleteResponse,
    UpsertBody,
    UpsertResponse,
)

TITLE = "Shardline"
VERSION = "1"
DESCRIPTION = (
    "Top-K retrieval over sharded embeddings. Bodies are JSON or msgpack by Content-Type and "
    "Accept. Errors are RFC 9457 problems with a stable code. X-Request-ID is echoed. Requests "
    "need an API key, sent as Authorization: Bearer <key>, except where it says open."
)
KEY_SCHEME = {"type": "http", "scheme": "bearer", "description": "an API key of this cluster"}
REF = "#/components/schemas/{model}"


def _content(model: str, *media: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": REF.format(model=model)}}
    return dict.fromkeys(media or ("application/json", "application/msgpack"), schema)


def _problem(text: str) -> dict[str, Any]:
    return {"description": text, "content": _content("Problem", "application/problem+json")}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        400: "invalid_input: field, expected and got say what",
        401: "unauthenticated: no API key, or none of this cluster's",
        403: "forbidden: the key is of another scope",
        404: "not_found",
        406: "not_acceptable",
        408: "body_timeout",
        409: "version_mismatch: the vectors are of another model than the index",
        413: "payload_too_large",
        415: "unsupported_media_type",
        429: "overloaded: try again after Retry-After seconds",
        503: "unavailable, card_failed, version_mismatch or lists_unavailable: try again after "
        "Retry-After seconds; "
        "encoder_unavailable: no Retry-After, because waiting alone mends nothing",
        504: "deadline_exceeded: no shard answered in time",
    }
    return {status: _problem(texts[status]) for status in statuses}


_ARM_HEADER = {
    "name": ARM_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "experiment=arm, or several with commas between them: the search gets these "
    "arms, whatever its experiment_key says",
}
SEARCH_DOC: dict[str, Any] = {
    "tags": ["search"],
    "openapi_extra": {
        "parameters": [_ARM_HEADER],
        "requestBody": {"required": True, "content": _content("SearchBody")},
    },
    "responses": {
        200: {"description": "the answer", "content": _content("SearchResponse")},
        **_problems(400, 401, 406, 408, 413, 415, 429, 503, 504),
    },
}
_WRITE_PROBLEMS: dict[int | str, dict[str, Any]] = {
    **_problems(400, 401, 403, 406, 408, 413, 415),
    **{
        status: _problem(text)
        for status, text in (
            (429, "overloaded, or delta_full: try again after Retry-After seconds"),
            (
                503,
                "not_primary, read_only or unavailable: not all items are written; try again after "
                "Retry-After seconds, with the idempotency_key of the answer",
            ),
            (504, "deadline_exceeded: whether all items are written is not known"),
            (507, "store_full: the disk of a shard is full; searches go on"),
        )
    },
}
_KEY_HEADER = {
    "name": WRITE_KEY_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "maxLength": 128, "pattern": "^[!-~]+$"},
    "description": "makes a repeated request one effect; left out, the router makes one",
}


def _write_doc(body: str, response: str, description: str, *problems: int) -> dict[str, Any]:
    return {
        "tags": ["items"],
        "openapi_extra": {
            "parameters": [_KEY_HEADER],
            "requestBody": {"required": True, "content": _content(body)},
        },
        "responses": {
            200: {"description": description, "content": _content(response)},
            **_WRITE_PROBLEMS,
            **_problems(*problems),
        },
    }


_LIST_WRITES: dict[int | str, dict[str, Any]] = {
    **_problems(408, 413, 415),
    503: _problem("lists_unavailable or read_only: nothing has changed, as far as is known"),
    504: _problem("deadline_exceeded: whether the list was written is not known"),
    507: _problem("store_full: the store's disk is full; searches go on"),
}


def _list_doc(
    response: str,
    description: str,
    problems: dict[int | str, dict[str, Any]] | None = None,
    body: str | None = None,
) -> dict[str, Any]:
    request = {} if body is None else {"requestBody": {"required": True, "content": _content(body)}}
    return {
        "tags": ["lists"],
        "openapi_extra": request,
        "responses": {
            200: {"description": description, "content": _content(response)},
            **_problems(400, 401, 403, 406, 429),
            503: _problem("lists_unavailable: the store does not answer; try again"),
            **(problems or {}),
        },
    }


UPSERT_DOC = _write_doc("UpsertBody", "UpsertResponse", "every item is written", 409)
DELETE_DOC = _write_doc("DeleteBody", "DeleteResponse", "every item is gone")
LIST_NAMES_DOC = _list_doc("ListNamesResponse", "a page of names")
LIST_DOC = _list_doc("ListResponse", "the list", _problems(404))
LIST_PUT_DOC = _list_doc("ListWrittenResponse", "the list is replaced", _LIST_WRITES, "ListBody")
LIST_CHANGE_DOC = _list_doc(
    "ListWrittenResponse", "the list is changed", _LIST_WRITES, "ListChangeBody"
)
LIST_DELETE_DOC = _list_doc("ListWrittenResponse", "there is no such list", _LIST_WRITES)
EVENTS_DOC: dict[str, Any] = {
    "tags": ["events"],
    "openapi_extra": {"requestBody": {"required": True, "content": _content("EventsBody")}},
    "responses": {
        200: {"description": "every event is stored", "content": _content("EventsResponse")},
        **_problems(400, 401, 403, 404, 406, 408, 413, 415, 429),
        **{
            status: {
                "description": text,
                "content": _content("Problem", "application/problem+json"),
            }
            for status, text in (
                (503, "read_only: the disk failed; unavailable: the router is stopping"),
                (504, "deadline_exceeded: whether the events are stored is not known"),
                (507, "store_full: the disk, or the room for events, is full"),
            )
        },
    },
}
ITEM_DOC: dict[str, Any] = {
    "tags": ["items"],
    "responses": {
        200: {"description": "the item", "content": _content("ItemResponse")},
        **_problems(400, 401, 404, 406, 429, 503, 504),
    },
}
STATUS_DOC: dict[str, Any] = {"tags": ["status"], "responses": _problems(401, 503)}
READY_DOC: dict[str, Any] = {
    "tags": ["health"],
    "responses": {503: {"description": "not ready; the body says why"}},
}


def openapi_schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an app whose routes are all there."""
    schema = get_openapi(title=TITLE, version=VERSION, description=DESCRIPTION, routes=app.routes)
    bodies = (
        *(SearchBody, SearchResponse, ItemResponse, Problem),
        *(UpsertBody, UpsertResponse, DeleteBody, DeleteResponse),
        *(ListBody, ListChangeBody, ListResponse, ListWrittenResponse, ListNamesResponse),
        *(EventsBody, EventsResponse),
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template=REF
    )
    components = schema.setdefault("components", {})
    components["schemas"] = {**definitions["$defs"], **FILTER_SCHEMAS, **REARRANGE_SCHEMAS}
    components["securitySchemes"] = {"key": KEY_SCHEME}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)  # FastAPI's own; ours are 400
            scope = needed_scope(method.upper(), path)
            operation["security"] = [] if scope is None else [{"key": []}]
            if scope is not None:
                operation["x-scope"] = scope.value
    return schema


def docs_page(schema: dict[str, Any]) -> str:
    """One self-contained HTML page of an OpenAPI document."""
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    )
    models = "".join(
        _model(name, model) for name, model in sorted(schema["components"]["schemas"].items())
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{TITLE} API</title>'
        f"<style>{STYLE}</style><h1>{TITLE} API</h1><p>{escape(DESCRIPTION)} "
        'The same as <a href="/openapi.json">OpenAPI</a>.</p>'
        f"{operations}<h2>Bodies</h2>{models}"
    )


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #8884;"
    "padding:.3rem .6rem;text-align:left;vertical-align:top}code,pre{font-family:monospace}"
    "pre{background:#8882;padding:.6rem;overflow:auto}h3{margin-top:2rem}"
)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    request = f"<p>Request: {_refs(body)}</p>" if body else ""
    answers = "".join(
        f"<tr><td>{status}<td>{escape(answer['description'])}<td>{_refs(answer.get('content', {}))}"
        for status, answer in sorted(operation["responses"].items())
    )
    return (
        f"<h3><code>{method.upper()} {escape(path)}</code></h3>"
        f"<p>{escape(operation.get('description', ''))} {_key(operation)}</p>{request}"
        f"<table><tr><th>status<th>meaning<th>body{answers}</table>"
    )


def _key(operation: dict[str, Any]) -> str:
    if not operation["security"]:
        return "Open: needs no key."
    return f"Needs an API key of scope {escape(operation['x-scope'])}."


def _refs(content: dict[str, Any]) -> str:
    names = {media: item.get("schema", {}).get("$ref", "") for media, item in content.items()}
    return "<br>".join(
        f"{escape(media)} {_link(ref.rpartition('/')[2])}" for media, ref in names.items()
    )


def _link(name: str) -> str:
    return f'<a href="#{escape(name)}">{escape(name)}</a>'


def _model(name: str, model: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code><td>{_type(details)}"
        f"<td>{escape(details.get('description', ''))}"
        for field, details in model.get("properties", {}).items()
    )
    example = model.get("example")
    shown = f"<pre>{escape(orjson.dumps(example).decode())}</pre>" if example else ""
    return (
        f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{escape(model.get("description", ""))}</p>'
        f"{shown}<table><tr><th>field<th>type<th>meaning{rows}</table>"
    )


def _type(details: dict[str, Any]) -> str:
    if "$ref" in details:
        return _link(details["$ref"].rpartition("/")[2])
    if "anyOf" in details:
        return " or ".join(_type(choice) for choice in details["anyOf"])
    if details.get("type") == "array":
        return f"[{_type(details['items'])}]"
    return escape(str(details.get("type", "any")))
