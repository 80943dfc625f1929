"""The log read back and drawn."""

from pathlib import Path

import pytest

from shardline.shards.core.errors import CorruptFile, NotFound
from shardline.training.loop.run_plot import PANELS, PLOT, plot_run
from shardline.training.loop.runlog import LOG, RunLog, read_log, trim_log


def write_log(folder: Path) -> list[dict]:
    events: list[dict] = []
    log = RunLog(folder / LOG, events.append, 8)
    log.write("start", epoch=1, step=0, world=1, world_before=1)
    for step in (10, 20):
        fields = {name: step / 10 for _, names in PANELS for name in names}
        fields.pop("examples_per_s")
        log.step(step, epoch=step // 10, received=800 * step, **fields)
        log.write("validation", epoch=step // 10, step=step, **{"recall@10": 0.1})
    return events


def test_the_log_is_read_back_without_its_unfinished_line(tmp_path: Path) -> None:
    events = write_log(tmp_path)
    assert [event["event"] for event in events] == ["start", *["step", "validation"] * 2]
    assert [event["gathered_bytes"] for event in events if event["event"] == "step"] == [800, 800]
    with (tmp_path / LOG).open("a") as file:
        file.write('{"event": "st')
    assert read_log(tmp_path / LOG) == events


def test_a_log_is_cut_after_a_step(tmp_path: Path) -> None:
    events = write_log(tmp_path)
    trim_log(tmp_path / LOG, 19)
    assert read_log(tmp_path / LOG) == events[:3]
    trim_log(tmp_path / LOG, 0)
    assert read_log(tmp_path / LOG) == events[:1]
    trim_log(tmp_path / "absent", 0)
    assert not (tmp_path / "absent").exists()


def test_a_picture_is_drawn_of_a_run_and_of_one_that_logged_nothing_yet(tmp_path: Path) -> None:
    write_log(tmp_path)
    assert plot_run(tmp_path) == tmp_path / PLOT
    drawn = (tmp_path / PLOT).read_bytes()
    assert drawn.startswith(b"\x89PNG")
    trim_log(tmp_path / LOG, 0)
    plot_run(tmp_path)
    assert (tmp_path / PLOT).read_bytes() != drawn
    assert {path.name for path in tmp_path.iterdir()} == {LOG, PLOT}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no log"):
        plot_run(tmp_path)
    (tmp_path / LOG).write_text('{"event": "start", "step": 0}\nnot json\n')
    with pytest.raises(CorruptFile, match=r"log\.jsonl:2: not JSON"):
        plot_run(tmp_path)
