"""What ``status`` prints: a router's view of the shards, a controller's of hosts and routers."""

from typing import Any

import click

from shardline.cluster.commands.publish_text import print_generations
from shardline.cluster.console import print_table


def print_status(report: dict[str, Any], *, has_quality: bool = True) -> None:
    """A router's status: what is served, and which replicas it is connected to. has_quality: with
    what it has found of its answers, where the controller's report does not say it of all."""
    for name in ("generation", "model_version", "index", "dim", "metric", "rows"):
        built = " when it was built" if name == "rows" else ""
        click.echo(f"{name:>14}  {report[name]}{built}")
    print_table(
        "shards",
        ("shard", "replica", "built", "epoch", "address", "connected", "writes", "why not"),
        [
            (
                str(shard["shard"]),
                str(replica["replica"]),
                f"{shard['rows']:,}",
                str(replica["epoch"]),
                str(replica["address"] or "none"),
                "yes" if replica["connected"] else "no",
                _role(shard, replica),
                str(replica["code"]),
            )
            for shard in report["shards"]
            for replica in shard["replicas"]
        ],
    )
    for shard in report["shards"]:
        for replica in shard["replicas"]:
            if replica["reason"]:  # a line of its own: a table would break a path
                where = f"shard {shard['shard']}, replica {replica['replica']}"
                click.echo(f"{where}: {replica['code']}: {replica['reason']}")
    for warning in report.get("warnings", ()):  # routers before these have none
        click.echo(f"warning: {warning['about']}: {warning['text']}")
    if has_quality:
        _print_quality(report)


def _print_quality(report: dict[str, Any]) -> None:
    """Recall of served queries, and which repairs are due; routers before these tell neither."""
    quality = report.get("quality")
    if quality is not None:
        about = f"of {quality['queries']} served queries, against exact answers"
        click.echo(f"{'recall':>14}  {quality['recall']:.3f} @{quality['k']}, {about}")
    for repair in report.get("repairs", ()):
        click.echo(f"repair due: {repair['code']}: {repair['text']}")


def print_launched(report: dict[str, Any]) -> None:
    """The controller's report: hosts, routers, replicas, and what is amiss."""
    click.echo(f"{'cluster':>14}  {report['cluster_id']}, routing table {report['version']}")
    print_generations(report["generation"], report)
    routers = {router["host"]: router for router in report["routers"]}
    print_table(
        "hosts",
        ("host", "alive", "replicas", "router", "heard"),
        [
            (
                str(host["host"]),
                "yes" if host["alive"] else "no",
                " ".join(host["replicas"]) or "none",
                str(routers[host["host"]]["url"]) if host["host"] in routers else "none",
                f"{routers[host['host']]['heard_s']:.1f} s ago" if host["host"] in routers else "",
            )
            for host in report["hosts"]
        ],
    )
    shards = {shard["shard"]: shard for shard in report["shards"]}
    print_table(
        "replicas",
        (
            *("shard", "replica", "host", "epoch", "answers", "stage", "rows"),
            *("writes", "applied", "behind"),
        ),
        [
            (
                str(replica["shard"]),
                str(replica["replica"]),
                str(replica["host"] or "none"),
                str(replica["epoch"]),
                "yes" if replica["answers"] else "no",
                str(replica["stage"]),
                _count(replica.get("rows")),  # controllers before this one do not say it
                _role(shards[replica["shard"]], replica),
                _count(replica["seq"]),
                _count(replica["lag"]),
            )
            for replica in report["replicas"]
        ],
    )
    for replica in report["replicas"]:
        if (note := replica.get("device_note")) is not None:
            click.echo(f"shard {replica['shard']}, replica {replica['replica']}: {note}")
        if (reason := replica["reason"]) is not None:
            where = f"shard {replica['shard']}, replica {replica['replica']}"
            click.echo(f"{where}: {reason['code']}: {reason['text']}")
    _print_taken_over(report["replicas"])
    for note in report["notes"]:
        click.echo(f"warning: {note['text']}")
    _print_quality(report)


def _print_taken_over(replicas: list[dict[str, Any]]) -> None:
    """Which shards have taken over the index of another generation."""
    searched = {replica["shard"]: replica.get("index_of") for replica in replicas}
    for other in sorted({each for each in searched.values() if each is not None}):
        shards = sorted(shard for shard, each in searched.items() if each == other)
        which = "all shards search" if len(shards) == len(searched) else f"shards {shards} search"
        click.echo(f"{which} the index of generation {other}")


def _role(shard: dict[str, Any], replica: dict[str, Any]) -> str:
    # routers before those that take writes name none
    return "primary" if replica["replica"] == shard.get("primary") else ""


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
