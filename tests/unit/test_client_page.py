"""docs/CLIENT.md: its examples run in order, its table of errors and defaults is the code's."""

import re
from pathlib import Path
from typing import Any

import shardline
from shardline.router.contract import REFUSALS
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import ShardlineError
from tests.live_router import DIM, running_router

PAGE = (Path(__file__).parents[2] / "docs" / "CLIENT.md").read_text(encoding="utf-8")
KEY = "k" * 43


def test_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 8
    guard = Guard(AuthSettings(keyring=Keyring.of([Key(Scope.WRITE, KEY)])))
    with running_router(RouterConfig(), guard) as router:
        names: dict[str, Any] = {"key": KEY}
        for example in examples:
            here = example.replace("http://localhost:8000", router.url).replace("128", str(DIM))
            exec(compile(here, "docs/CLIENT.md", "exec"), names)
    assert len(names["best"]) == 4
    assert (names["written"].created, names["gone"].deleted) == (2, 2)
    assert names["found"].ids.tolist() == [[7000001]] or names["found"].seq[-1] == 1
    assert [reason.query for reason in names["answer"].reasons] == [1]


def test_errors_are_those_that_are_raised() -> None:
    rows = re.findall(r"^\| `([A-Z]\w+)` \| `([a-z_]+)` \|", PAGE, re.MULTILINE)
    for name, code in rows:
        assert getattr(shardline, name).code == code
    exported = (getattr(shardline, name) for name in shardline.__all__)
    errors = {each.__name__ for each in exported if issubclass(each, ShardlineError)}
    assert {name for name, _ in rows} == errors - {"ShardlineError"}
    assert errors & {each.__name__ for each in REFUSALS}


def test_defaults_are_the_codes() -> None:
    rows = re.findall(r"^\| `(\w+_?\w*)` \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert {name: float(value) for name, value in rows} == {
        name: float(getattr(shardline.Retry(), name)) for name in shardline.Retry.__slots__
    }
