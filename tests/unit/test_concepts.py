"""docs/CONCEPTS.md: what it names exists, who is cited is listed, its bytes are those of the code.

Links, paths and configuration keys with dots are those of all pages: ``test_docs``.
"""

import re
from pathlib import Path

import pytest

from shardline.cluster.config_keys import config_sections
from shardline.shards.core.schema import Metric
from shardline.shards.index.resolve import resolve
from shardline.shards.index.spec import IndexSpec, ResolvedIndex
from shardline.shards.index.template import bytes_to_come

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "CONCEPTS.md").read_text(encoding="utf-8")
BODY, _, PAPERS = PAGE.partition("\n## Papers\n")
LINES = 250
ROWS, DIM, ID_BYTES = 10**9, 128, 8
VALUES = {"expected_count"}  # names with an underscore that are values of a key, no keys


def sections() -> dict[str, str]:
    parts = BODY.split("\n## ")[1:]
    return {part.partition("\n")[0]: part for part in parts}


def billion(kind: str) -> ResolvedIndex:
    return resolve(IndexSpec(kind=kind), rows=ROWS, dim=DIM, metric=Metric.COSINE)


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) <= LINES


@pytest.mark.parametrize("title", sections())
def test_every_section_names_papers_and_modules(title: str) -> None:
    text = sections()[title]
    assert re.search(r"\*Papers\*:.*?\[\d+\]", text, re.DOTALL)
    if title == "Retrieval":  # the task alone
        return
    code = text.partition("*Code*:")[2].partition("*Papers*")[0]
    modules = re.findall(r"`((?:cluster|router|shards|training|bench)/[\w/]+\.py)`", code)
    assert modules
    assert [name for name in modules if not (ROOT / name).is_file()] == []


def test_papers_are_listed_once_with_a_year_and_each_is_cited() -> None:
    listed = re.findall(r"^(\d+)\. (.*)$", PAPERS, re.MULTILINE)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    assert [text for _, text in listed if not re.search(r"\b(?:19|20)\d\d\)?\.$", text)] == []
    assert {int(number) for number in re.findall(r"\[(\d+)\]", BODY)} == {int(n) for n, _ in listed}


def test_settings_that_it_names_exist() -> None:
    keys = {key.name for section in config_sections() for key in section.keys}
    text = re.sub(r"^```.*?^```", "", BODY, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text))
    assert "mask_same_user" in named
    assert named - VALUES <= keys


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "sq8", "pq", "ivfpq", "ivfpq-fs"])
def test_bytes_of_a_billion_are_those_of_the_code(kind: str) -> None:
    row = re.search(rf"^\| `{kind}` \| .*?(\d+) \| (\d+) \| (\d+) GB \|$", BODY, re.MULTILINE)
    assert row is not None
    per_vector, with_id, total = map(int, row.groups())
    assert per_vector == round(bytes_to_come(billion(kind), dim=DIM, metric=Metric.COSINE))
    assert (with_id, total) == (per_vector + ID_BYTES, (per_vector + ID_BYTES) * ROWS // 10**9)


def test_lists_of_a_billion_are_those_of_the_code() -> None:
    nlist = billion("ivfpq-fs").nlist
    assert nlist is not None
    assert f"{nlist:,}, of 10⁹ / {nlist:,} = {round(ROWS / nlist):,} rows each" in BODY
