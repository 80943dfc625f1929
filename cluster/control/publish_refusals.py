"""Why a publish or a rollback does not begin, each with what is to be done."""

from shardline.cluster.control.decisions import Decisions
from shardline.cluster.control.fleet_state import reserved_by
from shardline.cluster.control.hosts import fits
from shardline.cluster.control.publish_state import Noted, PublishKind, PublishOptions
from shardline.cluster.control.rolling_restart import is_restarting
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, NotFound, Unavailable
from shardline.shards.storage.generation import read_generation


def check_may_begin(decisions: Decisions, noted: Noted, *, is_pinned: bool) -> None:
    """Nothing else is under way, and the cluster may serve another generation.

    Raises:
        InvalidInput: it serves one generation for life.
        Unavailable: a publish or a restart is under way.
    """
    live = decisions.placement.table.generation
    if is_pinned:
        raise InvalidInput(
            f"this cluster serves generation {live} for as long as it runs",
            expected="a cluster that was started without --generation",
            hint="stop it, and start it again with `shardline serve`",
        )
    publish = noted.publish
    if publish is not None and not publish.is_over:
        raise Unavailable(
            f"a {publish.options.kind} of generation {publish.options.generation} is under way",
            got=f"stage {publish.stage}",
            hint="`shardline status` shows how far it is; `shardline publish --stop` ends it",
        )
    if is_restarting(decisions.placement):
        raise Unavailable(
            "a rolling restart is under way",
            hint="wait for its end, or `shardline restart --stop`",
        )


def check_is_written(decisions: Decisions) -> None:
    """Raises InvalidInput: shards of the live generation take no writes, so have no log by which a
    replica learns of a newer main index."""
    if not decisions.placement.rules.writes:
        raise InvalidInput(
            "shards that take no writes keep the index that they were started with",
            expected="cluster.writes: true",
            hint="publish it as a whole, with room for both generations",
        )


def check_other(store: Store, decisions: Decisions, generation: int) -> None:
    """Whether it exists and is not live.

    Raises:
        InvalidInput: it is live. NotFound: there is none.
    """
    live = decisions.placement
    if generation == live.table.generation:
        raise InvalidInput(f"generation {generation} is live already")
    complete = store.generation_numbers()
    if generation not in complete:
        raise NotFound(
            f"{store.root}: no generation {generation}",
            expected=f"one of {', '.join(map(str, complete))}",
        )


def check_room(store: Store, decisions: Decisions, generation: int) -> None:
    """Whether it exists, is not live, and has the CPUs and GPUs that its replicas reserve.

    Raises:
        InvalidInput, NotFound: as ``check_other``.
        CorruptFile, NewerFormat: its manifest cannot be used.
        Unavailable: the hosts lack CPUs or GPUs, with the arithmetic.
    """
    check_other(store, decisions, generation)
    live = decisions.placement
    manifest, rules = read_generation(store.generation(generation)), live.rules
    reserved = reserved_by(live)
    hosts = live.hosts.values()
    reason = fits(
        [host.without(*reserved.get(host.node_id, (0.0, 0.0))) for host in hosts],
        shards=len(manifest.shards),
        replicas=live.attainable,
        cpus_per_shard=rules.cpus,
        gpus_per_shard=rules.gpus,
    )
    if reason is not None:
        raise Unavailable(
            f"generation {generation} has no room beside the live one",
            got=f"without what that has reserved: {reason}",
            hint="lower cluster.cpus_per_shard, or add hosts",
        )


def rollback_options(decisions: Decisions, noted: Noted) -> PublishOptions:
    """Of the generation that was live before. Raises NotFound: none is known."""
    live, beside = decisions.placement.table.generation, decisions.fleet.beside
    before = noted.before if beside is None else beside.generation
    if before is None or before == live:
        raise NotFound(
            f"nothing is known to have been live before generation {live}",
            hint="`shardline publish N` makes any complete generation live",
        )
    return PublishOptions(generation=before, kind=PublishKind.ROLLBACK)
