"""Publishes and rollbacks of a controller: begun, followed, finished, and gone on with after its
restart. One is under way at most; ``publish_run`` has its stages."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ray.exceptions import RayError

from shardline.cluster.control.beside import Opener
from shardline.cluster.control.decisions import Decisions, known_error
from shardline.cluster.control.events import BesideEnded, SealDropped
from shardline.cluster.control.fleet_state import Beside, Role
from shardline.cluster.control.mirrors import Mirrors
from shardline.cluster.control.publish_book import PublishBook
from shardline.cluster.control.publish_by_shard import PublishByShard
from shardline.cluster.control.publish_parts import PublishParts
from shardline.cluster.control.publish_refusals import (
    check_is_written,
    check_may_begin,
    check_other,
    check_room,
    rollback_options,
)
from shardline.cluster.control.publish_run import PublishRun, RunTools
from shardline.cluster.control.publish_state import (
    PublishOptions,
    PublishStage,
)
from shardline.cluster.control.tasks import Tasks, tried
from shardline.cluster.control.term import Superseded
from shardline.cluster.store import Store
from shardline.shards.core.errors import ShardlineError, Unavailable
from shardline.shards.core.messages import Absence

logger = logging.getLogger(__name__)

# How long a replaced generation lives on, for the queries that began on it: far above the largest
# deadline that routers allow by default.
RETIRE_AFTER_S = 60.0
CONTROLLERS = 3  # that run one publish, each after the one before has died
RETRY_S = 0.5  # before the store is asked again for what must not be lost
TEND_S = 1.0  # between two looks at what is beside the live generation
TEND_LIMIT_S = 120.0  # of one: a mirror that does not answer is ended after a minute


class Publishing:
    """book: what is known of the publish before.

    keep_s: for so long the generation before is kept. load_s: in which one is to be loaded.
    is_pinned: the cluster serves one generation for life. written: how many writes the live one has
    had, if that is known.
    """

    def __init__(
        self,
        store: Store,
        decisions: Decisions,
        opener: Opener,
        parts: PublishParts,
        tasks: Tasks,
        book: PublishBook,
        *,
        keep_s: float,
        load_s: float,
        is_pinned: bool,
        written: Callable[[], int | None],
    ) -> None:
        self._store, self._decisions, self._book = store, decisions, book
        self._mirrors = Mirrors(parts)
        self._tasks = tasks
        self._keep_s, self._is_pinned = keep_s, is_pinned
        self._finished: int | None = None  # which need not be kept any longer
        self._running: asyncio.Task[None] | None = None
        # a publish waits for a look that is under way, and none begins meanwhile
        self._turn = asyncio.Lock()
        self._tools = RunTools(
            decisions=decisions,
            opener=opener,
            parts=parts,
            mirrors=self._mirrors,
            load_s=load_s,
            ended=self._until_kept_is_idle,
            opening=book.opening,
            written=written,
            tell=book.told,
            no_way_back=book.no_way_back,
        )

    def go_on(self) -> None:
        """With what the controller before this was at; needs a running event loop."""
        self._tasks.spawn(self._tend_for_good())
        progress = self._book.noted.publish
        if self._decisions.fleet.beside is None:
            self._tasks.spawn(tried(self._mirrors.stop, "end a mirror"))  # one may be left
        if progress is None or progress.is_over:
            return
        if progress.options.generation == self._book.live:
            self._running = self._tasks.spawn(self._alone(self._succeeded))
        elif progress.tries >= CONTROLLERS:
            text = f"the controller died {progress.tries} times meanwhile"
            error = Unavailable("the publish was cut short", got=text)
            self._running = self._tasks.spawn(self._alone(partial(self._failed, error)))
        else:
            self._book.put(replace(progress, tries=progress.tries + 1))
            self._running = self._tasks.spawn(self._alone(partial(self._run, progress.options)))

    async def begin(self, options: PublishOptions) -> dict[str, Any]:
        """Its progress at first.

        Raises:
            InvalidInput: it is live already, or the cluster is pinned to another; or its bounds do
                not go with those of the cluster; or its shards cannot be taken over one at a time.
            VersionMismatch, WritesLost: they cannot.
            NotFound, CorruptFile, NewerFormat: there is no such generation that can be loaded.
            Unavailable: another publish is under way, or a restart; or no host has room.
        """
        check_may_begin(self._decisions, self._book.noted, is_pinned=self._is_pinned)
        if options.one_at_a_time:
            check_is_written(self._decisions)
            check_other(self._store, self._decisions, options.generation)
            options = replace(options, token=secrets.token_hex(8))
            live = self._decisions.placement.table
            await self._tools.parts.takeovers(live, options.generation, options.token)
            check_may_begin(self._decisions, self._book.noted, is_pinned=self._is_pinned)
        else:
            check_room(self._store, self._decisions, options.generation)
        self._tools.parts.check_bounds(options.bounds)
        return self._begun(options)

    async def roll_back(self) -> dict[str, Any]:
        """To the generation that was live before. Raises: as ``begin``; NotFound: there is none."""
        check_may_begin(self._decisions, self._book.noted, is_pinned=self._is_pinned)
        options = rollback_options(self._decisions, self._book.noted)
        if self._decisions.fleet.of(options.generation) is None:
            check_room(self._store, self._decisions, options.generation)
        return self._begun(options)

    async def stop(self) -> dict[str, Any] | None:
        """Ends the publish that is under way, if its generation is not live yet: its progress, or
        that of the newest; None: there was none."""
        publish, running = self._book.noted.publish, self._running
        if publish is not None and not publish.is_over and running is not None:
            running.cancel()
            await asyncio.wait([running])
            await self._alone(partial(self._stopped, publish.number))
        return self.progress

    async def finish(self) -> int | None:
        """Ends the generation that is kept for a rollback, once no query can be under way on it;
        its number, None if there is none.

        Raises:
            Unavailable: a publish is under way, or the store takes no note.
        """
        check_may_begin(self._decisions, self._book.noted, is_pinned=False)
        beside = self._decisions.fleet.beside
        if beside is None:
            return None
        self._finished = beside.generation  # ``tend`` ends it
        return beside.generation

    def refuse_restart(self) -> None:
        """Raises Unavailable: a publish is under way, which a restart would hinder."""
        if self._book.is_under_way:
            raise Unavailable(
                "a publish is under way",
                hint="wait for its end: `shardline status` shows how far it is",
            )

    @property
    def progress(self) -> dict[str, Any] | None:
        """Of the newest publish, as ``PublishProgress.as_json``; None: there was none."""
        publish = self._book.noted.publish
        return None if publish is None else publish.as_json()

    def report(self) -> dict[str, Any]:
        """{"store", "beside", "publish": as ``progress``}; beside is None, or {"generation",
        "role", "since_s", "ready", "replicas", "answering", "mirror"}; mirror is None where no
        writes are brought to it, or {"behind", "unreplayed", "trouble"}, writes and rows."""
        beside = self._decisions.fleet.beside
        return {
            "store": str(self._store.root),
            "beside": None if beside is None else self._described(beside),
            "publish": self.progress,
        }

    def _described(self, beside: Beside) -> dict[str, Any]:
        staying, seen = beside.placement.staying(), self._mirrors.seen
        mirror = None
        if seen is not None:
            trouble = None if seen.trouble is None else asdict(seen.trouble)
            mirror = {"behind": seen.behind, "unreplayed": seen.unreplayed, "trouble": trouble}
        return {
            "generation": beside.generation,
            "role": str(beside.role),
            "since_s": self._book.noted.since_s,
            "ready": beside.placement.ready,
            "replicas": len(staying),
            "answering": sum(state.answers for state in staying),
            "mirror": mirror,
        }

    async def tend(self) -> None:
        """What is due every second while no publish is under way: saves a note that could not be
        saved, ends what need not be kept any longer, has the writes of the live generation brought
        to what is kept.

        Raises:
            OSError: the store takes no note, or no number. RayError, ShardlineError: no mirror.
            TimeoutError: it took longer than TEND_LIMIT_S.
        """
        async with asyncio.timeout(TEND_LIMIT_S), self._turn:
            if not self._book.is_under_way:
                await self._tended()

    async def _tended(self) -> None:
        self._book.save_again()
        # a publish was stopped while the store failed
        if self._decisions.placement.sealing is not None:
            await self._decisions.take(SealDropped(now_s=time.monotonic()))
        beside = self._decisions.fleet.beside
        if beside is not None and self._book.age_s >= self._kept_s(beside.generation):
            await self._end_beside()
        elif beside is None and self._book.noted.beside is not None:
            await self._mirrors.stop()
            self._book.put_beside()
        elif beside is None and self._mirrors.may_be_left:
            await self._mirrors.stop()
        elif beside is not None and beside.is_mirrored and beside.placement.settled:
            await self._mirrors.look(self._decisions.placement.table, beside.placement.table)

    async def close(self) -> None:
        """The cluster ends. Raises OSError: that is not noted."""
        self._book.close()

    def _kept_s(self, generation: int) -> float:
        """So many seconds it is kept after a switch."""
        return max(0.0 if self._finished == generation else self._keep_s, RETIRE_AFTER_S)

    def _begun(self, options: PublishOptions) -> dict[str, Any]:
        self._finished = None  # it may be the one to be kept
        progress = self._book.begun(options)
        self._running = self._tasks.spawn(self._alone(partial(self._run, options)))
        return progress.as_json()

    async def _alone(self, work: Callable[[], Awaitable[None]]) -> None:
        """While nothing else ends a generation, or starts one."""
        async with self._turn:
            await work()

    async def _tend_for_good(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            await tried(self.tend, "see to what is beside the live generation")

    async def _run(self, options: PublishOptions) -> None:
        try:
            run = PublishByShard if options.one_at_a_time else PublishRun
            await run(self._tools, options).to_live()
        except Superseded:
            logger.warning("the publish is the newer controller's")
        except (ShardlineError, OSError, RayError) as error:
            await self._failed(error)
        except Exception as error:
            logger.exception("a publish failed")
            await self._failed(error)
        else:
            await self._succeeded()

    async def _stopped(self, number: int) -> None:
        """Of the publish of this number, unless it came to its end."""
        publish = self._book.noted.publish
        if publish is None or publish.is_over or publish.number != number:
            return
        if self._book.live == publish.options.generation:  # it was too late
            await self._succeeded()
        else:
            await self._failed(Unavailable("somebody stopped it"))

    async def _succeeded(self) -> None:
        publish = self._book.noted.publish
        if publish is None or not publish.options.one_at_a_time:
            self._book.switched()
        await self._book.told(stage=PublishStage.LIVE, text="", done=0, total=0)
        await tried(self._tended, "see to what is beside the live generation")

    async def _failed(self, error: Exception) -> None:
        """The candidate is ended; a generation that was live before stays."""
        reason = _reason_of(error)
        logger.warning("the publish failed: %s", reason.text)
        beside = self._decisions.fleet.beside
        if beside is not None and beside.role is Role.CANDIDATE:
            while not await _recorded(self._end_beside):
                await asyncio.sleep(RETRY_S)
        await self._book.told(stage=PublishStage.FAILED, text="", reason=reason)

    async def _end_beside(self) -> None:
        await tried(self._mirrors.stop, "end a mirror")  # else ``tend`` does
        await self._decisions.take(BesideEnded())
        self._book.put_beside()

    async def _until_kept_is_idle(self) -> None:
        """What was live a moment ago answers queries that began on it."""
        beside = self._decisions.fleet.beside
        if beside is None:
            return
        while (left_s := RETIRE_AFTER_S - self._book.age_s) > 0:
            text = f"waiting {left_s:.0f} s for queries that began on the generation before"
            await self._book.told(text=text)
            await asyncio.sleep(min(1.0, left_s))
        await self._end_beside()


def _reason_of(error: Exception) -> Absence:
    known = known_error(error) if isinstance(error, OSError) else error
    return Absence(getattr(known, "code", Unavailable.code), str(known))


async def _recorded(end: Callable[[], Any]) -> bool:
    try:
        await end()
    except OSError as error:
        logger.warning("the candidate is not ended yet: %s", error)
        return False
    return True
