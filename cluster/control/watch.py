"""Looks at replicas and hosts every second; what it finds becomes events. Decides nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

from shardline.cluster.control.decisions import Decisions
from shardline.cluster.control.events import Event, HostsSeen, ReplicaFailed
from shardline.cluster.control.leading import epoch_of
from shardline.cluster.control.news import News
from shardline.cluster.control.placement_state import Stage
from shardline.cluster.control.ray_hosts import fresh_hosts
from shardline.cluster.control.shard_actors import ShardActors
from shardline.cluster.control.tasks import Tasks, tried
from shardline.shards.core.messages import ReplicaKey

WATCH_INTERVAL_S = 1.0


class Watch:
    """Of every generation that is loaded. after_hosts: what is due with each look at the hosts."""

    def __init__(
        self,
        decisions: Decisions,
        shards: ShardActors,
        news: News,
        tasks: Tasks,
        after_hosts: Callable[[], Awaitable[None]],
    ) -> None:
        self._decisions = decisions
        self._shards = shards
        self._news = news
        self._tasks = tasks
        self._after_hosts = after_hosts
        self._checked: set[ReplicaKey] = set()

    def begin(self) -> None:
        """Needs a running event loop; ends with the tasks."""
        self._tasks.spawn(self._watch_replicas())
        self._tasks.spawn(self._watch_hosts())

    async def _watch_replicas(self) -> None:
        """Each on its own: one that does not answer must not hold up the others."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._news.log_silence(time.monotonic())
            for key in self._shards.placed:
                if key not in self._checked and self._decisions.fleet.state(key) is not None:
                    self._checked.add(key)
                    work = partial(self._check, key)
                    self._tasks.spawn(tried(work, f"look at a replica, {key}"))

    async def _watch_hosts(self) -> None:
        """While Ray's head is away there is no event, and so nothing is decided about hosts."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            await tried(self._see_hosts, "look at the hosts")

    async def _see_hosts(self) -> None:
        # in a thread: it blocks while the head is away
        hosts = await asyncio.to_thread(fresh_hosts, self._decisions.placement.hosts)
        if not hosts:
            return
        self._news.saw_hosts(hosts, time.monotonic())
        await self._decisions.save_again()
        await self._decisions.take(HostsSeen(hosts=hosts, now_s=time.monotonic()))
        await self._after_hosts()

    async def _check(self, key: ReplicaKey) -> None:
        """One health check; what it finds becomes an event."""
        try:
            placement = self._decisions.fleet.of(key.generation)
            state = None if placement is None else placement.replicas.get(key)
            if placement is None or state is None:
                return
            event: Event | None
            if state.stage is Stage.DRAINING:
                event = await self._shards.is_idle(key)
            else:
                event = await self._shards.check(
                    key,
                    state.route.epoch,
                    lambda: self._is_lost(key),
                    leads=epoch_of(placement, key),
                )
            if event is not None:
                await self._decisions.take(event)
                if isinstance(event, ReplicaFailed):  # not before: a full disk must not lose it
                    self._shards.forget(key)
        finally:
            self._checked.discard(key)

    def _is_lost(self, key: ReplicaKey) -> bool:
        state = self._decisions.fleet.state(key)
        return state is not None and not state.answers
