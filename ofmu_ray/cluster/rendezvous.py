"""How workers start: check that their nodes see the same files, find each other, choose a network interface.

Workers talk only over one network interface per node. By default it is the interface with the node's address in the Ray
cluster (on one machine: loopback). gloo and NCCL would each choose by their own rules (the host name; the first
interface that is up), and torch's rendezvous would listen on all interfaces.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig

from ofmu_ray.cluster.shared_files import SharedFiles
from ofmu_ray.errors import UserError
from ofmu_ray.internals.ray_private import SET_RANK_VARIABLES, STARTUP_FAILED, TORCH_BACKEND

MEETING_SECONDS = 300
"""How long workers wait for each other after their start. If a peer dies, Ray stops them sooner."""

_TorchBackend: Any = TORCH_BACKEND.get()

_listeners: list[socket.socket] = []
"""Rank 0's open socket, from the call that opens it to the call that passes it to torch."""


@dataclass
class OneInterface(TorchConfig):  # type: ignore[misc]
    """Ray Train's setup of torch.distributed on one network interface per node (`training.network_interface`)."""

    interface: str | None = None
    shared: SharedFiles | None = None
    """What every worker's node must see before anything else; None: not checked."""

    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    """Replaces the rendezvous; Ray Train still ends the process group."""

    def on_start(self, worker_group: Any, backend_config: OneInterface) -> None:
        """Raises UserError (files, interface), which ends the run, or an error that makes Ray Train restart the workers
        (a peer died)."""
        shared = backend_config.shared
        try:
            if shared is not None:  # here, because nodes that join later pass here too
                answers = worker_group.execute(_look, shared)
                problems = [problem for answer in answers for problem in answer]
                shared.refuse(problems, "; then run the same command to resume")
            place = worker_group.execute_single(0, _listen, backend_config.interface)
            worker_group.execute(_meet, backend_config, *place)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise STARTUP_FAILED.get()(f"the workers could not start together: {error.cause}") from error


def choose(wanted: str | None, node: str, interfaces: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """(name, address) of the interface to use on a node.

    `wanted`: a name, a subnet (10.1.0.0/16) that contains its address, or None for the interface with address `node`,
    the node's address in the cluster. `interfaces`: addresses by name.

    Raises:
        UserError: there is no such interface.
    """
    for name, addresses in interfaces.items():
        if wanted is None:
            fitting = [address for address in addresses if address == node]
        elif "/" in wanted:
            subnet = ipaddress.ip_network(wanted, strict=False)
            fitting = [address for address in addresses if ipaddress.ip_address(address) in subnet]
        else:
            fitting = list(addresses) if name == wanted else []
        if fitting:
            return name, fitting[0]
    present = ", ".join(f"{name} ({', '.join(addresses)})" for name, addresses in interfaces.items())
    problem = "no interface has the node's own address" if wanted is None else "there is none"
    raise UserError(
        f"training.network_interface = {wanted or 'null'}: {problem} on node {node}, which has {present}; name an "
        "interface that every node has, or a subnet (10.1.0.0/16) that all nodes are in"
    )


def choose_here(wanted: str | None) -> tuple[str, str]:
    """`choose` on the node of this process."""
    from ray.util import get_node_ip_address

    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = {
        name: [entry.address.partition("%")[0] for family in families for entry in entries if entry.family == family]
        for name, entries in psutil.net_if_addrs().items()
    }
    with_address = {name: addresses for name, addresses in interfaces.items() if addresses}
    return choose(wanted, get_node_ip_address(), with_address)


def _look(shared: SharedFiles) -> list[str]:
    """Runs on every rank: what its node does not see."""
    from ray.util import get_node_ip_address

    return [f"node {get_node_ip_address()} {problem}" for problem in shared.missing_here(retried=True)]


def _listen(interface: str | None) -> tuple[str, int]:
    """Runs on rank 0: open the rendezvous socket, only on its interface. Returns address and port."""
    _, address = choose_here(interface)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    _listeners.append(listener)
    return address, listener.getsockname()[1]


def _meet(config: OneInterface, address: str, port: int) -> None:
    """Runs on every rank: start torch.distributed. Variables set by the node's administrator are kept."""
    import torch.distributed as dist

    SET_RANK_VARIABLES.get()()
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    name, _ = choose_here(config.interface)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=": all names with this prefix
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        world,
        is_master=rank == 0,
        timeout=timedelta(seconds=MEETING_SECONDS),
        wait_for_workers=False,
        master_listen_fd=_listeners.pop().detach() if rank == 0 else None,
    )
    timeout = timedelta(seconds=config.timeout_s)
    dist.init_process_group(config.backend, store=store, rank=rank, world_size=world, timeout=timeout)
