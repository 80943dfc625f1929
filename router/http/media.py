"""Which of the two body formats a request comes in, and which its answer is to have."""

from enum import StrEnum
from functools import lru_cache

from shardline.router.contract import NotAcceptable, UnsupportedMediaType


class Media(StrEnum):
    """The two body formats, by their media type."""

    JSON = "application/json"
    MSGPACK = "application/msgpack"


_MEDIA = {
    "application/json": Media.JSON,
    "application/msgpack": Media.MSGPACK,
    "application/x-msgpack": Media.MSGPACK,
    "application/vnd.msgpack": Media.MSGPACK,
}
_WILDCARDS = ("*/*", "application/*")


@lru_cache(maxsize=256)
def body_media(content_type: str) -> Media:
    """The format a Content-Type names.

    Raises:
        UnsupportedMediaType: neither JSON nor msgpack, or none named.
    """
    media = _MEDIA.get(content_type.partition(";")[0].strip().lower())
    if media is None:
        raise UnsupportedMediaType(
            "body format not supported",
            field="Content-Type",
            expected=" or ".join(Media),
            got=content_type or "none",
        )
    return media


@lru_cache(maxsize=256)
def answer_media(accept: str, default: Media) -> Media:
    """The format to answer in: the best of an Accept header, ``default`` where it does not care.

    Raises:
        NotAcceptable: it accepts neither JSON nor msgpack.
    """
    if not accept.strip():
        return default
    best, best_quality = None, 0.0
    for entry in accept.split(","):
        name, _, parameters = entry.partition(";")
        media = default if name.strip() in _WILDCARDS else _MEDIA.get(name.strip().lower())
        quality = _quality(parameters)
        if media is not None and quality > best_quality:
            best, best_quality = media, quality
    if best is None:
        raise NotAcceptable(
            "no acceptable answer format", field="Accept", expected=" or ".join(Media), got=accept
        )
    return best


def _quality(parameters: str) -> float:
    """The q of an Accept entry, 1 when it has none or a wrong one."""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 1.0
    return 1.0
