"""Named lists through the clients and the command line, over a real HTTP server."""

import asyncio
import json

import numpy as np
import pytest

from shardline.cluster.cli import main
from shardline.router.client.async_client import AsyncClient
from shardline.router.client.sync_client import Client
from shardline.router.contract import Forbidden
from shardline.router.http.api_keys import Key, Keyring, Scope
from shardline.router.http.auth import AuthSettings, Guard
from shardline.router.router_config import RouterConfig
from shardline.shards.core.errors import InvalidInput, ListsUnavailable, NotFound
from tests.client_pair import KINDS
from tests.live_router import running_router

WRITE, SEARCH = Key(Scope.WRITE, "w" * 43), Key(Scope.SEARCH, "s" * 43)
GUARD = Guard(AuthSettings(keyring=Keyring.of([WRITE, SEARCH])))


@pytest.fixture
def router():
    with running_router(RouterConfig(), GUARD) as router:
        yield router


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_from_python(router, kind):
    with kind(router.url, key=WRITE.secret) as client:
        made = client.put_list("seen:17", np.array([3, 1, 3]))
        assert (made.name, made.version, made.ids, made.existed) == ("seen:17", 1, 2, False)
        assert client.change_list("seen:17", add=[7], remove=[1]).version == 2
        found = client.get_list("seen:17")
        assert (found.version, found.item_ids.tolist()) == (2, [3, 7])
        assert found.item_ids.dtype == np.int64
        assert client.search(item_ids=[1], k=3, exclude_lists=["seen:17"]).ids.shape == (1, 3)
        assert client.delete_list("seen:17").existed
        assert not client.delete_list("seen:17").existed
        with pytest.raises(NotFound):
            client.get_list("seen:17")
        with pytest.raises(InvalidInput) as caught:
            client.search(item_ids=[1], exclude_lists="seen:17")
        assert caught.value.field == "exclude_lists"
    with kind(router.url, key=SEARCH.secret) as client, pytest.raises(Forbidden):
        client.put_list("a", [1])


@pytest.mark.parametrize("ids", [[1.5], ["1"], [True], [-1], [[1]]])
def test_ids_that_would_change_on_the_way_are_not_sent(ids):
    with Client("http://127.0.0.1:1") as client:
        for ask in (client.put_list, lambda name, ids: client.change_list(name, add=ids)):
            with pytest.raises(InvalidInput):
                ask("a", ids)


@pytest.mark.parametrize("name", ["a/b", "..", "", "ä", "a?b", "a b"])
def test_names_that_are_none_are_not_sent(name):
    with Client("http://127.0.0.1:1") as client:
        for ask in (client.get_list, client.delete_list, lambda n: client.put_list(n, [1])):
            with pytest.raises(InvalidInput):
                ask(name)


def test_names_of_all_pages(router, monkeypatch):
    names = {f"seen:{number}" for number in range(25)} | {"a&b=c", "x+y", "(!)"}
    with Client(router.url, key=WRITE.secret) as client:
        for name in names:
            client.put_list(name, [1])
        monkeypatch.setattr("shardline.router.lists.list_names_page.MAX_READ", 4)
        assert sorted(client.lists()) == sorted(names)
        assert list(client.lists("a&")) == ["a&b=c"]

        async def found():
            async with AsyncClient(router.url, key=SEARCH.secret) as other:
                return [name async for name in other.lists("seen:1")]

        assert sorted(asyncio.run(found())) == sorted(n for n in names if n.startswith("seen:1"))


def test_a_store_that_went_away_is_an_error_of_its_own(router):
    (router.store / "generations" / "000001").rmdir()
    (router.store / "generations").rmdir()
    with Client(router.url, key=WRITE.secret) as client:
        client._retry = type(client._retry)(attempts=1)
        with pytest.raises(ListsUnavailable):
            client.search(item_ids=[1], exclude_lists=["blocked"])
        assert client.search(item_ids=[1]).ids.size


@pytest.fixture
def run(router, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text(f"search:{SEARCH.secret}\nwrite:{WRITE.secret}\n")
    keys.chmod(0o600)

    def command(*arguments):
        code = 0
        try:
            main([*arguments, "--url", router.url, "--key-file", str(keys)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_the_commands(run, tmp_path):
    assert run("lists", "put", "blocked", "5", "3,4")[:2] == (
        0,
        "blocked: created, 3 ids, version 1\n",
    )
    assert run("lists", "add", "blocked", "9")[1] == "blocked: changed, 4 ids, version 2\n"
    assert run("lists", "remove", "blocked", "5", "3")[1] == "blocked: changed, 2 ids, version 3\n"
    assert run("lists", "show", "blocked")[1] == "blocked: 2 ids, version 3\n4 9\n"
    (tmp_path / "sold.csv").write_text("item_id,title\n7,a\n8,b\n")
    code, out, _ = run("lists", "add", "sold-out", "--file", "sold.csv", "--json")
    assert code == 0
    assert json.loads(out) == {"name": "sold-out", "version": 1, "ids": 2, "existed": False}
    shown = json.loads(run("lists", "show", "sold-out", "--json")[1])
    assert shown == {"name": "sold-out", "version": 1, "item_ids": [7, 8]}
    assert sorted(run("lists", "names")[1].split()) == ["blocked", "sold-out"]
    code, out, err = run("lists", "names", "--limit", "1")
    assert (len(out.split()), "more than 1" in err) == (1, True)
    assert json.loads(run("lists", "names", "sold", "--json")[1]) == {
        "names": ["sold-out"],
        "is_all": True,
    }
    assert run("lists", "delete", "sold-out")[1] == "sold-out: deleted\n"
    assert run("lists", "delete", "sold-out")[1] == "sold-out: there is no such list\n"
    code, _, err = run("lists", "show", "sold-out")
    assert (code, "sold-out" in err) == (3, True)
    code, out, _ = run("query", "--item", "1", "--exclude-list", "blocked", "--json")
    assert code == 0
    code, _, err = run("query", "--item", "1", "--exclude-list", "a/b")
    assert (code, "--exclude-list" in err) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("put", "a", "x"),
        ("put", "a", "-1"),
        ("put", "a/b", "1"),
        ("add", "a", "--file"),
        ("add", "a", "--file", "missing.csv"),
    ],
)
def test_wrong_arguments_write_nothing(run, router, arguments):
    code, _, err = run("lists", *arguments)
    assert code != 0
    assert err
    assert not (router.store / "lists").exists()
