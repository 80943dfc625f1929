"""What ``publish``, ``rollback`` and ``status`` print of generations and of the newest publish."""

import time
from typing import Any

import click

from shardline.cluster.console import print_table

AGES = ((86_400, "d"), (3600, "h"), (60, "min"))


def print_publish(progress: dict[str, Any]) -> None:
    """The end of a publish: the figures of the gate, and whether the generation is live."""
    if progress["figures"]:
        print_table(
            "gate",
            ("figure", "value", "bound", "ok"),
            [
                (
                    str(each["figure"]),
                    _value(each["value"]),
                    _value(each["bound"]),
                    "yes" if each["ok"] else "no",
                )
                for each in progress["figures"]
            ],
        )
    click.echo(publish_line(progress, time.time()))


def publish_line(progress: dict[str, Any], now_s: float) -> str:
    """One line: what, of which generation, at which stage or how it ended, since when."""
    what = f"{progress['kind']} of generation {progress['generation']}"
    if progress["skip_gate"] is not None:
        what += f" without the gate ({progress['skip_gate']})"
    age = age_of(now_s - progress["since_s"])
    is_by_shard = progress.get("one_at_a_time", False)
    if is_by_shard:
        what += ", one shard at a time"
    if progress["stage"] == "failed":
        so_far = f" at {progress['done']} of {progress['total']} shards" if is_by_shard else ""
        return f"{what} failed{so_far} {age} ago: {progress['reason']['text']}"
    left_out = ""
    if progress["unreplayed"]:
        named = ", ".join(map(str, progress["examples"]))
        left_out = f", without {progress['unreplayed']:,} items that it cannot take ({named})"
    if progress["stage"] == "live" and is_by_shard:
        return f"{what}: all shards of generation {progress['source']} search its index since {age}"
    if progress["stage"] == "live":
        return f"{what}: live since {age}, {progress['source']} before{left_out}"
    return f"{what}: {progress['stage']} since {age}: {progress['text'] or 'begun'}{left_out}"


def print_generations(live: int, told: dict[str, Any]) -> None:
    """told: {"beside", "publish"}, of a report. beside: None, or {"generation", "role", "since_s"}
    and perhaps "mirror"."""
    beside, now_s = told.get("beside"), time.time()
    line = f"generation {live} is live"
    if beside is not None:
        age = age_of(now_s - beside["since_s"])
        line += f", {beside['generation']} is loaded beside it ({beside['role']} since {age})"
    click.echo(line)
    if beside is not None and beside.get("mirror"):
        click.echo(_mirror_line(beside["generation"], beside["mirror"]))
    if told.get("publish") is not None:
        click.echo(f"newest {publish_line(told['publish'], now_s)}")


def _mirror_line(generation: int, mirror: dict[str, Any]) -> str:
    """Whether generation ``generation`` gets the writes of the live one."""
    if mirror["trouble"] is not None:
        return f"writes are not brought to generation {generation}: {mirror['trouble']['text']}"
    left_out = ""
    if mirror["unreplayed"]:
        left_out = f", without {mirror['unreplayed']:,} items of another model"
    return f"writes are brought to generation {generation}: {mirror['behind']:,} behind{left_out}"


def print_noted(live: int, noted: dict[str, Any] | None) -> None:
    """noted: of the note that the cluster of this store has left; None: none. What another cluster
    has left is of no meaning once another generation is live."""
    if noted is None or noted["live"] != live:
        return
    named = ("role", "since_s")
    beside = {"generation": noted["beside"]} | {name: noted[name] for name in named}
    is_there = noted["beside"] is not None
    told = {"beside": beside if is_there else None, "publish": noted["publish"]}
    print_generations(live, told)


def age_of(seconds: float) -> str:
    """ "45 s", "3 min", "2 h"."""
    for size, unit in AGES:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _value(value: object) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
