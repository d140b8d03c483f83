"""Machines made of namespaces, each with its own network, addresses and temporary folder, connected by bridges.

Nothing is visible outside: the bridges are in the first machine's namespace, and it all ends with the processes that
hold the namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SUBNETS = ("10.77.0.0/24", "10.78.0.0/24")
"""Two networks that connect all machines."""
TOOLS = ("ip", "unshare", "nsenter", "mount")


def why_not() -> str | None:
    """Why this machine cannot have namespaces with networks of their own, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}"
    tried = subprocess.run(unshare("net", "ip link add br0 type bridge"), capture_output=True, text=True)
    return None if tried.returncode == 0 else f"network namespaces cannot be made: {tried.stderr.strip()}"


def unshare(kinds: str, script: str) -> list[str]:
    """The words of a shell script in new namespaces (net, mount). Other users are root in a user namespace."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *as_root, *(f"--{kind}" for kind in kinds.split()), "sh", "-c", script]


@dataclass(frozen=True)
class Machine:
    """A network and a mount namespace, kept alive by a process."""

    holder: int
    number: int

    @property
    def address(self) -> str:
        """Its address in the first network."""
        return self.places[0][1]

    @property
    def second(self) -> str:
        """Its address in the second network."""
        return self.places[1][1]

    @property
    def places(self) -> list[tuple[str, str]]:
        """(name, address) of its interfaces, one per network."""
        stems = ("net", "wire")
        return [
            (f"{stem}{self.number}", f"{subnet.rpartition('.')[0]}.{self.number + 1}")
            for stem, subnet in zip(stems, SUBNETS, strict=True)
        ]

    def command(self, *words: str) -> list[str]:
        """The words of a command that runs on this machine."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self.holder), "--net", "--mount", *user, f"--wd={Path.cwd()}", *words]

    def run(self, *words: str) -> str:
        """The output of a short command on this machine."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Processes on this machine with `part` in their command line."""
        network = os.readlink(f"/proc/{self.holder}/ns/net")
        processes = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/net") == network and part in " ".join(process.cmdline()):
                    processes.append(process)
            except (psutil.Error, OSError):  # it ended in the meantime
                continue
        return processes


@dataclass(frozen=True)
class Network:
    """Machines that can reach each other; the first one has the bridge."""

    machines: Sequence[Machine]

    def cut_off(self, machine: Machine) -> None:
        """Pull its cables: packets are lost silently."""
        for name, _ in machine.places:
            self.machines[0].run("ip", "link", "set", f"to_{name}", "down")


@contextmanager
def network(count: int, temporary: Path) -> Iterator[Network]:
    """Machines 10.77.0.1, .2, ...; each has its own `temporary` and shares the rest of the file system.

    Two networks (`SUBNETS`) connect them. Their interfaces have different names, and each has an extra one (`decoy`)
    with an address that leads nowhere.
    """
    with ExitStack() as stack:
        machines = [_machine(stack, number, temporary) for number in range(count)]
        hub = machines[0]
        bridges = [name for name, _ in hub.places]
        for bridge in bridges:
            hub.run("ip", "link", "add", bridge, "type", "bridge")
        for machine in machines:
            for bridge, (name, _) in zip(bridges, machine.places, strict=True):
                if machine is not hub:
                    peer = ["type", "veth", "peer", "name", name, "netns", str(machine.holder)]
                    hub.run("ip", "link", "add", f"to_{name}", *peer)
                    hub.run("ip", "link", "set", f"to_{name}", "master", bridge, "up")
            machine.run("ip", "link", "add", "decoy", "type", "bridge")
            for name, address in (("decoy", f"192.168.77.{machine.number + 1}"), *machine.places):
                machine.run("ip", "address", "add", f"{address}/24", "dev", name)
                machine.run("ip", "link", "set", name, "up")
            machine.run("ip", "link", "set", "lo", "up")
        yield Network(machines)


def _machine(stack: ExitStack, number: int, temporary: Path) -> Machine:
    ready = f"mount -t tmpfs none {temporary} && echo ready && exec sleep infinity"
    holder = subprocess.Popen(unshare("net mount", ready), stdout=subprocess.PIPE, text=True)
    machine = Machine(holder.pid, number)
    stack.callback(_end, holder, machine)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    return machine


def _end(holder: subprocess.Popen[str], machine: Machine) -> None:
    """Stop everything that runs on the machine, and the machine."""
    running = [process for process in machine.processes() if process.pid != holder.pid]
    for process in running:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(running, timeout=20)
    holder.kill()
    holder.wait()
