"""Generation folders: round trip, checksums, and every way in which one can be damaged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardline.bench.vectors import manifold
from shardline.shards.core.errors import CorruptFile, NewerFormat, NotFound
from shardline.shards.core.files import MANIFEST_NAME, write_manifest
from shardline.shards.storage.generation import (
    FORMAT_VERSION,
    GenerationManifest,
    read_generation,
    read_item_ids,
    shard_folder,
    verify_generation,
    verify_item_encoder,
    verify_query_encoder,
    verify_shard,
    write_item_ids,
)
from tests.engine import build_generation

IDS = np.arange(0, 400, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "000007"


@pytest.fixture
def manifest(folder: Path) -> GenerationManifest:
    vectors = manifold(200, 8, 4, seed=1)
    encoder = {"config.json": b"{}", "model.safetensors": b"weights"}
    items = {"encoder.json": b"{}"}
    return build_generation(
        folder, vectors, IDS, 3, kind="ivf", query_encoder=encoder, item_encoder=items
    )


def test_manifest_round_trips(folder: Path, manifest: GenerationManifest) -> None:
    assert read_generation(folder) == manifest
    assert manifest.rows == 200
    assert [(e.shard, e.rows, e.id_min, e.id_max) for e in manifest.shards] == [
        (0, 66, 0, 130),
        (1, 67, 132, 264),
        (2, 67, 266, 398),
    ]
    assert [file.name for file in manifest.shards[1].files] == [
        "shard-00001/index.faiss",
        "shard-00001/item_ids.npy",
    ]
    verify_generation(folder, manifest)
    assert verify_shard(folder, manifest, 2) == manifest.shards[2]
    assert verify_query_encoder(folder, manifest) == folder / "query_encoder"
    assert verify_item_encoder(folder, manifest) == folder / "item_encoder"
    assert [entry.name for entry in manifest.item_encoder] == ["item_encoder/encoder.json"]


def test_a_generation_without_an_encoder_says_so(tmp_path: Path) -> None:
    manifest = build_generation(tmp_path, manifold(20, 8, 4, seed=1), np.arange(20), 1, kind="flat")
    with pytest.raises(NotFound, match="no query encoder"):
        verify_query_encoder(tmp_path, manifest)
    with pytest.raises(NotFound, match="no item encoder; export the model again and build"):
        verify_item_encoder(tmp_path, manifest)


def test_a_manifest_of_before_item_encoders_is_read(
    folder: Path, manifest: GenerationManifest
) -> None:
    rewrite(folder, lambda body: body.pop("item_encoder"), version=FORMAT_VERSION)
    found = read_generation(folder)
    assert found == replace(manifest, item_encoder=())
    verify_generation(folder, found)


@pytest.mark.parametrize(
    "name",
    [
        "template.faiss",
        "query_encoder/model.safetensors",
        "item_encoder/encoder.json",
        "shard-00000/index.faiss",
        "shard-00002/item_ids.npy",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_every_damaged_file_is_named(
    folder: Path, manifest: GenerationManifest, name: str, damage: str
) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[-1]
    elif damage == "grow":
        content.append(0)
    path.unlink() if damage == "remove" else path.write_bytes(content)
    with pytest.raises(CorruptFile) as caught:
        verify_generation(folder, manifest)
    assert str(path) in str(caught.value)


def test_a_shard_is_verified_alone(folder: Path, manifest: GenerationManifest) -> None:
    (folder / "shard-00001" / "index.faiss").write_bytes(b"")
    verify_shard(folder, manifest, 0)
    with pytest.raises(CorruptFile):
        verify_shard(folder, manifest, 1)


@pytest.mark.parametrize("shard", [-1, 3])
def test_no_such_shard(folder: Path, manifest: GenerationManifest, shard: int) -> None:
    with pytest.raises(NotFound, match="generation 7 has no shard"):
        verify_shard(folder, manifest, shard)


def test_absent_and_incomplete_generations(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_generation(tmp_path / "nowhere")
    with pytest.raises(NotFound):
        read_generation(tmp_path)


def rewrite(folder: Path, change, version: int = 1) -> None:
    """The manifest changed by somebody who knows how to compute its checksum."""
    body = json.loads((folder / MANIFEST_NAME).read_text())
    for key in ("kind", "format_version", "checksum"):
        del body[key]
    change(body)
    write_manifest(folder, kind="generation", version=version, body=body)


def test_a_newer_format_is_refused(folder: Path, manifest: GenerationManifest) -> None:
    rewrite(folder, lambda body: None, version=FORMAT_VERSION + 1)
    with pytest.raises(NewerFormat, match="newer than this program"):
        read_generation(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("metric"),
        lambda body: body.update(metric="hamming"),
        lambda body: body.update(dim="many"),
        lambda body: body.update(shards=[]),
        lambda body: body.update(shards=5),
        lambda body: body["shards"].reverse(),
        lambda body: body["shards"][0].pop("files"),
        lambda body: body["shards"][0].update(more=1),
        lambda body: body["index"].pop("factory"),
        lambda body: body["index"].update(more=1),
        lambda body: body["spec"].update(kind="annoy"),
        lambda body: body.update(template=None),
    ],
)
def test_a_manifest_that_contradicts_itself_is_corrupt(
    folder: Path, manifest: GenerationManifest, change
) -> None:
    rewrite(folder, change)
    with pytest.raises(CorruptFile, match=MANIFEST_NAME):
        read_generation(folder)


def test_a_shard_that_lists_no_index_is_corrupt(folder: Path, manifest: GenerationManifest) -> None:
    rewrite(folder, lambda body: body["shards"][0]["files"].pop(0))
    with pytest.raises(CorruptFile, match=r"shard 0 does not list index\.faiss"):
        verify_shard(folder, read_generation(folder), 0)


def test_a_flipped_manifest_is_corrupt(folder: Path, manifest: GenerationManifest) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace('"rows": 67', '"rows": 68', 1))
    with pytest.raises(CorruptFile, match="wrong checksum"):
        read_generation(folder)


def test_shard_folders_sort_by_number() -> None:
    assert [shard_folder(n) for n in (0, 12, 345)] == ["shard-00000", "shard-00012", "shard-00345"]


def test_item_ids_round_trip(tmp_path: Path) -> None:
    ids = np.array([0, 5, 2**62])
    write_item_ids(tmp_path / "ids.npy", ids)
    got = read_item_ids(tmp_path / "ids.npy", rows=3)
    assert got.dtype == np.int64
    assert got.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([1, 2]), "wrong row count; expected 3; got 2"),
        (np.array([1, 3, 2]), "not ascending"),
        (np.array([1, 2, 2]), "not ascending"),
        (np.array([-1, 2, 3]), "not ascending"),
        (np.array([1.0, 2.0, 3.0]), "wrong contents"),
        (np.array([[1, 2, 3]]), "wrong contents"),
        (np.array([1, 2, 3], np.int32), "wrong contents"),
    ],
)
def test_wrong_item_ids_are_refused(tmp_path: Path, content: np.ndarray, message: str) -> None:
    np.save(tmp_path / "ids.npy", content)
    with pytest.raises(CorruptFile, match=message):
        read_item_ids(tmp_path / "ids.npy", rows=3)


@pytest.mark.parametrize("size", [0, 10, 100, 150])
def test_truncated_item_ids_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "ids.npy"
    write_item_ids(path, np.arange(3))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptFile, match=r"ids\.npy"):
        read_item_ids(path, rows=3)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([{"a": 1}, 2, 3], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptFile, match="not a numpy array"):
        read_item_ids(tmp_path / "ids.npy", rows=3)
    np.savez(tmp_path / "many.npz", a=np.arange(3))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    with pytest.raises(CorruptFile):
        read_item_ids(tmp_path / "many.npy", rows=3)


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def two_generations(root: Path) -> tuple[Path, Path]:
    vectors = manifold(20, 8, 4, seed=1)
    folders = root / "000001", root / "000002"
    for place, folder in enumerate(folders):
        build_generation(folder, vectors[::-1] if place else vectors, np.arange(20), 2, kind="flat")
    return folders


def test_a_generation_in_the_folder_of_another_is_refused(tmp_path: Path) -> None:
    one, two = two_generations(tmp_path)
    exchange(one, two)
    for folder, number, other in ((one, 1, 2), (two, 2, 1)):
        with pytest.raises(
            CorruptFile,
            match=f"another generation's folder; expected the manifest of generation {number}; "
            f"got that of generation {other}",
        ):
            read_generation(folder)
    exchange(one, two)
    assert read_generation(one).generation == 1
    one.rename(tmp_path / "a copy")
    assert read_generation(tmp_path / "a copy").generation == 1, "a name that promises no number"


def test_shards_exchanged_within_a_generation_or_between_two_are_refused(tmp_path: Path) -> None:
    one, two = two_generations(tmp_path)
    manifest = read_generation(one)
    exchange(one / shard_folder(0), one / shard_folder(1))
    for shard in range(2):
        with pytest.raises(CorruptFile, match="wrong"):
            verify_shard(one, manifest, shard)
    exchange(one / shard_folder(0), one / shard_folder(1))
    exchange(one / shard_folder(1), two / shard_folder(1))
    verify_shard(one, manifest, 0)
    with pytest.raises(CorruptFile, match="wrong"):
        verify_shard(one, manifest, 1)
