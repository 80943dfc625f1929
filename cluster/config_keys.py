"""Every key of the configuration as data, for `shardline config` and docs/CONFIG.md.

Types, defaults and ranges come from the models' JSON schema. A description may begin with the unit
in brackets, "[rows] ..."; a name with one of the endings in ``UNITS`` has that unit.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardline.cluster.config import ShardlineConfig

UNITS = {"_ms": "ms", "_s": "s", "_bytes": "bytes", "_mib": "MiB", "_steps": "steps"}
UNITS["epochs"] = "epochs"
TYPES = {"string": "text", "boolean": "true or false", "null": "null", "object": "map"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One value. ``default`` is written as in YAML; "required" if there is none."""

    name: str
    type: str
    default: str
    unit: str
    range: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The keys of one model, and every dotted path at which the model occurs."""

    paths: tuple[str, ...]
    about: str
    keys: tuple[Key, ...]


def config_sections() -> tuple[Section, ...]:
    """All sections, parents before children; the path of the outermost one is ""."""
    schema = ShardlineConfig.model_json_schema()
    paths: dict[str, list[str]] = {}
    models: dict[str, dict[str, Any]] = {}
    waiting = [("", schema)]
    for path, model in waiting:  # grows while it is read
        title = model["title"]
        models[title] = model
        paths.setdefault(title, []).append(path)
        for name, field in model["properties"].items():
            for child in _models(field, schema["$defs"]):
                kind = child["properties"].get("kind", {}).get("const")
                below = f"{path}.{name}".lstrip(".")
                waiting.append((f"{below}[{kind}]" if kind else below, child))
    return tuple(
        Section(
            paths=tuple(paths[title]),
            about=" ".join(model["description"].split()),
            keys=tuple(_keys(model, schema["$defs"])),
        )
        for title, model in models.items()
    )


def _models(field: dict[str, Any], defined: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The models that the value of a field, or the elements of its list, are made of."""
    if "$ref" in field and "properties" in (model := _target(field, defined)):
        yield model
    for part in (*field.get("anyOf", ()), *field.get("oneOf", ()), field.get("items")):
        yield from _models(part, defined) if part else ()


def _keys(model: dict[str, Any], defined: dict[str, Any]) -> Iterator[Key]:
    for name, field in model["properties"].items():
        if "const" in field or "properties" in _target(field, defined):
            continue  # the name of a kind; a section of its own
        unit, bracket, meaning = field["description"].partition("] ")
        by_name = (unit for ending, unit in UNITS.items() if name.endswith(ending))
        types = [_type(part, defined) for part in field.get("anyOf", [field])]
        yield Key(
            name=name,
            type=" or ".join(kind for kind, _ in types),
            default=json.dumps(field["default"]).strip('"') if "default" in field else "required",
            unit=unit[1:] if bracket else next(by_name, ""),
            range="".join(bounds for _, bounds in types),
            meaning=meaning if bracket else field["description"],
        )


def _type(field: dict[str, Any], defined: dict[str, Any]) -> tuple[str, str]:
    """(type, legal range) of one alternative of a field, in words; the range may be empty."""
    field = _target(field, defined)
    if "enum" in field:
        return "choice", " | ".join(field["enum"])
    if "oneOf" in field or "properties" in field:
        return "section", ""
    if field["type"] == "array":
        parts = field.get("prefixItems") or [field["items"]]
        kind, bounds = _type(parts[0], defined)
        if kind == "section" and "maxItems" in field:
            bounds = f"{field.get('minItems', 0)} to {field['maxItems']} sections"
        return f"{len(parts) if 'prefixItems' in field else 'list of'} {kind}s", bounds
    return TYPES.get(field["type"], field["type"]), _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    first = f"above {above:,}" if above is not None else f"{low:,}" if low is not None else ""
    last = f"below {below:,}" if below is not None else f"{high:,}" if high is not None else ""
    if "maxLength" in field:
        return f"at most {field['maxLength']} characters"
    return f"{first} to {last}" if last else f"{first} or more" if low is not None else first


def _target(field: dict[str, Any], defined: dict[str, Any]) -> dict[str, Any]:
    """The definition that a field refers to, or the field itself."""
    target: dict[str, Any] = defined[field["$ref"].rpartition("/")[2]] if "$ref" in field else field
    return target
