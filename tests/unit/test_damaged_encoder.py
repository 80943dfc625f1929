"""A query encoder that is not as it was written: its reader finds out, only features fail."""

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from shardline.router import encoder_loading as module
from shardline.router.encoder.query_encoder import QueryEncoder
from shardline.router.fanout.snapshot import load_query_encoder
from shardline.router.http.api import create_app
from shardline.router.limits import resolve
from shardline.router.router_config import RouterConfig
from shardline.router.service import SearchService
from shardline.shards.core.encoder_files import CONFIG, MappedArrays, read_encoder, write_encoder
from shardline.shards.core.errors import (
    CorruptFile,
    EncoderUnavailable,
    NewerFormat,
    NotFound,
    ShardlineError,
)
from shardline.shards.core.files import sha256_of
from shardline.shards.core.messages import Absence, RoutingTable
from shardline.shards.core.small_files import read_small
from tests.fake_encoder import FakeEncoder
from tests.fake_shard import SECRET, make_rows, make_table, running_shards, until

DIM = 8
FAST = RouterConfig(backoff_base_ms=1, backoff_max_ms=5, default_timeout_ms=10_000)
IDS, VECTORS = make_rows(60, DIM)
WEIGHTS, ROWS, PAST = "weights.safetensors", "history.rows.npy", "history.item_ids.npy"
GOOD = {"country": "CA", "past": [3]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A generation's folder with an encoder of embeddings and a mapped history."""
    rng = np.random.default_rng(0)
    encoder = tmp_path / "generation" / "query_encoder"
    encoder.mkdir(parents=True)
    history = MappedArrays(encoder, 10)
    rows = rng.standard_normal((10, DIM)).astype(np.float32)
    history.write(0, {"history.item_ids": np.arange(10), "history.rows": rows})
    config = {
        "model_version": "m1",
        "dim": DIM,
        "projection": "identity",
        "features": [
            {
                "kind": "categorical",
                "column": "country",
                "value_type": "string",
                "values": ["CA", "UK"],
            },
            {"kind": "history", "column": "past", "max_length": 4, "pooling": "mean"},
        ],
    }
    table = rng.standard_normal((3, DIM)).astype(np.float32)
    write_encoder(encoder, config, {"embedding.0": table})
    return encoder.parent


def table_of(folder: Path, shards: list, **changes: object) -> RoutingTable:
    checksum = sha256_of(folder / "query_encoder" / CONFIG)
    content = {"generation_dir": str(folder), "encoder_checksum": checksum}
    return make_table(shards, DIM, **(content | changes))


def flip(path: Path, place: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def test_whatever_bit_flips_in_whatever_file_is_found(folder: Path) -> None:
    checksum = sha256_of(folder / "query_encoder" / CONFIG)
    files = sorted((folder / "query_encoder").iterdir())
    assert len(files) == 4
    rng = np.random.default_rng(1)
    QueryEncoder.load(folder / "query_encoder", checksum)
    for path in files:
        for place in (0, path.stat().st_size - 1, *rng.integers(0, path.stat().st_size, 20)):
            bit = 1 << int(rng.integers(0, 8))
            flip(path, int(place), bit)
            with pytest.raises(CorruptFile, match=path.name):
                QueryEncoder.load(folder / "query_encoder", checksum)
            flip(path, int(place), bit)
    QueryEncoder.load(folder / "query_encoder", checksum)


async def test_the_same_encoder_of_another_generation_is_not_loaded_while_writes_wait(
    folder: Path, tmp_path: Path
) -> None:
    """It is loaded afterwards: the files that it has mapped may go with their generation."""
    other, loaded, may_load = tmp_path / "other", [], threading.Event()
    shutil.copytree(folder, other)

    def load_encoder(table: RoutingTable) -> QueryEncoder:
        if loaded:
            assert may_load.wait(10)
        loaded.append(table.generation)
        return QueryEncoder.load(Path(table.generation_dir) / "query_encoder")

    async with (
        running_shards(IDS, VECTORS, 2) as before,
        running_shards(IDS, VECTORS, 2, generation=2) as after,
    ):
        service = SearchService(FAST, SECRET, load_encoder=load_encoder)
        try:
            await service.apply(table_of(folder, before))
            assert await service.mend_encoder()
            assert service._fanout.snapshot is not None
            first = service._fanout.snapshot.encoder
            table = table_of(other, after, generation=2, version=2)
            async with asyncio.timeout(5):
                await service.apply(table)
            assert service._fanout.snapshot.encoder is first and loaded == [1]
            may_load.set()
            assert await service.mend_encoder()
            assert loaded == [1, 2] and service._fanout.snapshot.encoder is not first
            assert await service.mend_encoder() and loaded == [1, 2]
            others = ({"model_version": "m2"}, {"encoder_checksum": "0" * 64})
            for number, changes in enumerate(others, 3):
                where = {"generation_dir": str(folder), "generation": number, "version": number}
                await service.apply(replace(table, **where, **changes))
                assert loaded[-1] == number, "another one"
                table = service._fanout.snapshot.table
        finally:
            may_load.set()
            await service.close()


async def test_an_encoder_that_cannot_be_loaded_anew_serves_on(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    async with (
        running_shards(IDS, VECTORS, 2) as before,
        running_shards(IDS, VECTORS, 2, generation=2) as after,
    ):
        service = SearchService(FAST, SECRET)
        try:
            await service.apply(table_of(folder, before))
            await service.apply(table_of(other, after, generation=2, version=2))
            path = other / "query_encoder" / WEIGHTS
            flip(path, 0)
            assert not await service.mend_encoder()
            assert isinstance(service._fanout.snapshot.encoder, QueryEncoder)  # type: ignore[union-attr]
            flip(path, 0)
            assert await service.mend_encoder()
        finally:
            await service.close()


def test_without_a_checksum_from_outside_a_config_of_another_meaning_would_pass(
    folder: Path,
) -> None:
    """Why the manifest's is needed: one bit makes CA to CC, and nothing else notices."""
    path = folder / "query_encoder" / CONFIG
    checksum = sha256_of(path)
    path.write_bytes(path.read_bytes().replace(b'"CA"', b'"CC"'))
    read_encoder(folder / "query_encoder")
    with pytest.raises(CorruptFile, match=r"encoder\.json: wrong checksum"):
        read_encoder(folder / "query_encoder", checksum)


def test_what_is_parsed_is_what_was_verified(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is altered as soon as it has been read once: nothing reads it again."""
    encoder = folder / "query_encoder"
    checksum = sha256_of(encoder / CONFIG)
    expected = QueryEncoder.load(encoder, checksum).encode([GOOD])

    def read_then_altered(path: Path, limit: int) -> bytes:
        content = read_small(path, limit)
        path.write_bytes(content.replace(b"CA", b"CB").replace(content[-9:], b"x" * 9))
        return content

    monkeypatch.setattr("shardline.shards.core.encoder_files.read_small", read_then_altered)
    found = QueryEncoder.load(encoder, checksum).encode([GOOD])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(CorruptFile):
        QueryEncoder.load(encoder, checksum)


def test_large_weights_are_verified_without_being_held_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = folder / "query_encoder"
    monkeypatch.setattr("shardline.shards.core.encoder_files.AT_ONCE_BYTES", 10)
    QueryEncoder.load(encoder)
    flip(encoder / "weights.safetensors", -1)
    with pytest.raises(CorruptFile, match=r"weights\.safetensors: missing or altered"):
        QueryEncoder.load(encoder)


@pytest.mark.parametrize("change", [{"features": [{}]}, {"features": 3}, {"projection": "linear"}])
def test_a_config_that_makes_no_tower_is_corrupt(folder: Path, change: dict[str, object]) -> None:
    path = folder / "query_encoder" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptFile, match="not a query encoder"):
        QueryEncoder.load(folder / "query_encoder")


def test_a_routers_encoder_is_the_one_that_the_table_lists(folder: Path) -> None:
    table = table_of(folder, [])
    assert load_query_encoder(table) is not None
    assert load_query_encoder(replace(table, encoder_checksum=None)) is None
    shutil.rmtree(folder / "query_encoder")
    with pytest.raises(NotFound, match=r"encoder\.json: no query encoder here"):
        load_query_encoder(table)


@contextlib.asynccontextmanager
async def serving(**changes: object) -> AsyncIterator[SearchService]:
    folder = changes.pop("folder")
    assert isinstance(folder, Path)
    async with running_shards(IDS, VECTORS, 3) as shards:
        service = SearchService(FAST, SECRET)
        await service.apply(table_of(folder, shards, **changes))
        yield service
        await service.close()


async def search(service: SearchService, **query: object):
    arrived_at = asyncio.get_running_loop().time()
    return await service.search(resolve(service.config, **query), arrived_at=arrived_at)


def flip_value(encoder: Path) -> None:
    """CA becomes CC."""
    path = encoder / CONFIG
    flip(path, path.read_bytes().find(b"CA") + 1, 2)


DAMAGE = {
    "one value": (flip_value, CorruptFile),
    "one bit of the syntax": (lambda encoder: flip(encoder / CONFIG, 0), CorruptFile),
    "an empty config": (lambda encoder: (encoder / CONFIG).write_bytes(b""), CorruptFile),
    "no config": (lambda encoder: (encoder / CONFIG).unlink(), NotFound),
    "a bit of the weights": (lambda encoder: flip(encoder / WEIGHTS, -1), CorruptFile),
    "a bit of the history": (lambda encoder: flip(encoder / ROWS, -1), CorruptFile),
    "ids of the history cut": (lambda encoder: (encoder / PAST).write_bytes(b""), CorruptFile),
    "no folder": (shutil.rmtree, NotFound),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_with_a_damaged_encoder_only_features_fail(folder: Path, damage: str) -> None:
    harm, kind = DAMAGE[damage]
    async with running_shards(IDS, VECTORS, 3) as shards:
        table = table_of(folder, shards)
        harm(folder / "query_encoder")
        service = SearchService(FAST, SECRET)
        assert await service.apply(table)
        with pytest.raises(EncoderUnavailable) as refused:
            await search(service, features=[GOOD])
        assert (refused.value.field, refused.value.got) == ("features", kind.code)
        assert (await search(service, vectors=VECTORS[:1], k=3)).coverage.share == 1.0
        assert (await search(service, item_ids=[3], k=3)).coverage.share == 1.0
        arrived_at = asyncio.get_running_loop().time()
        assert (await service.item(3, arrived_at=arrived_at)).item_id == 3
        assert service.ready()[0]
        status = service.status()
        assert status["encoder"] is None
        (warning,) = status["warnings"]
        assert (warning["about"], warning["code"]) == ("query_encoder", kind.code)
        assert str(folder) in warning["text"]
        await service.close()


async def test_over_http_it_is_a_problem_with_a_code_of_its_own(folder: Path) -> None:
    async with running_shards(IDS, VECTORS, 3) as shards:
        table = table_of(folder, shards)
        flip(folder / "query_encoder" / CONFIG, 0)
        service = SearchService(FAST, SECRET)
        await service.apply(table)
        transport = httpx.ASGITransport(app=create_app(service, FAST))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            refused = await http.post("/v1/search", json={"features": [GOOD]})
            assert (refused.status_code, refused.json()["code"]) == (503, "encoder_unavailable")
            assert "retry-after" not in refused.headers, "waiting alone mends nothing"
            assert str(folder) not in refused.text, "paths are for who looks after the cluster"
            answered = await http.post("/v1/search", json={"item_ids": [3]})
            assert answered.status_code == 200
            report = (await http.get("/v1/status")).json()
            assert [each["about"] for each in report["warnings"]] == ["query_encoder"]
        await service.close()


async def test_a_restored_encoder_is_loaded_without_a_restart(folder: Path, tmp_path: Path) -> None:
    encoder = folder / "query_encoder"
    shutil.copytree(encoder, tmp_path / "copy")
    async with running_shards(IDS, VECTORS, 3) as shards:
        table = table_of(folder, shards)
        flip(encoder / "weights.safetensors", -1)
        service = SearchService(FAST, SECRET)
        await service.apply(table)
        assert not await service.mend_encoder()
        await service.apply(replace(table, version=2))  # shards come and go meanwhile
        shutil.copytree(tmp_path / "copy", encoder, dirs_exist_ok=True)
        assert await service.mend_encoder()
        assert (await search(service, features=[GOOD], k=3)).coverage.share == 1.0
        assert service.status()["warnings"] == []
        assert await service.mend_encoder(), "there is nothing to do"
        await service.close()


async def test_an_encoder_on_a_share_that_hangs_keeps_no_table_waiting_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ENCODER_WAIT_S", 0.02)
    answers, calls = threading.Event(), []

    def load(table: RoutingTable) -> FakeEncoder:
        calls.append(table.generation)
        answers.wait()
        return FakeEncoder(DIM)

    async with running_shards(IDS, VECTORS, 3) as shards:
        service = SearchService(FAST, SECRET, load_encoder=load)
        try:
            async with asyncio.timeout(5):
                await service.apply(make_table(shards, DIM))
            assert (await search(service, vectors=VECTORS[:1], k=3)).coverage.share == 1.0
            with pytest.raises(EncoderUnavailable):
                await search(service, features=[{"slope": 1.0}])
            assert not await service.mend_encoder()
            assert calls == [1], "one thread waits, however often it is looked at"
        finally:
            answers.set()
        assert await service.mend_encoder()
        assert (await search(service, features=[{"slope": 1.0}], k=3)).coverage.share == 1.0
        await service.close()


@pytest.mark.parametrize("error", [NewerFormat("x: newer"), KeyError("x"), MemoryError()])
async def test_whatever_a_load_raises_is_no_reason_to_answer_nothing(error: Exception) -> None:
    def load(table: RoutingTable) -> FakeEncoder:
        raise error

    async with running_shards(IDS, VECTORS, 3) as shards:
        service = SearchService(FAST, SECRET, load_encoder=load)
        assert await service.apply(make_table(shards, DIM))
        assert (await search(service, vectors=VECTORS[:1], k=3)).coverage.share == 1.0
        (warning,) = service.status()["warnings"]
        expected = error.code if isinstance(error, ShardlineError) else "unavailable"
        assert warning["code"] == expected
        await service.close()


async def test_the_controllers_notes_are_in_the_status(folder: Path) -> None:
    notes = (Absence("corrupt_file", "counter.json: not a counter"),)
    async with serving(folder=folder, notes=notes) as service:
        await until(lambda: service.ready()[0])
        assert service.status()["warnings"] == [
            {"about": "state", "code": "corrupt_file", "text": "counter.json: not a counter"}
        ]
