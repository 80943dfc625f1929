"""What `demo` says before and after: steps numbered, figures as measured, commands as they are."""

from pathlib import Path

import click
import pytest

from shardline.cluster.cli import COMMANDS, cli
from shardline.cluster.commands.demo import PRESET_NAMES
from shardline.cluster.commands.demo_text import (
    STAGES,
    closing,
    ended,
    opening,
    stage_line,
    stages_of,
    stay_lines,
)
from shardline.training.synthetic.generator import PRESETS

FIGURES = {
    "metrics": {
        "model": {"recall@100": 0.6781},
        "ceilings": {"best_estimate": {"means": {"recall@100": 0.6892}}},
    },
    "http_ms": {"search_by_features": {"p50_ms": 3.26}},
    "generation": {"shards": 4},
    "seconds": {"all": 351.0},
}
REPORT = Path("demo-report.json")


def test_the_presets_of_the_command_are_those_there_are() -> None:
    assert sorted(PRESET_NAMES) == sorted(PRESETS)


def test_the_opening_names_every_step_and_where_files_go() -> None:
    text = "\n".join(opening(folder=Path("/tmp/d"), kept=False, report=REPORT))
    assert f"in 10 steps: {', '.join(STAGES)}." in text
    assert "Work folder: /tmp/d (removed at the end; --store FOLDER" in text
    assert "Figures: demo-report.json." in text
    assert "minutes" in text
    quick = "\n".join(opening(folder=Path("mine"), kept=True, report=REPORT, quick=True))
    assert "in 8 steps: " in quick
    assert "index kinds" not in quick
    assert "ceilings" not in quick
    kept = "\n".join(opening(folder=Path("mine"), kept=True, report=REPORT))
    assert "Work folder: mine (kept)." in kept


def test_steps_are_numbered_in_their_order() -> None:
    lines = [stage_line(name) for name in STAGES]
    assert [line.split("]")[0] for line in lines] == [f"[{n}/10" for n in range(1, 11)]
    assert lines[0].startswith("[1/10] data: users")
    quick = [stage_line(name, quick=True) for name in stages_of(quick=True)]
    assert [line.split("]")[0] for line in quick] == [f"[{n}/8" for n in range(1, 9)]


def test_the_closing_says_what_was_measured() -> None:
    lines = closing(FIGURES, folder=Path("/tmp/d"), kept=False, report=REPORT)
    assert lines[0] == (
        "Shown: over HTTP the model finds 67.8% of the held-out items among a hundred (68.9% is "
        "possible); a search takes 3.3 ms at p50 over 4 shards."
    )
    assert lines[1] == "Figures: demo-report.json, in 5.8 minutes."
    without = FIGURES | {"metrics": {"model": {"recall@100": 0.5}, "ceilings": {}}}
    first = closing(without, folder=Path("/tmp/d"), kept=False, report=REPORT)[0]
    assert "50.0% of the held-out items among a hundred; a search" in first


@pytest.mark.parametrize("kept", [True, False])
def test_what_it_says_to_try_next_are_commands(kept: bool) -> None:
    lines = closing(FIGURES, folder=Path("mine"), kept=kept, report=REPORT)
    lines += stay_lines("http://127.0.0.1:8000", "mine/keys")
    tried = [
        line[line.index("shardline ") :].split("  ")[0] for line in lines if "shardline " in line
    ]
    assert len(tried) == 3
    for line in tried:
        words = line.split()[1:]
        at = next(place for place, word in enumerate(words) if word in COMMANDS)
        command = cli.get_command(click.Context(cli), words[at])
        assert command is not None
        for parser, arguments in ((cli, words[:at]), (command, words[at + 1 :])):
            with click.Context(parser) as context:
                parser.make_parser(context).parse_args(arguments)  # refuses an unknown option


def test_the_last_line_says_what_became_of_the_folder(tmp_path: Path) -> None:
    assert ended(tmp_path / "gone", kept=False).endswith(
        f"left running; {tmp_path}/gone is removed."
    )
    assert ended(tmp_path, kept=True).endswith(f"{tmp_path} is kept.")
    assert ended(tmp_path, kept=False).endswith(f"{tmp_path} could not be removed whole.")


def test_a_cluster_without_keys_is_asked_without() -> None:
    assert stay_lines("http://a:1", None)[1] == "try: shardline query --url http://a:1 --item 17"
