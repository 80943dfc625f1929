"""Bodies of any bytes and of any values: an InvalidInput, or a query that passes every check."""

import json

import msgpack
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardline.router.http.codec import (
    MANY_FIELDS,
    ORIGIN_FIELDS,
    PARAM_FIELDS,
    SEARCH_FIELDS,
    decode_query,
)
from shardline.router.http.media import Media
from shardline.router.query import QueryKind, ResolvedQuery
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.schema import Metric, check_ids, query_vectors

DIM = 2
CONFIG = RouterConfig(max_k=50, default_k=5)
NUMBERS = (
    st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.sampled_from([2**31, -(2**31) - 1, 1e39, -0.0, True])
)
ARRAYS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["<f4", "<f8", "<i4", "<i8", ">f4", "<f2", "O", 1]),
        "shape": st.lists(st.integers(-1, 3) | st.just(2**62), max_size=3),
        "data": st.binary(max_size=4) | st.sampled_from([bytes(8), bytes(16), b"\xff" * 8]),
    }
)
VALUES = st.recursive(
    st.none() | NUMBERS | st.text(max_size=4) | st.binary(max_size=4) | ARRAYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
KEYS = st.text(max_size=3) | st.binary(max_size=3) | st.just(b"z" * 400)  # msgpack has both
FIELDS = st.sampled_from([*SEARCH_FIELDS, "vector", ""])
VECTORS = st.lists(st.lists(NUMBERS, max_size=3), max_size=3) | ARRAYS | VALUES
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "vectors": VECTORS,
        "item_ids": st.lists(NUMBERS, max_size=3) | ARRAYS,
        "features": st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=2),
        "exclude": st.lists(st.lists(NUMBERS, max_size=3) | ARRAYS, max_size=3) | VALUES,
        "exclude_history": st.booleans() | VALUES,
        "k": NUMBERS | VALUES,
        "timeout_ms": NUMBERS,
        "min_coverage": NUMBERS,
        "params": st.dictionaries(st.sampled_from(["nprobe", "ef_search", "x"]), NUMBERS),
    },
) | st.dictionaries(FIELDS, VALUES, max_size=4)


def accept(body: bytes, media: Media) -> ResolvedQuery | None:
    """The query of a body that passes all checks of a router; None for a refused one."""
    try:
        query = decode_query(body, media, CONFIG)
        if query.kind is QueryKind.VECTORS:
            vectors = query_vectors(query.values, dim=DIM, metric=Metric.COSINE)
            assert vectors.dtype == np.float32
            assert vectors.shape[1:] == (DIM,)
            assert np.isfinite(vectors).all()
        elif query.kind is QueryKind.ITEM_IDS:
            assert (check_ids(query.values) >= 0).all()
    except InvalidInput as error:
        assert error.field is not None
        return None
    assert len(query.excluded) in (0, len(query.values))
    for ids in query.excluded:
        assert ids.dtype == np.int64
        assert ids.tolist() == sorted({*ids.tolist()})
        assert ids.min(initial=0) >= 0
    assert not query.exclude_history or query.kind is QueryKind.FEATURES
    assert 1 <= query.k <= CONFIG.max_k
    assert 0 < query.timeout_ms <= CONFIG.max_timeout_ms
    assert 0 <= query.min_coverage <= 1
    return query


@pytest.mark.parametrize("media", list(Media))
@given(body=st.binary(max_size=200))
@settings(max_examples=300)
def test_random_bytes_are_refused(media: Media, body: bytes) -> None:
    # hypothesis tries literals of the modules loaded, which may be bodies of other tests
    assume(not any(kind.encode() in body for kind in QueryKind))
    assert accept(body, media) is None, "no random bytes are a query"


@given(content=BODIES)
@settings(max_examples=500)
def test_any_msgpack_value_is_refused_or_right(content: dict) -> None:
    accept(msgpack.packb(content), Media.MSGPACK)


@given(
    content=BODIES,
    beside=st.fixed_dictionaries(
        {},
        optional={
            "features": st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=2),
            "params": st.dictionaries(KEYS | st.sampled_from(PARAM_FIELDS), NUMBERS, max_size=5),
            "min_seq_of": st.dictionaries(st.sampled_from(ORIGIN_FIELDS), NUMBERS, max_size=2),
        },
    )
    | st.dictionaries(KEYS, VALUES, max_size=2),
    size=st.sampled_from([0, MANY_FIELDS]),
    padded=FIELDS | KEYS,
)
@settings(max_examples=500)
def test_any_msgpack_key_is_refused_or_right(content, beside, size, padded) -> None:
    """Also in bodies whose fields are looked at before all else."""
    content = content | beside
    if size:
        content |= {padded: [0.5] * (size // 8)}
    accept(msgpack.packb(content), Media.MSGPACK)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({b"zz": 0, "x": "a" * 20000}, "b'zz'"),
        ({"params": {b"z" * 30000: 0}}, None),
        ({"params": {b"z" * 30000: 0, "a": 1, "b": 1, "c": 1}}, None),
        ({b"z" * 30000: 0}, None),
        ({b"k": 0}, "b'k'"),
    ],
)
def test_a_key_of_bytes_is_named(content: dict, field: str | None) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_query(msgpack.packb(content), Media.MSGPACK, CONFIG)
    assert field is None or caught.value.field == field
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("shape", [[], [1]])
@pytest.mark.parametrize("size", [0, MANY_FIELDS])
def test_an_array_of_one_number_is_a_feature(shape: list[int], size: int) -> None:
    array = {"dtype": "<f4", "shape": shape, "data": np.float32(0.5).tobytes()}
    content = {"features": [{"a": array, "b": "b" * size}]}
    (features,) = decode_query(msgpack.packb(content), Media.MSGPACK, CONFIG).values
    assert features["a"] == ([0.5] if shape else 0.5)
    array["data"] = np.float32(np.nan).tobytes()
    with pytest.raises(InvalidInput, match="not finite"):
        decode_query(msgpack.packb(content), Media.MSGPACK, CONFIG)


@given(content=BODIES)
@settings(max_examples=500)
def test_any_json_value_is_refused_or_right(content: dict) -> None:
    accept(json.dumps(content, default=lambda value: value.hex()).encode(), Media.JSON)


@given(st.data())
@settings(max_examples=500)
def test_a_good_body_with_flipped_bytes_is_refused_or_right(data: st.DataObject) -> None:
    media = data.draw(st.sampled_from(list(Media)))
    vectors = np.ones((2, DIM), "<f4")
    array = {"dtype": "<f4", "shape": [2, DIM], "data": vectors.tobytes()}
    good = (
        msgpack.packb({"vectors": array, "k": 3, "params": {"nprobe": 4}})
        if media is Media.MSGPACK
        else json.dumps({"vectors": vectors.tolist(), "k": 3, "timeout_ms": 20}).encode()
    )
    assert accept(good, media) is not None
    body = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    accept(bytes(body), media)
