"""What the controller has heard of lately: hosts, routers, and whether Ray's head answers."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from shardline.cluster.control.hosts import Host
from shardline.shards.core.errors import Unavailable
from shardline.shards.core.messages import Absence, RouterSeen

logger = logging.getLogger(__name__)

EXPIRE_S = 15.0  # three of the calls with which a router announces itself
SILENT_S = 10.0  # hosts are looked at every second
FORGET_HOST_S = 3600.0  # a host that has gone is shown for so long


@dataclass(frozen=True, slots=True)
class Heard:
    """A router, and when it announced itself last, in seconds of the controller's clock."""

    router: RouterSeen
    at_s: float


class News:
    """Hosts and routers, each with the time of the last news; times are the controller's."""

    def __init__(self, hosts: Iterable[Host], now_s: float) -> None:
        self._hosts: dict[str, tuple[Host, float]] = {}
        self._is_silence_logged = False
        self._routers: dict[tuple[str, int], Heard] = {}
        self.saw_hosts(hosts, now_s)

    def saw_hosts(self, living: Iterable[Host], now_s: float) -> None:
        """These live. Of those gone one stays known for FORGET_HOST_S, unless its address is that
        of a living one: Ray has a new name for a host that returns."""
        alive = {host.node_id: (host, now_s) for host in living}
        addresses = {host.address for host, _ in alive.values()}
        gone = {
            node_id: (host, at_s)
            for node_id, (host, at_s) in self._hosts.items()
            if node_id not in alive
            and host.address not in addresses
            and now_s - at_s < FORGET_HOST_S
        }
        self._hosts = gone | alive
        self._seen_s = now_s

    def heard(self, router: RouterSeen, now_s: float) -> None:
        """The router says that it lives; it does so every few seconds."""
        living = {key: each for key, each in self._routers.items() if now_s - each.at_s < EXPIRE_S}
        self._routers = living | {(router.node_id, router.pid): Heard(router, now_s)}

    def routers(self, now_s: float) -> list[Heard]:
        """Those heard of lately."""
        return [each for each in self._routers.values() if now_s - each.at_s < EXPIRE_S]

    def hosts(self) -> list[Host]:
        """Those that live, and those that did, by address."""
        known = [host for host, _ in self._hosts.values()]
        return sorted(known, key=lambda host: (host.address, host.node_id))

    def silence(self, now_s: float) -> Absence | None:
        """That there is no news of hosts, if there is none."""
        silent_s = now_s - self._seen_s
        if silent_s < SILENT_S:
            return None
        text = (
            f"no news of hosts for {silent_s:.0f} s: Ray's head does not answer, or late, and "
            "nothing is placed, moved or restarted until it does"
        )
        return Absence(Unavailable.code, text)

    def log_silence(self, now_s: float) -> None:
        """Once each time that it begins."""
        silence = self.silence(now_s)
        if silence is not None and not self._is_silence_logged:
            logger.warning("%s", silence.text)
        self._is_silence_logged = silence is not None
