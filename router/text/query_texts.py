"""Texts in queries, replaced by the vectors that the text encoder gives them.

A search by ``texts`` becomes one by features, if the query tower reads a text and nothing else. In
a search by features a text may stand where a feature of a text's vector is expected.
"""

from dataclasses import replace
from typing import Any

from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.limits import check_text
from shardline.router.query import QueryKind, ResolvedQuery
from shardline.router.text.text_encoding import TextEncoding
from shardline.shards.core.errors import InvalidInput


async def with_vectors(
    encoding: TextEncoding, snapshot: TableSnapshot, query: ResolvedQuery, deadline: float
) -> ResolvedQuery:
    """A query by texts or by features as one by features without texts.

    Raises:
        InvalidInput: the generation takes no text, or a text is too long.
        EncoderUnavailable, VersionMismatch: the query encoder, or as ``TextEncoding.encode``.
        Overloaded, DeadlineExceeded, Unavailable: as ``TextEncoding.encode``.
    """
    by_text = query.kind is QueryKind.TEXTS
    if not by_text and not any(str in map(type, row.values()) for row in query.values):
        return query
    encoder = snapshot.query_encoder(query.kind)
    known: dict[str, str] = getattr(encoder, "text_encoders", {})
    if by_text:
        name = _only_feature(encoder.features, known)
        rows = [{name: text} for text in query.values]
    else:
        rows = query.values
    places = [
        (row, name)
        for row, features in enumerate(rows)
        for name in known
        if type(features.get(name)) is str
    ]
    if not places:
        return query
    fields = [f"texts[{row}]" if by_text else f"features[{row}].{name}" for row, name in places]
    texts = [rows[row][name] for row, name in places]
    for text, field in zip(texts, fields, strict=True):
        check_text(text, field)
    wanted = {known[name] for _, name in places}
    vectors = await encoding.encode(texts, fields, wanted=wanted, deadline=deadline)
    filled = [dict(features) for features in rows]
    for (row, name), vector in zip(places, vectors, strict=True):
        filled[row][name] = vector.tolist()
    return replace(query, kind=QueryKind.FEATURES, values=filled)


def _only_feature(features: Any, known: dict[str, str]) -> str:
    """The name of the one feature that there is, if it takes a text."""
    names = [feature["name"] for feature in features]
    if len(names) == 1 and names[0] in known:
        return str(names[0])
    takes = ", ".join(sorted(known))
    raise InvalidInput(
        "this generation cannot be searched by texts alone"
        if known
        else "this generation takes no texts",
        field=QueryKind.TEXTS,
        expected=f"features: {', '.join(names)}" if names else None,
        hint=f"send features, with a text as {takes}"
        if known
        else "its query tower reads no text of `shardline data embed-text --of users`, and its "
        "vectors were not built with `shardline build --text-encoder`",
    )
