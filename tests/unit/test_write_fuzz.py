"""Bodies of writes of any values: an InvalidInput that names a field, or columns of one length."""

import json

import msgpack
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.router.featured_writes import encoded
from shardline.router.http.media import Media
from shardline.router.http.write_codec import (
    DELETE_FIELDS,
    ITEM_FIELDS,
    UPSERT_FIELDS,
    decode_delete,
    decode_upsert,
)
from shardline.router.router_config import RouterConfig
from shardline.router.written import Upserts, delete_parts, upsert_parts
from shardline.shards.core.errors import InvalidInput
from shardline.shards.core.messages import RoutingTable
from shardline.shards.core.schema import Metric
from tests.fake_encoder import small_item_encoder
from tests.fake_shard import make_table
from tests.unit.test_codec_fuzz import ARRAYS, KEYS, NUMBERS, VALUES

CONFIG = RouterConfig()
DIM = 5
ENCODER = small_item_encoder(DIM)
ROWS = st.lists(NUMBERS, min_size=DIM, max_size=DIM) | ARRAYS | VALUES
IDS = st.integers(-1, 5) | NUMBERS
ATTRIBUTES = st.dictionaries(KEYS, VALUES, max_size=3) | VALUES
# what the item encoder takes, and anything else in its place
TAKEN = {
    "category": st.sampled_from(["film", "song", "", None]),
    "tags": st.none() | st.lists(st.sampled_from(["x", "y", "z", None]), max_size=4),
    "size": st.none() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False),
    "released": st.none() | st.integers(-(10**9), 10**11) | st.just("2014-05-13T16:53:20+02:00"),
}
FEATURES = st.fixed_dictionaries({name: taken | VALUES for name, taken in TAKEN.items()})
# with a category: of nothing known this tower makes a vector of zeros
GOOD_FEATURES = st.fixed_dictionaries(TAKEN | {"category": st.sampled_from(["film", "song"])})
COLUMNS = st.fixed_dictionaries(
    {name: st.lists(taken, min_size=1, max_size=3) | ARRAYS for name, taken in TAKEN.items()}
)
ITEMS = (
    st.fixed_dictionaries(
        {"item_id": IDS, "vector": ROWS}, optional={"attributes": ATTRIBUTES, "features": VALUES}
    )
    | st.fixed_dictionaries(
        {"item_id": IDS, "features": FEATURES | VALUES}, optional={"attributes": ATTRIBUTES}
    )
    | st.dictionaries(st.sampled_from(ITEM_FIELDS) | KEYS, VALUES, max_size=4)
)
BODIES = (
    st.fixed_dictionaries(
        {"items": st.lists(ITEMS, max_size=3)},
        optional={"model_version": VALUES, "timeout_ms": NUMBERS},
    )
    | st.fixed_dictionaries(
        {"item_ids": st.lists(IDS, max_size=3) | ARRAYS, "vectors": st.lists(ROWS, max_size=3)},
        optional={
            "attributes": st.dictionaries(KEYS, st.lists(VALUES, max_size=3) | ARRAYS, max_size=3)
        },
    )
    | st.fixed_dictionaries(
        {"item_ids": st.lists(IDS, max_size=3) | ARRAYS, "features": COLUMNS | VALUES},
        optional={"attributes": st.dictionaries(KEYS, st.lists(VALUES, max_size=3), max_size=2)},
    )
    | st.dictionaries(st.sampled_from([*UPSERT_FIELDS, *DELETE_FIELDS]) | KEYS, VALUES, max_size=4)
)


def table(metric: Metric = Metric.COSINE) -> RoutingTable:
    return make_table([], DIM, metric=metric, boundaries=(3,))


def accept(body: bytes, media: Media) -> int:
    """Items of a body that a router would send on; 0 for a refused one."""
    try:
        given_items = decode_upsert(body, media, CONFIG)
        assert isinstance(given_items, Upserts)
        count = len(given_items.item_ids)
        by = given_items.vectors if given_items.features is None else given_items.features
        assert count == len(by) > 0
        if given_items.features is not None:
            given_items = encoded(given_items, ENCODER)
        assert all(len(values) == count for values in given_items.attributes.values())
        parts = upsert_parts(given_items, table(), "key")
    except InvalidInput as error:
        assert error.field is not None
    else:
        for part in parts:
            message = part.message
            assert np.isfinite(message.vectors).all()
            assert (message.item_ids >= 0).all()
            columns = msgpack.unpackb(message.attributes) if message.attributes else {}
            assert all(len(values) == part.items for values in columns.values())
            json.dumps(columns, allow_nan=False)
        return sum(part.items for part in parts)
    try:
        return sum(
            part.items for part in delete_parts(decode_delete(body, media, CONFIG), table(), "")
        )
    except InvalidInput as error:
        assert error.field is not None
    return 0


@given(content=BODIES)
@settings(max_examples=500)
def test_any_msgpack_value_is_refused_or_right(content: dict) -> None:
    accept(msgpack.packb(content), Media.MSGPACK)


@given(content=BODIES)
@settings(max_examples=500)
def test_any_json_value_is_refused_or_right(content: dict) -> None:
    text = json.dumps(_with_texts(content), default=lambda value: value.hex())
    accept(text.encode(), Media.JSON)


def _with_texts(value):
    """Keys of bytes as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _with_texts(each) for key, each in value.items()}
    return [_with_texts(each) for each in value] if isinstance(value, list) else value


@given(st.data())
@settings(max_examples=300)
def test_a_good_body_with_flipped_bytes_is_refused_or_right(data: st.DataObject) -> None:
    media = data.draw(st.sampled_from(list(Media)))
    by_vector, by_features = {"vector": [1.0] * DIM}, {"features": data.draw(GOOD_FEATURES)}
    written = data.draw(st.sampled_from([by_vector, by_features]))
    content = {"items": [{"item_id": 4, **written, "attributes": {"a": [1, "x"]}}]}
    good = msgpack.packb(content) if media is Media.MSGPACK else json.dumps(content).encode()
    assert accept(good, media) == 1
    body = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    accept(bytes(body), media)
