"""``cap``, ``boost`` and ``diversify`` in bodies, of clients, and on the command line."""

import json
import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.cluster.commands.rearrange_options import rearrange_fields
from shardline.router.client.calls import search_body
from shardline.router.http.codec import decode_query
from shardline.router.http.media import Media
from shardline.router.http.rearrange_body import (
    BOOST_FIELDS,
    CAP_FIELDS,
    DIVERSIFY_FIELDS,
    read_rearrangement,
)
from shardline.router.http.rearrange_schema import REARRANGE_SCHEMAS
from shardline.router.rearrange.rearrangement import Boost, Cap, Rearrangement
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput

CONFIG = RouterConfig(max_k=60, default_k=10)
CAP = {"column": "seller", "max": 2}
BOOST = {"column": "rating", "weight": 0.1}
DATED = {"column": "day", "weight": 1, "half_life_days": 7}


def decoded(media: Media = Media.JSON, **body: Any) -> Rearrangement | None:
    content = {"item_ids": [1], **body}
    packed = json.dumps(content).encode() if media is Media.JSON else msgpack.packb(content)
    return decode_query(packed, media, CONFIG).rearrange


@pytest.mark.parametrize("media", Media)
def test_what_bodies_ask_for(media: Media) -> None:
    assert decoded(media) is None
    for nothing in ({"cap": None}, {"cap": [], "boost": []}, {"diversify": None}):
        assert decoded(media, **nothing) is None
    asked = decoded(
        media,
        cap=[CAP, {"column": "brand", "max": 1}],
        boost=[BOOST, {**DATED, "pool": 30}],
        diversify={"lambda": 1, "pool": 20},
        k=15,
    )
    assert asked == Rearrangement(
        caps=(
            Cap(column="seller", most=2, field="cap[0]"),
            Cap(column="brand", most=1, field="cap[1]"),
        ),
        boosts=(
            Boost(column="rating", weight=0.1, field="boost[0]"),
            Boost(column="day", weight=1.0, half_life_days=7.0, field="boost[1]"),
        ),
        relevance=1.0,
        named_pools=(("boost[1].pool", 30), ("diversify.pool", 20)),
        pool=30,
    )
    one = decoded(media, cap=CAP)
    assert one is not None
    assert one.caps == (Cap(column="seller", most=2, field="cap"),)
    assert one.pool == 60, "the largest k there is"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"cap": 2}, "cap"),
        ({"cap": "seller:2"}, "cap"),
        ({"cap": {"column": "seller"}}, "cap.max"),
        ({"cap": {"max": 2}}, "cap.column"),
        ({"cap": [CAP, {"column": "seller", "max": 0}]}, "cap[1].max"),
        ({"cap": {**CAP, "max": 2049}}, "cap.max"),
        ({"cap": {**CAP, "max": 2**70}}, "cap.max"),
        ({"cap": {**CAP, "max": True}}, "cap.max"),
        ({"cap": {**CAP, "max": 2.0}}, "cap.max"),
        ({"cap": {**CAP, "max": "2"}}, "cap.max"),
        ({"cap": {**CAP, "column": 7}}, "cap.column"),
        ({"cap": {**CAP, "column": ["seller"]}}, "cap.column"),
        ({"cap": {**CAP, "column": "$seller"}}, "cap.column"),
        ({"cap": {**CAP, "column": "s" * 2000}}, "cap.column"),
        ({"cap": {**CAP, "limit": 3}}, "cap.limit"),
        ({"cap": [CAP, CAP]}, "cap[1].column"),
        ({"cap": [CAP] * 9}, "cap"),
        ({"cap": [[CAP]]}, "cap[0]"),
        ({"boost": {"column": "rating"}}, "boost.weight"),
        ({"boost": [{**BOOST, "weight": None}]}, "boost[0].weight"),
        ({"boost": {**BOOST, "weight": "1"}}, "boost.weight"),
        ({"boost": {**DATED, "half_life_days": 0}}, "boost.half_life_days"),
        ({"boost": {**DATED, "half_life_days": -1}}, "boost.half_life_days"),
        ({"boost": {**BOOST, "pool": 9}}, "boost.pool"),
        ({"boost": {**BOOST, "pool": 61}}, "boost.pool"),
        ({"boost": {**BOOST, "pool": 10.5}}, "boost.pool"),
        ({"boost": {**BOOST, "halflife": 1}}, "boost.halflife"),
        ({"boost": [BOOST] * 9}, "boost"),
        ({"diversify": 0.7}, "diversify"),
        ({"diversify": [{"lambda": 0.7}]}, "diversify"),
        ({"diversify": {}}, "diversify.lambda"),
        ({"diversify": {"lambda": 1.01}}, "diversify.lambda"),
        ({"diversify": {"lambda": -0.1}}, "diversify.lambda"),
        ({"diversify": {"lambda": True}}, "diversify.lambda"),
        ({"diversify": {"lambda": 0.5, "pool": 9}}, "diversify.pool"),
        ({"diversify": {"lambda": 0.5, "pool": 2**70}}, "diversify.pool"),
        ({"diversify": {"lambda": 0.5, "mmr": 1}}, "diversify.mmr"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decoded(**body)
    assert caught.value.field == field
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    for body, field in (
        ({"boost": {**BOOST, "weight": value}}, "boost.weight"),
        ({"boost": {**DATED, "half_life_days": value}}, "boost.half_life_days"),
        ({"diversify": {"lambda": value}}, "diversify.lambda"),
    ):
        with pytest.raises(InvalidInput) as caught:
            decoded(Media.MSGPACK, **body)
        assert caught.value.field == field


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def maps(fields: tuple[str, ...]) -> st.SearchStrategy[Any]:
    map_of = st.dictionaries(st.sampled_from([*fields, "x"]), VALUES, max_size=4)
    return VALUES | map_of | st.lists(map_of, max_size=10)


@given(cap=maps(CAP_FIELDS), boost=maps(BOOST_FIELDS), diversify=maps(DIVERSIFY_FIELDS))
@settings(max_examples=500, deadline=None)
def test_any_values_are_refused_or_right(cap: Any, boost: Any, diversify: Any) -> None:
    try:
        asked = read_rearrangement(cap, boost, diversify)
    except InvalidInput as error:
        assert error.field is not None
        assert error.field.partition(".")[0].partition("[")[0] in ("cap", "boost", "diversify")
        return
    if asked is not None:
        assert all(1 <= each.most <= 2048 for each in asked.caps)
        assert all(math.isfinite(each.weight) for each in asked.boosts)
        assert asked.relevance is None or 0 <= asked.relevance <= 1


def test_openapi_describes_the_fields_there_are() -> None:
    for name, fields in (
        ("Cap", CAP_FIELDS),
        ("Boost", BOOST_FIELDS),
        ("Diversify", DIVERSIFY_FIELDS),
    ):
        assert tuple(REARRANGE_SCHEMAS[name]["properties"]) == fields


def test_clients_send_what_they_are_given() -> None:
    body = search_body(
        item_ids=[1],
        k=20,
        cap={"column": "seller", "max": np.int64(2)},
        boost=[{"column": "rating", "weight": np.float32(0.5)}],
        diversify={"lambda": np.float64(0.7)},
    )
    asked = decode_query(body, Media.MSGPACK, CONFIG).rearrange
    assert asked is not None
    assert asked.caps == (Cap(column="seller", most=2, field="cap"),)
    assert asked.boosts == (Boost(column="rating", weight=0.5, field="boost[0]"),)
    assert asked.relevance == 0.7


@pytest.mark.parametrize(
    ("cap", "boost", "diversify", "expected"),
    [
        ((), (), None, {}),
        (("seller:2", "a b:1"), (), None, {"cap": [CAP, {"column": "a b", "max": 1}]}),
        (('{"column": "seller", "max": 2}',), (), None, {"cap": [CAP]}),
        ((), ("rating:0.1", "day:1:7d"), None, {"boost": [BOOST, DATED]}),
        ((), ("rating:-1e-1",), None, {"boost": [{**BOOST, "weight": -0.1}]}),
        ((), (), "0.7", {"diversify": {"lambda": 0.7}}),
        ((), (), "0.7:200", {"diversify": {"lambda": 0.7, "pool": 200}}),
        ((), (), '{"lambda": 0.7}', {"diversify": {"lambda": 0.7}}),
    ],
)
def test_short_forms_of_the_command_line(
    cap: tuple[str, ...], boost: tuple[str, ...], diversify: str | None, expected: dict[str, Any]
) -> None:
    assert rearrange_fields(cap, boost, diversify) == expected


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ((("seller",), (), None), "--cap"),
        ((("seller:two",), (), None), "--cap"),
        ((("a:b:1",), (), None), "--cap"),
        (((":2",), (), None), "--cap"),
        ((('{"column": ',), (), None), "--cap"),
        (((), ("rating",), None), "--boost"),
        (((), ("day:0.1:7",), None), "--boost"),
        (((), ("day:0.1:7h",), None), "--boost"),
        (((), (), "much"), "--diversify"),
        (((), (), "0.7:"), "--diversify"),
    ],
)
def test_other_forms_are_refused(options: Any, option: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        rearrange_fields(*options)
    assert caught.value.field == option
