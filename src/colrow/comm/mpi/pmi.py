"""The process manager that MPI's ranks ask for each other's addresses while they start.

mpiexec brings one along; ranks that torchrun, srun or colrow started have none. This is a server of
the PMI-1 wire protocol (Balaji et al. 2010, "PMI: A Scalable Parallel Process-Management Interface
for Extreme-Scale Systems", section 3), which MPICH and its relatives speak: lines of key=value
pairs over a socket, a table of strings, and a barrier. It listens on loopback only, and ends when
its standard input does, so never outlives the rank that started it.
"""

from __future__ import annotations

import selectors
import signal
import socket
import sys
import uuid
from dataclasses import dataclass, field

_LIMITS = "kvsname_max=256 keylen_max=64 vallen_max=4096"


@dataclass
class _Client:
    connection: socket.socket
    received: bytes = b""


@dataclass
class Server:
    """Answers ``size`` ranks of one host.

    Attributes:
        size: number of ranks.
        port: where it listens, on 127.0.0.1.
    """

    size: int
    port: int = 0
    _table: dict[str, str] = field(default_factory=dict)
    _waiting: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=self.size)
        self.port = self._listener.getsockname()[1]
        # MPI's shared memory is named after it: no two jobs of a host may have the same.
        self._name = f"colrow_{uuid.uuid4().hex}"
        # All ranks are on one node: node 0, one node, size ranks on it.
        self._table["PMI_process_mapping"] = f"(vector,(0,1,{self.size}))"

    def serve_until(self, end: int) -> None:
        """Answers until the file descriptor ``end`` is at its end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(end, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == end:
                        return
                    if key.fileobj is self._listener:
                        connection, _ = self._listener.accept()
                        selector.register(connection, selectors.EVENT_READ, _Client(connection))
                    elif not self._read(key.data):
                        selector.unregister(key.data.connection)
                        key.data.connection.close()

    def _read(self, client: _Client) -> bool:
        """Answers the lines that came; False when the rank is gone."""
        try:
            data = client.connection.recv(65536)
        except ConnectionError:
            return False
        *lines, client.received = (client.received + data).split(b"\n")
        for line in lines:
            self._answer(client.connection, line.decode())
        return bool(data)

    def _answer(self, connection: socket.socket, line: str) -> None:
        words = dict(word.split("=", 1) for word in line.split(" ") if "=" in word)
        command = words.get("cmd", "")
        if command == "barrier_in":
            self._waiting.append(connection)
            if len(self._waiting) == self.size:
                for waiting in self._waiting:
                    waiting.sendall(b"cmd=barrier_out rc=0\n")
                self._waiting.clear()
            return
        if command == "put":
            self._table[words["key"]] = line.split("value=", 1)[1]
        connection.sendall(self._reply(command, words).encode() + b"\n")

    def _reply(self, command: str, words: dict[str, str]) -> str:
        match command:
            case "initack":
                rank = words["pmiid"]
                return f"cmd=initack rc=0\ncmd=set size={self.size}\ncmd=set rank={rank}\n" + (
                    "cmd=set debug=0"
                )
            case "init":
                return "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0"
            case "get_maxes":
                return f"cmd=maxes rc=0 {_LIMITS}"
            case "get_appnum":
                return "cmd=appnum rc=0 appnum=0"
            case "get_my_kvsname":
                return f"cmd=my_kvsname rc=0 kvsname={self._name}"
            case "get_universe_size":
                return f"cmd=universe_size rc=0 size={self.size}"
            case "put":
                return "cmd=put_result rc=0 msg=success"
            case "get" if (key := words["key"]) in self._table:
                return f"cmd=get_result rc=0 msg=success value={self._table[key]}"
            case "get":
                return "cmd=get_result rc=-1 msg=unknown_key value="
            case "finalize":
                return "cmd=finalize_ack rc=0"
            case _:
                return f"cmd={command} rc=-1 msg=unknown_command"


def main() -> None:
    """``python -m colrow.comm.mpi.pmi SIZE``: prints the port, then serves."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server = Server(int(sys.argv[1]))
    print(server.port, flush=True)
    server.serve_until(sys.stdin.fileno())


if __name__ == "__main__":
    main()
