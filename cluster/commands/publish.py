"""``publish`` and ``rollback``: another generation goes live, without a failed query."""

import json
import time
from collections.abc import Callable
from typing import Any

import click

from shardline.cluster.cli import Settings
from shardline.cluster.commands.publish_text import print_publish, publish_line
from shardline.cluster.config import given_keys
from shardline.cluster.console import StageProgress
from shardline.cluster.control.publish_state import PublishKind, PublishOptions
from shardline.cluster.preflight.check import enforce
from shardline.cluster.preflight.servable import servable_generation
from shardline.cluster.rollover.left_behind import check_none_left_behind, part_from_live
from shardline.cluster.serving.going_live import make_live
from shardline.cluster.serving.launched import Report, asked, controller
from shardline.cluster.serving.reaching import note_served, reached
from shardline.cluster.serving.survey import check_beside, check_one_beside
from shardline.cluster.store import Store
from shardline.shards.core.errors import InvalidInput, NotFound, Unavailable, error_of

POLL_S = (0.05, 0.5)  # between two looks: a rollback takes some hundredths; doubled up to the last
ANSWERS_WITHIN_S = 10.0
STOPPED_WITHIN_S = 40.0  # the mirror ends what it has under way first
# A controller that dies is started again by Ray, and goes on with the publish.
AWAY_S = 120.0
CLUSTERS_OWN = {"keep_s"}  # keys of the section ``publish`` that are no bounds of one publish

Progress = dict[str, Any]


@click.command()
@click.argument("generation", type=click.IntRange(min=1), required=False)
@click.option("--without-writes", is_flag=True, help="Leave out what was written meanwhile.")
@click.option(
    "--skip-gate", metavar="REASON", help="Publish without measuring; the report keeps the reason."
)
@click.option(
    "--one-shard-at-a-time",
    is_flag=True,
    help="Without memory for two generations: each shard of the live one takes over the index of "
    "GENERATION, one after the other. Of the same model only.",
)
@click.option(
    "--finish", is_flag=True, help="End the generation that is kept for a rollback, and no more."
)
@click.option("--stop", is_flag=True, help="End the publish that is under way, and no more.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def publish(
    settings: Settings,
    generation: int | None,
    without_writes: bool,
    skip_gate: str | None,
    one_shard_at_a_time: bool,
    finish: bool,
    stop: bool,
    as_json: bool,
) -> None:
    """Make GENERATION live: by default the newest.

    It is loaded beside the live one, which serves on. It gets what was written since its data were
    read, is measured, and takes over in one step if every figure is within its bound (section
    `publish` of the configuration that `shardline serve` was started with; `shardline --set
    publish.min_recall=0.95 publish` gives this publish another one). The generation before is kept
    for `shardline rollback`.
    With --one-shard-at-a-time the live generation keeps its number and its log, and there is no way
    back but another publish; latency is not measured; --stop ends it behind the shard that has
    begun.
    Interrupting the command stops the display, not the publish: --stop does, and leaves the live
    generation as it is; `shardline status` shows how far it is.
    Where no cluster serves the store, the next `shardline serve` takes the generation, if it has
    all that was written to the live one; else --without-writes leaves that out.
    """
    if skip_gate is not None and not skip_gate.strip():
        raise InvalidInput("no reason given", field="--skip-gate", expected="a few words")
    asks = generation is not None or without_writes or one_shard_at_a_time or skip_gate is not None
    if finish + stop + asks > 1:
        raise InvalidInput("--finish and --stop go alone")
    if one_shard_at_a_time and without_writes:
        raise InvalidInput(
            "--one-shard-at-a-time brings all writes: the log of the live generation goes on",
            hint="leave --without-writes out",
        )
    config, bounds = settings.config, _bounds(settings)
    if bounds and (finish or stop or skip_gate is not None):
        raise _unused(bounds, "nothing is measured")
    with reached(config, verbose=settings.verbose) as report:
        if finish or stop:
            click.echo(_finished(report) if finish else _stopped(report))
            return
        number = generation or newest(settings.store)
        if report is None:
            if bounds:
                raise _unused(bounds, "no cluster serves this store, so nothing is measured")
            if one_shard_at_a_time:
                raise InvalidInput(
                    "--one-shard-at-a-time is for a cluster that serves; none serves this store",
                    hint=f"`shardline publish {number}` makes it live for the next `serve`",
                )
            servable_generation(settings.store, number)
            if without_writes:
                part_from_live(settings.store, number)
            else:
                check_none_left_behind(settings.store, number)
            make_live(settings.store, number)
            click.echo(f"generation {number} is live; no cluster serves this store now")
            return
        with StageProgress() as progress:
            options = PublishOptions(
                generation=number,
                kind=PublishKind.PUBLISH,
                with_writes=not without_writes,
                skip_gate=skip_gate,
                bounds=bounds,
                one_at_a_time=one_shard_at_a_time,
            )
            if number != report["generation"]:  # else the controller says so at once
                progress.note("looking at the memory of the hosts")
                check_memory = check_one_beside if one_shard_at_a_time else check_beside
                for warning in enforce(
                    check_memory(config, servable_generation(settings.store, number))
                ):
                    progress.note(f"warning: {warning}")
            begun = asked(controller().publish.remote(options), timeout_s=ANSWERS_WITHIN_S)
            done = follow(begun, _progress, progress)
    _ended(settings.store, done, as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def rollback(settings: Settings, as_json: bool) -> None:
    """Make the generation live again that was before the newest publish.

    What was written since is in it too. While it is still loaded this takes a moment; else it is
    loaded first.
    """
    with reached(settings.config, verbose=settings.verbose) as report, StageProgress() as progress:
        if report is None:
            raise NotFound(
                "no cluster serves this store, so nothing is known of a publish",
                hint="`shardline publish N` makes any complete generation live",
            )
        begun = asked(controller().roll_back.remote(), timeout_s=ANSWERS_WITHIN_S)
        done = follow(begun, _progress, progress)
    _ended(settings.store, done, as_json)


def _bounds(settings: Settings) -> dict[str, Any]:
    """The values of the section ``publish`` that --set gives, as JSON has them."""
    config = settings.config.publish
    names = given_keys("publish", settings.overrides)
    if CLUSTERS_OWN & names:
        raise InvalidInput(
            "not a bound of one publish",
            field=", ".join(f"publish.{name}" for name in sorted(CLUSTERS_OWN & names)),
            hint="the cluster keeps it for as long as it runs: give it to `shardline serve`",
        )
    bounds = config.model_dump(mode="json", include=names)
    if "held_out" in names and config.held_out is not None:
        bounds["held_out"] = str(config.held_out.absolute())  # another process reads it
    return bounds


def _unused(bounds: dict[str, Any], why: str) -> InvalidInput:
    return InvalidInput(
        "bounds of no use",
        field=", ".join(f"publish.{name}" for name in bounds),
        got=why,
        hint="leave --set publish... out",
    )


def newest(store: Store) -> int:
    """The complete generation that was built last. Raises NotFound: there is none."""
    numbers = store.generation_numbers()
    if not numbers:
        raise NotFound(
            f"{store.generations}: no generation", hint="run `shardline build` to make one"
        )
    return numbers[-1]


def follow(
    begun: Progress,
    ask: Callable[[], Progress | None],
    progress: Callable[[str, int, int], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Progress:
    """Waits for the end of a publish; its progress then.

    ask: the progress of the newest; raises Unavailable while the controller does not answer.

    Raises:
        Unavailable: another was begun meanwhile, or the controller has not answered for AWAY_S.
    """
    found: Progress | None = begun
    heard_at, pause_s = clock(), POLL_S[0]
    while True:
        if found is None or found["number"] != begun["number"]:
            raise Unavailable(
                "nothing is known of this publish any more",
                got="none" if found is None else f"another, of generation {found['generation']}",
                hint="`shardline status` shows what is live",
            )
        if found["is_over"]:
            return found
        progress(_stage_line(found), found["done"], max(found["total"], found["done"] + 1))
        sleep(pause_s)
        pause_s = min(2 * pause_s, POLL_S[1])
        try:
            found, heard_at = ask(), clock()
        except Unavailable:  # a controller that died is back within seconds
            if clock() - heard_at > AWAY_S:
                raise


def _stage_line(found: Progress) -> str:
    return f"{found['stage']}: {found['text']}" if found["text"] else str(found["stage"])


def _ended(store: Store, done: Progress, as_json: bool) -> None:
    """Prints the report. Raises ShardlineError, of the reason's code: the publish failed."""
    if as_json:
        click.echo(json.dumps(done, indent=2))
    else:
        print_publish(done)
    if done["reason"] is not None:
        raise error_of(done["reason"]["code"], done["reason"]["text"])
    if not done.get("one_at_a_time"):
        note_served(store, done["generation"])


def _finished(report: Report | None) -> str:
    ended = None
    if report is not None:
        ended = asked(controller().finish_publish.remote(), timeout_s=ANSWERS_WITHIN_S)
    if ended is None:
        return "no generation is kept for a rollback"
    return f"generation {ended} ends as soon as no query can be under way on it"


def _stopped(report: Report | None) -> str:
    found: Progress | None = None
    if report is not None:
        found = asked(controller().stop_publish.remote(), timeout_s=STOPPED_WITHIN_S)
    return "no publish is known of" if found is None else publish_line(found, time.time())


def _progress() -> Progress | None:
    found: Progress | None = asked(
        controller().publish_progress.remote(), timeout_s=ANSWERS_WITHIN_S
    )
    return found
