"""Pages made from the code are up to date; README and docs name what exists, in plain words."""

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml

from shardline.cluster.cli import cli
from shardline.cluster.config import load_config
from shardline.cluster.config_keys import config_sections
from shardline.shards.core.metrics import METRICS
from tests.unit.test_layering import ALLOWED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# every page but the generated tree; CLIENT.md is read like the others
PAGES = sorted(
    {ROOT / "README.md", ROOT / "bench" / "LOG.md", *(ROOT / "docs").rglob("*.md")}
    - {ROOT / "docs" / "TREE.md"}
)
README_LINES = 160
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CALL = re.compile(r"(?:^|\$\(|; |taskset \S+ \S+ )shardline +([^|#;)]*)")
# "per", not "a", stands before what is counted; the others are private words for standard terms
DIALECT = (
    r"\b(?:queries|requests|examples|lines?|bytes?|bits|ms|milliseconds|seconds?|shards?|rows?|"
    r"actors?|tasks?|index|threads?|items?|users?|process|host|key|token|answers?|connections?|"
    r"\d) an? (?:second|query|request|shard|vector|row|user|item|host|frame|run|line|core|group|"
    r"page|batch|step|rank|list|process|connection|client|hit|search|stage|day|level)\b",
    r"\bin a row\b",
    r"\bin turn\b",
    r"\bthe door\b",
    r"\bhand(?:s|ed)? over\b",
    r"\bsettl(?:e|es|ing) down\b",
)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every `shardline` command line, in fenced blocks and in the text."""
    for block in (block for language, block in FENCED.findall(text) if not language):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.split() for part in CALL.findall(line))
    for span in re.findall(r"`shardline ([^`]+)`", FENCED.sub("", text)):
        yield span.split()


def check_command(words: list[str]) -> list[str]:
    """The names of the command and subcommands of a command line; () for a bare placeholder.

    Raises:
        click.UsageError: an unknown command, an option that it does not take, a value too many.
    """
    command: click.Command = cli
    names: list[str] = []
    context = None
    while True:
        context = click.Context(command, parent=context, info_name="shardline")
        _, words, _ = command.make_parser(context).parse_args(list(words))
        if not isinstance(command, click.Group):
            if words:
                raise click.UsageError(f"{names} takes no {words}")
            return names
        if not words or words[0].isupper():
            return names
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]}")
        command, names, words = found, [*names, words[0]], words[1:]


@pytest.mark.parametrize(
    ("page", "text"), [(path.name, text) for path, text in generator().pages().items()]
)
def test_generated_pages_are_up_to_date(page: str, text: str) -> None:
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_module_says_what_it_is() -> None:
    module = generator()
    paths = [path for path in module.tracked_files() if path.suffix == ".py"]
    assert len(paths) > 100
    assert [path for path in paths if len(module.first_line(path)) < 10] == []


def test_the_readme_names_every_package() -> None:
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/*/__init__.py")}
    packages = {f.as_posix() for f in folders if f.parts[0] not in ("tests", "shardline")}
    block = re.search(r"## Where things are.*?```\n(.*?)```", README, re.DOTALL)
    assert block is not None, "README has no tree under 'Where things are'"
    named = set()
    for line in block[1].splitlines():
        folder, _, rest = line.partition("/ ")
        named.add(folder.strip())
        named |= {f"{folder.strip()}/{name}" for name in re.findall(r"\b([a-z]+)/", rest)}
    assert packages <= named


def test_the_readme_is_short_and_says_early_what_is_missing() -> None:
    lines = README.splitlines()
    assert len(lines) <= README_LINES
    assert lines.index("## Limits") < len(lines) / 3


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_commands_exist(path: Path) -> None:
    for words in commands_of(path.read_text(encoding="utf-8")):
        check_command(words)


@pytest.mark.parametrize(
    "line", ["serv", "build --publish", "status now", "bench lode", "--sett a=b build"]
)
def test_commands_that_do_not_exist_are_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        check_command(line.split())


def test_commands_are_found_in_the_readme_and_the_quickstart() -> None:
    quickstart = (ROOT / "docs" / "QUICKSTART.md").read_text(encoding="utf-8")
    lines = [*commands_of(README), *commands_of(quickstart)]
    used = {" ".join(check_command(words)) for words in lines}
    assert {"data synth", "train", "evaluate", "export", "build", "serve", "keys show"} <= used


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_options_set_keys_that_exist(path: Path) -> None:
    for words in commands_of(path.read_text(encoding="utf-8")):
        load_config(overrides=[b for a, b in itertools.pairwise(words) if a == "--set"])


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_yaml_in_a_page_is_a_configuration_of_ours(path: Path, tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        assert isinstance(yaml.safe_load(block), dict)
        (tmp_path / "page.yaml").write_text(block)
        load_config(tmp_path / "page.yaml")


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_files_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    folders = r"(?:cluster|shards|router|training|bench|deploy|tests|docs)"
    named = set(re.findall(rf"`({folders}/[\w/.-]+)`", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_configuration_keys_that_a_page_names_exist(path: Path) -> None:
    known = {f"{p}.{key.name}" for s in config_sections() for p in s.paths for key in s.keys}
    sections = r"(?:index|router|cluster|training)"
    named = set(re.findall(rf"`({sections}\.[a-z_.]+)(?:: [^`]*|=[^`]*)?`", path.read_text()))
    paths = {name: ROOT / name.replace(".", "/") for name in named}
    modules = {n for n, path in paths.items() if path.is_dir() or path.with_suffix(".py").exists()}
    assert named - modules <= known | {p for s in config_sections() for p in s.paths}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_pages_are_written_in_the_words_of_the_field(path: Path) -> None:
    text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
    found = [match[0] for pattern in DIALECT for match in re.finditer(pattern, text)]
    assert found == []


@pytest.mark.parametrize(
    "text", ["1,000 requests a second", "bytes a vector", "three times in a row", "each in turn"]
)
def test_the_words_that_are_refused(text: str) -> None:
    assert any(re.search(pattern, text) for pattern in DIALECT)


def test_the_operations_page_lists_every_metric() -> None:
    page = (ROOT / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(shardline_\w+)` (\|.*)$", page, re.MULTILINE)
    cells = {name: [cell.strip() for cell in row.split("|")] for name, row in rows}
    written = {
        name: (kind, tuple(re.findall(r"\w+", labels)), unit)
        for name, (_, kind, labels, unit, *_) in cells.items()
    }
    assert written == {each.name: (each.kind, each.labels, each.unit) for each in METRICS}


def test_the_architecture_page_says_who_may_import_whom() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page.partition("| folder | may import |")[2].partition("\n\n")[0]
    written = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", table, re.MULTILINE))
    for folder, allowed in ALLOWED.items():
        if folder != "bench":  # may import anything
            assert set(re.findall(r"`([\w.]+)`", written[folder])) == set(allowed)
