"""The process group of ranks under Ray Train, on the network that joins Ray's hosts.

Ray Train starts the group before a rank's own code runs, and gloo then listens on whatever address
the host's name resolves to: loopback where it resolves to nothing, as in many containers, so that
ranks of two hosts never meet. Every rank therefore names the interface that carries the address by
which Ray knows its host. The group's own address is rank 0's, a number, so no name is looked up.
"""

import os
import socket
from collections.abc import Iterable, Mapping

import psutil
import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from shardline.shards.core.errors import Unavailable

GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"


def interface_of(address: str, addresses: Mapping[str, Iterable[str]]) -> str:
    """The name of the interface that has this address, of ``addresses`` by interface.

    Raises:
        Unavailable: none has it, so it is one that only others know the host by.
    """
    for name, own in addresses.items():
        if address in own:
            return name
    seen = "; ".join(f"{name} {', '.join(sorted(own))}" for name, own in addresses.items())
    raise Unavailable(
        "no network interface of this host carries the address by which Ray knows it",
        expected=address,
        got=seen or "no interface with an address",
        hint=f"start Ray with a --node-ip-address of this host, or with {GLOO} and {NCCL} set to "
        "the interface that other hosts reach",
    )


def interface_variables(interface: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to a rank's environment; what the operator has set there stays.

    NCCL takes a bare name as a prefix: eth1 would be eth10 too.
    """
    wanted = {GLOO: interface, NCCL: f"={interface}"}
    return {name: value for name, value in wanted.items() if name not in environ}


def choose_interface() -> None:
    """Names this host's interface in this process's environment, for gloo and NCCL.

    Raises:
        Unavailable: as ``interface_of``.
    """
    if GLOO in os.environ and NCCL in os.environ:
        return
    interface = interface_of(ray.util.get_node_ip_address(), _own_addresses())
    os.environ.update(interface_variables(interface, os.environ))


def _own_addresses() -> dict[str, list[str]]:
    """The IPv4 and IPv6 addresses of each interface of this host, without zones (fe80::1%eth0)."""
    internet = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [each.address.partition("%")[0] for each in found if each.family in internet]
        for name, found in psutil.net_if_addrs().items()
    }


class _HostBackend(_TorchBackend):  # type: ignore[misc]  # Ray is untyped
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


class HostTorchConfig(TorchConfig):  # type: ignore[misc]  # Ray is untyped
    """Torch's process group as Ray Train starts it, once each rank has chosen its interface."""

    @property
    def backend_cls(self) -> type[_HostBackend]:
        return _HostBackend
