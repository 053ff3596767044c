"""Two hosts on one machine, for tests of what crosses a network: namespaces of Linux with a cable between them.

    with two_hosts() as hosts:
        process = hosts[0].start([sys.executable, "-m", ...], log, {})

Each has addresses and ports of its own and nothing else of the network; files are shared, as by a network drive. Needs
Linux, root and the program `ip` (package iproute2).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """A name, a network card and its address."""

    name: str
    card: str
    address: str

    def start(self, command: Sequence[str], log: Path, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A process on this host, with more in its environment; what it says goes to the end of the log."""
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.card} | dict(more)
        with open(log, "ab") as said:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env=env,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Numbers of all processes on this host."""
        return [int(number) for number in said("ip", "netns", "pids", self.name).split()]

    def crash(self) -> None:
        """SIGKILL to everything that runs here, until nothing does."""
        while numbers := self.processes():
            for number in numbers:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def missing() -> str:
    """What two hosts need and this machine does not have, or nothing."""
    if shutil.which("ip") is None:
        return "the program ip is not installed (Debian: apt install iproute2)"
    return "" if os.geteuid() == 0 else "network namespaces need root"


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable; all that runs on them is killed at the end. RuntimeError where there can be none."""
    if problem := missing():
        raise RuntimeError(f"no two hosts on this machine: {problem}")
    key = os.getpid()
    hosts = tuple(Host(f"host{i}-{key}", f"cable{i}", f"10.77.0.{i + 1}") for i in range(2))
    try:
        for host in hosts:
            said("ip", "netns", "add", host.name)
            said("ip", "-n", host.name, "link", "set", "lo", "up")
        ends = [("name", hosts[0].card, "netns", hosts[0].name), ("name", hosts[1].card, "netns", hosts[1].name)]
        said("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            said("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.card)
            said("ip", "-n", host.name, "link", "set", host.card, "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                host.crash()
                said("ip", "netns", "del", host.name)
