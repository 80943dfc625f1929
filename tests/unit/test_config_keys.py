"""`shardline config` and docs/CONFIG.md: every key of the models, with unit, range and meaning."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from shardline.cluster.cli import main
from shardline.cluster.config import ShardlineConfig
from shardline.cluster.config_keys import Key, Section, config_sections

SECTIONS = config_sections()
KEYS = [
    pytest.param(section, key, id=f"{section.paths[0]}.{key.name}".lstrip("."))
    for section in SECTIONS
    for key in section.keys
]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def kind_of(model: type[BaseModel]) -> str | None:
    choices = (
        get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
    )
    return choices[0] if len(choices) == 1 else None


def model_at(path: str) -> type[BaseModel]:
    """The model at a section's path, found through pydantic's fields and not the JSON schema."""
    model: type[BaseModel] = ShardlineConfig
    for name, kind in re.findall(r"(\w+)(?:\[(\w+)\])?", path):
        found = {kind_of(each): each for each in models_in(model.model_fields[name].annotation)}
        model = found[kind or None]
    return model


def all_models(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {m for field in model.model_fields.values() for m in models_in(field.annotation)}
    return {model}.union(*(all_models(each) for each in inner))


def test_every_model_is_a_section_once() -> None:
    found = [model_at(section.paths[0]) for section in SECTIONS]
    assert len(found) > 10
    assert set(found) == all_models(ShardlineConfig)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.paths[0])
def test_a_section_has_the_keys_of_its_model(section: Section) -> None:
    for model in map(model_at, section.paths):
        plain = {
            name
            for name, field in model.model_fields.items()
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
        }
        assert {key.name for key in section.keys} == plain - ({"kind"} if kind_of(model) else set())
        assert len(section.about.split()) > 2, "a model says in its docstring what it configures"


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_has_a_meaning_and_a_number_its_unit_and_range(
    section: Section, key: Key
) -> None:
    assert len(key.meaning.split()) > 1
    assert key.meaning.endswith(".")
    assert not re.search(r"[\[\]]", key.unit)
    if re.search(r"integer|number", key.type):
        assert key.unit, 'the description begins with the unit, as in "[rows] ..."'
        assert re.match(r"(above )?-?\d", key.range), "a number has a lower bound"
    if key.type.startswith("choice"):
        assert " | " in key.range


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_default_is_written_as_in_yaml(section: Section, key: Key) -> None:
    field = model_at(section.paths[0]).model_fields[key.name]
    if key.default == "required":
        assert field.default is PydanticUndefined
        return
    expected = field.get_default(call_default_factory=True)
    written = yaml.safe_load(key.default)
    if isinstance(expected, tuple):
        assert tuple(written) == expected
    elif isinstance(expected, bool | int | float | dict) or expected is None:
        assert written == expected
    else:
        assert written == str(expected)


def test_units_and_ranges_of_a_few_keys() -> None:
    keys = {f"{s.paths[0]}.{key.name}": key for s in SECTIONS for key in s.keys}
    assert keys["router.default_timeout_ms"].unit == "ms"
    assert keys["router.default_timeout_ms"].range == "above 0 to 600,000"
    assert keys["router.max_batch"].unit == "queries"
    assert keys["index.nlist"].type == "integer or null"
    assert keys["index.nlist"].range == "1 to 1,048,576"
    assert keys["training.seed"].range == "0 to below 2,147,483,648"
    assert keys["training.micro_batch"].range == "1 or more"
    assert keys["training.towers.query.hidden"].type == "list of integers"
    assert keys["training.towers.query.features[text].words"].type == "2 integers or null"
    assert keys["training.towers.query.features[id].column"].default == "required"


def test_the_command_prints_a_section_and_those_below(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["config", "router"])
    shown = capsys.readouterr().out
    (router,) = (section for section in SECTIONS if section.paths == ("router",))
    assert shown.startswith(f"router: {router.about[:30]}")
    below = [s for s in SECTIONS if s.paths[0].startswith("router.")]
    assert [
        line.split(":")[0].strip() for line in shown.splitlines() if re.match("  [a-z]", line)
    ] == [key.name for section in (router, *below) for key in section.keys]
    assert "  max_batch: 1024  (integer, 1 to 65,536, queries)\n" in shown


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("training.loss", ["training.loss"]),
        ("training.towers.item.features[text]", ["training.towers.query.features[text]"]),
        (
            "training.towers.query.features",
            [p for s in SECTIONS if (p := s.paths[0]).startswith("training.towers.query.features")],
        ),
    ],
)
def test_json_holds_the_same(
    name: str, wanted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["config", "--json", name])
    shown = json.loads(capsys.readouterr().out)
    assert [section["paths"][0] for section in shown] == wanted
    expected = [dataclasses.asdict(s) for s in SECTIONS if s.paths[0] in wanted]
    assert shown == json.loads(json.dumps(expected))


def test_an_unknown_section_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["config", "rooter"])
    assert "one of training, index, cluster, router" in capsys.readouterr().err
