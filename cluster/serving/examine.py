"""A launched cluster examined from one of its hosts, for `doctor`: hosts, replicas, routers."""

from collections import Counter

from shardline.cluster.config import ShardlineConfig
from shardline.cluster.control.ray_hosts import living_hosts
from shardline.cluster.preflight.check import Check, failed, passed, warned
from shardline.cluster.preflight.served_index import index_checks
from shardline.cluster.serving.front_end import serve_runs
from shardline.cluster.serving.launched import Report, ask_controller, is_served
from shardline.cluster.serving.ray_session import attached_ray
from shardline.cluster.serving.survey import survey
from shardline.shards.core.errors import ShardlineError, Unavailable


def examine(config: ShardlineConfig, number: int | None, *, verbose: bool = False) -> list[Check]:
    """All checks. number: the live generation, None where there is none."""
    address = config.cluster.address
    checks: list[Check] = []
    try:
        with attached_ray(address, verbose=verbose) as head:
            hosts = ", ".join(host.address for host in living_hosts())
            checks.append(passed("Ray", f"joined at {head}; hosts {hosts}"))
            served = is_served()
            checks += survey(config, number, is_served=served, has_serve=serve_runs())
            if not served:
                return [*checks, passed("cluster", "nothing is served")]
            return checks + check_report(ask_controller().report)
    except ShardlineError as error:
        return [*checks, failed("cluster", error)]


def check_report(report: Report) -> list[Check]:
    """What the controller says of replicas, writes, routers and the index."""
    known = [_replicas(report), _writes(report), _routers(report), *_notes(report)]
    return [*known, *index_checks(report)]


def _replicas(report: Report) -> Check:
    name, wanted = "replicas", report["replicas_wanted"]
    answering = Counter(each["shard"] for each in report["replicas"] if each["answers"])
    shards = sorted({each["shard"] for each in report["replicas"]})
    missing = [shard for shard in shards if not answering[shard]]
    if missing:
        reasons = [
            f"shard {each['shard']}: {each['reason']['text']}"
            for each in report["replicas"]
            if each["shard"] in missing and each["reason"] is not None
        ]
        error = Unavailable(
            f"shards {missing} do not answer",
            got="; ".join(reasons) or None,
            hint="their rows are missing from answers; `shardline status` shows where they are",
        )
        return failed(name, error)
    text = f"{len(shards)} shards, {sum(answering.values())} of {len(shards) * wanted} answer"
    if any(answering[shard] < wanted for shard in shards):
        return warned(name, f"{text}; others are placed as soon as hosts have room for them")
    return passed(name, text)


def _writes(report: Report) -> Check:
    name, shards = "writes", report["shards"]
    if not report["writes"]:
        return passed(name, "none are taken: cluster.writes is false")
    without = [shard["shard"] for shard in shards if shard["primary"] is None]
    text = f"{len(shards) - len(without)} of {len(shards)} shards take them"
    lag = max((each["lag"] or 0 for each in report["replicas"]), default=0)
    if lag:
        text += f"; a replica is {lag:,} writes behind its primary"
    return warned(name, f"{text}; not shards {without}") if without else passed(name, text)


def _routers(report: Report) -> Check:
    name, heard = "routers", len(report["routers"])
    without = [host["host"] for host in report["hosts"] if host["alive"] and not host["router"]]
    if not heard:
        return failed(
            name,
            Unavailable("no router has been heard of", hint="Serve starts them within seconds"),
        )
    if without:
        return warned(name, f"{heard}; none on {', '.join(without)}")
    return passed(name, f"{heard}, one on every host")


def _notes(report: Report) -> list[Check]:
    return [warned("controller", f"{note['code']}: {note['text']}") for note in report["notes"]]
