"""Several hosts on this one: network namespaces with names and addresses of their own (Linux)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_SECONDS_TO_START = 10


class TwoHosts:
    """Two hosts, ``host0`` and ``host1``, with a cable between them and no way anywhere else.

    Each is a process that sleeps in namespaces of its own (network, host name, mounts), inside one
    user namespace, so that no privileges are needed and nothing of this machine's network changes.

    Args:
        directory: for the hosts' ``/etc/hosts``.

    Raises:
        OSError: on starting, when this machine does not permit that; says why.
    """

    head, port = "host0", 29400

    def __init__(self, directory: Path) -> None:
        self._names = directory / "hosts"
        self._holders: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Makes them."""
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def ready(self) -> None:
        """Returns when a second launcher may be started: here, at any time."""

    def close(self) -> None:
        """Ends the hosts; what still runs in them loses its network."""
        for holder in self._holders:
            holder.kill()
            holder.wait()
        self._holders = []

    def command(self, host: int, words: list[str]) -> list[str]:
        """What to run here so that ``words`` run on a host."""
        target = str(self._holders[host].pid)
        spaces = ["--user", "--net", "--uts", "--mount"]
        options = ["--target", target, "--preserve-credentials", f"--wd={Path.cwd()}"]
        return ["nsenter", *spaces, *options, "--", *words]

    def _make(self) -> None:
        missing = [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name)]
        if missing:
            raise OSError(f"there is no {', '.join(missing)} here")
        self._names.write_text("127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n")
        alone = ["unshare", "--net", "--uts", "--mount"]
        self._hold([*alone, "--user", "--map-root-user", "sleep", "infinity"])
        first = str(self._holders[0].pid)
        inside = ["nsenter", "--user", "--target", first, "--preserve-credentials", "--"]
        self._hold([*inside, *alone, "sleep", "infinity"])
        second = self._holders[1].pid
        self._run(0, f"ip link add eth0 type veth peer name eth0 netns {second}")
        for host in (0, 1):
            self._run(host, f"mount --bind '{self._names}' /etc/hosts")
            self._run(host, f"echo host{host} > /proc/sys/kernel/hostname")
            self._run(host, f"ip addr add 10.77.0.{host + 1}/24 dev eth0")
            self._run(host, "ip link set lo up && ip link set eth0 up")

    def _hold(self, words: list[str]) -> None:
        holder = subprocess.Popen(words, stderr=subprocess.PIPE)
        self._holders.append(holder)
        deadline = time.monotonic() + _SECONDS_TO_START
        while Path(f"/proc/{holder.pid}/comm").read_text().strip() != "sleep":
            if holder.poll() is not None or time.monotonic() > deadline:
                holder.kill()
                _, said = holder.communicate()
                raise OSError(f"no namespaces: {said.decode().strip() or 'they did not start'}")
            time.sleep(0.01)

    def _run(self, host: int, script: str) -> None:
        ended = subprocess.run(
            self.command(host, ["sh", "-c", script]), capture_output=True, text=True
        )
        if ended.returncode:
            raise OSError(f"{script}: {ended.stderr.strip()}")


class OneHost:
    """Where there are no namespaces: two launchers on this host, which meet at a port of it."""

    head = "localhost"

    def __init__(self) -> None:
        with socket.create_server(("localhost", 0)) as listener:
            self.port: int = listener.getsockname()[1]

    def command(self, _: int, words: list[str]) -> list[str]:
        """The words themselves."""
        return words

    def ready(self) -> None:
        """Returns when the first launcher listens; a second one would else be the head."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection((self.head, self.port)).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the first launcher does not listen")


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process and all that it started, as when a host loses its power."""
    found, front = [process.pid], [process.pid]
    while front:
        parent = front.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            children = [int(pid) for pid in task.read_text().split()]
            found += children
            front += children
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
