"""API keys: the file, its digests, and who may read it."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from shardline.cluster.cli import main
from shardline.cluster.config import load_config
from shardline.cluster.serving.serving_keys import (
    CLIENT_VARIABLE,
    SERVER_VARIABLE,
    add_key,
    client_key,
    make_key_file,
    remove_key,
    serving_keys,
)
from shardline.router.http import api_keys
from shardline.router.http.api_keys import Key, Keyring, Scope, digest_of, parse_keys, read_keys
from shardline.shards.core.errors import ConfigError, NotFound, ShardlineError

SEARCH = "s" * 32
WRITE = "w" * 32
ADMIN = "a" * 40 + "=="


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def config_of(tmp_path: Path, *overrides: str):
    return load_config(None, [f"store={tmp_path / 'store'}", *overrides])


def test_a_file_holds_a_key_a_line_and_comments() -> None:
    lines = ["# ours", "", f"search:{SEARCH}", f"  admin : {ADMIN} ", "#search:old"]
    assert parse_keys(lines, "f") == [Key(Scope.SEARCH, SEARCH), Key(Scope.ADMIN, ADMIN)]


@pytest.mark.parametrize(
    "line",
    [
        "search",
        SEARCH,
        f"read:{SEARCH}",
        f"Search:{SEARCH}",
        "search:",
        f"search:{'x' * 31}",
        f"search:{'x' * 257}",
        f"search:{SEARCH} x",
        f"search:{SEARCH}é",
        f"search:{SEARCH}\x00",
        f"search:{'=' * 40}",
    ],
)
def test_what_is_no_key_is_refused_by_its_line_and_never_repeated(line: str) -> None:
    with pytest.raises(ConfigError, match=r"f: .*line 2") as caught:
        parse_keys([f"admin:{ADMIN}", line], "f")
    shown = str(caught.value)
    assert "sss" not in shown
    assert "xxx" not in shown


def test_a_key_that_comes_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="line 2 is there already"):
        parse_keys([f"search:{SEARCH}", f"admin:{SEARCH}"], "f")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_may_use_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "keys", f"search:{SEARCH}", mode)
    with pytest.raises(ConfigError, match=rf"expected mode 600; got mode {mode:o}; chmod 600"):
        read_keys(path)
    path.chmod(0o600)
    assert read_keys(path) == [Key(Scope.SEARCH, SEARCH)]
    path.chmod(0o400)
    assert len(read_keys(path)) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such key file"):
        read_keys(tmp_path / "keys")
    with pytest.raises(NotFound, match="no such key file"):
        read_keys(write(tmp_path / "file", "") / "keys")
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=r"folder: not a regular file; .*got a folder"):
        read_keys(tmp_path / "folder")
    (tmp_path / "binary").write_bytes(b"search:\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(ConfigError, match="ASCII"):
        read_keys(tmp_path / "binary")


def test_a_ring_knows_its_keys_and_no_others() -> None:
    ring = Keyring.of([Key(Scope.SEARCH, SEARCH), Key(Scope.ADMIN, ADMIN)])
    assert ring.scope_of(SEARCH.encode()) is Scope.SEARCH
    assert ring.scope_of(ADMIN.encode()) is Scope.ADMIN
    for wrong in (b"", SEARCH[:-1].encode(), SEARCH.upper().encode(), digest_of(SEARCH.encode())):
        assert ring.scope_of(wrong) is None
    assert Keyring(()).scope_of(SEARCH.encode()) is None


def test_every_digest_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def count(ours: bytes, theirs: bytes) -> bool:
        compared.append(ours)
        return ours == theirs

    monkeypatch.setattr("shardline.router.http.api_keys.hmac.compare_digest", count)
    keys = [Key(Scope.SEARCH, letter * 32) for letter in "abcde"]
    ring = Keyring.of(keys)
    for key in keys:
        compared.clear()
        assert ring.scope_of(key.secret.encode()) is Scope.SEARCH
        assert compared == [each.digest for each in keys]


def test_neither_ring_nor_repr_holds_a_key(tmp_path: Path) -> None:
    keys = serving_keys(config_of(tmp_path), {SERVER_VARIABLE: f"search:{SEARCH},admin:{ADMIN}"})
    for text in (repr(keys), repr(Key(Scope.SEARCH, SEARCH)), keys.note, str(keys.auth)):
        assert SEARCH not in text
        assert ADMIN not in text
    sent = pickle.dumps(keys.auth)
    assert SEARCH.encode() not in sent
    assert ADMIN.encode() not in sent
    assert keys.own == SEARCH


def test_a_key_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    before = os.umask(0)
    try:
        keys = serving_keys(config, {})
    finally:
        os.umask(before)
    path = tmp_path / "store" / "keys"
    assert path.stat().st_mode & 0o777 == 0o600
    assert f"made {path}, mode 600" in keys.note
    made = read_keys(path)
    assert [key.scope for key in made] == [Scope.SEARCH, Scope.WRITE, Scope.ADMIN]
    assert all(len(key.secret) >= 43 for key in made)
    assert len({key.secret for key in made}) == 3
    assert keys.auth.key_file == str(path)
    assert keys.auth.keyring == Keyring.of(made)
    assert not any(key.secret in keys.note for key in made)
    again = serving_keys(config, {})
    assert again.auth == keys.auth, "a file that is there is left alone"
    assert again.note == f"API keys: {path}"
    assert list(path.parent.iterdir()) == [path], "no temporary file stays"


def test_keys_come_from_one_place(tmp_path: Path) -> None:
    named = write(tmp_path / "mine", f"search:{SEARCH}")
    file = f"cluster.key_file={named}"
    keys = serving_keys(config_of(tmp_path, file), {})
    assert (keys.auth.key_file, keys.own) == (str(named), SEARCH)
    assert not (tmp_path / "store").exists()
    environ = {SERVER_VARIABLE: f"\nsearch:{SEARCH}\nadmin:{ADMIN}\n", "OTHER": "1"}
    keys = serving_keys(config_of(tmp_path), environ)
    assert environ == {"OTHER": "1"}, "taken out, so that no process inherits the keys"
    assert keys.auth.key_file is None
    assert keys.auth.keyring is not None
    assert len(keys.auth.keyring.digests) == 2
    for overrides, environ in (
        ([file], {SERVER_VARIABLE: f"search:{SEARCH}"}),
        ([file, "cluster.insecure=true"], {}),
        (["cluster.insecure=true"], {SERVER_VARIABLE: f"search:{SEARCH}"}),
    ):
        with pytest.raises(ConfigError, match="from one place only"):
            serving_keys(config_of(tmp_path, *overrides), environ)


def test_a_cluster_without_any_key_does_not_start(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", "# none yet\n")
    with pytest.raises(ConfigError, match="no key in it"):
        serving_keys(config_of(tmp_path, f"cluster.key_file={empty}"), {})
    with pytest.raises(ConfigError, match="no key in it"):
        serving_keys(config_of(tmp_path), {SERVER_VARIABLE: " "})
    with pytest.raises(NotFound, match="no such key file"):
        serving_keys(config_of(tmp_path, f"cluster.key_file={tmp_path / 'gone'}"), {})


def test_insecure_says_so_loudly_and_makes_no_file(tmp_path: Path) -> None:
    keys = serving_keys(config_of(tmp_path, "cluster.insecure=true"), {})
    assert keys.note.startswith("INSECURE: no API key is asked for")
    assert keys.auth.keyring is None
    assert not (tmp_path / "store").exists()


def test_keys_are_replaced_without_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "store" / "keys"
    make_key_file(path)
    old, *others = read_keys(path)
    added = add_key(path, Scope.SEARCH)
    assert read_keys(path) == [old, *others, added]
    remove_key(path, old.fingerprint[:6])
    assert read_keys(path) == [*others, added]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().startswith("# The API keys")
    for fingerprint in ("", "zz", old.fingerprint):
        with pytest.raises(NotFound, match="fingerprint"):
            remove_key(path, fingerprint)
    fresh = tmp_path / "elsewhere"
    made = add_key(fresh, Scope.ADMIN)
    assert read_keys(fresh) == [made]


def test_an_unsafe_file_is_not_added_to(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", f"search:{SEARCH}\n", 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        add_key(path, Scope.SEARCH)


def test_a_client_takes_the_key_it_is_told_and_the_weakest_that_will_do(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", f"admin:{ADMIN}\nsearch:{SEARCH}\n")
    environ = {CLIENT_VARIABLE: f" {ADMIN}\n"}
    assert client_key(path, environ) == SEARCH
    assert client_key(None, environ) == ADMIN
    assert client_key(None, {CLIENT_VARIABLE: ""}) is None
    assert client_key(None, {}) is None
    assert client_key(path, environ, scope=Scope.WRITE) == ADMIN
    more = write(tmp_path / "more", f"admin:{ADMIN}\nwrite:{WRITE}\nsearch:{SEARCH}\n")
    assert client_key(more, {}, scope=Scope.WRITE) == WRITE
    only = write(tmp_path / "admin", f"admin:{ADMIN}\n")
    assert client_key(only, {}) == ADMIN
    with pytest.raises(ShardlineError, match="no key in it"):
        client_key(write(tmp_path / "none", "\n"), {})


def test_keys_that_this_user_may_not_read_are_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(api_keys, "open_regular", refuse)
    for arguments in (("keys", "list"), ("query", "--url", "http://127.0.0.1:1", "--item", "3")):
        with pytest.raises(SystemExit) as ended:
            option = ("--key-file", "x") if arguments[0] == "query" else ()
            main(["--store", str(tmp_path), *arguments, *option])
        assert ended.value.code == 3
        assert "cannot be read; got Permission denied" in capsys.readouterr().err
