"""docs/LISTS.md: its examples run, and its limits are those of the configuration."""

import re
from pathlib import Path
from typing import Any

from shardline.router.client.sync_client import Client
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.http.list_api import MAX_PAGE
from shardline.router.list_names import MAX_EXCLUDE_LISTS, MAX_NAME, is_list_name
from shardline.router.lists.list_service import MAX_IDS_OF_ALL
from shardline.router.router_config import RouterConfig
from tests.live_router import running_router

PAGE = (Path(__file__).parents[2] / "docs" / "LISTS.md").read_text(encoding="utf-8")
KEY = "k" * 43


def test_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 2
    guard = Guard(AuthSettings(keyring=Keyring.of([Key(Scope.WRITE, KEY)])))
    with running_router(RouterConfig(), guard) as router, Client(router.url, key=KEY) as client:
        user = {"slope": 1.0}
        names: dict[str, Any] = {"client": client, "user": user, "profile": user}
        for example in examples:
            exec(compile(example, "docs/LISTS.md", "exec"), names)
        assert client.get_list("seen:17").item_ids.tolist() == [4711, 90210]
        names["block"](7, 9)
        assert client.get_list("block:7").item_ids.tolist() == [9]
        assert client.get_list("block:9").item_ids.tolist() == [7]


def test_limits_are_the_codes() -> None:
    rows = re.findall(r"^\| ([a-z ]+?) \| ([\d,]+) \|(?: `router\.(\w+)`)? \|$", PAGE, re.MULTILINE)
    found = {key or what: int(limit.replace(",", "")) for what, limit, key in rows}
    config = RouterConfig()
    keys = ("max_list_ids", "max_lists", "max_listed_ids")
    assert found == {
        **{key: getattr(config, key) for key in keys},
        "lists that a search names": MAX_EXCLUDE_LISTS,
        "these ids times the queries of a request": MAX_IDS_OF_ALL,
        "names per page": MAX_PAGE,
    }
    assert config.lists_fresh_ms == 100


def test_the_characters_of_names_are_the_codes() -> None:
    match = re.search(r"letters and digits of ASCII and `(.*?)`", PAGE)
    assert match is not None
    told = set(match[1])
    printable = {chr(code) for code in range(256) if not chr(code).isalnum()}
    assert {each for each in printable if is_list_name(f"a{each}")} == told
    assert f"1 to {MAX_NAME} characters" in PAGE
