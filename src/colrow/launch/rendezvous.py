"""Where the ranks meet, and on which network interface they listen.

Importing this module does not import torch.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import TYPE_CHECKING, Any

from colrow.launch.environment import (
    STORE_VARIABLE,
    RankEnvironment,
    has_variables,
    number_in,
    rank_environment,
)

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_DEFAULT_PORT = 29500
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def rendezvous_arguments() -> dict[str, Any]:
    """The keyword arguments with which this rank meets the others.

    ``torch.distributed.init_process_group(backend, **rendezvous_arguments())``. Ranks of
    :func:`colrow.launch.launch` meet in a file; torchrun's through its own store; those of mpiexec
    and srun at MASTER_ADDR:MASTER_PORT, by default on this host's loopback address, where nobody
    from outside can connect.

    Where all ranks are on this host, Gloo and NCCL listen on the loopback interface alone:
    whatever the environment says for ranks that colrow started, and for those of other launchers
    unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names another interface.

    Raises:
        RuntimeError: when nobody started ranks.
        ValueError: when ranks on several hosts were not told where to meet, or the port is no
            port, or taken.
    """
    environment = rank_environment()
    if environment is None:
        raise RuntimeError("this process is not a rank: no launcher's environment was found")
    rank, size = environment.rank, environment.world_size
    if environment.launcher == "colrow":
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        stay_on_loopback()
        store = FileStore(os.environ[STORE_VARIABLE], size)
        return {"store": store, "rank": rank, "world_size": size}
    if environment.launcher == "torchrun" and not has_variables("MASTER_ADDR", "MASTER_PORT"):
        raise ValueError(
            "RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT are not: set them to "
            "rank 0's address and a free port, or start the ranks with torchrun; to start no "
            "ranks by hand, unset RANK and WORLD_SIZE"
        )
    port = _port()
    if _on_one_host(environment):
        stay_on_loopback(unless_named=True)
    # torchrun's agent holds the store itself.
    if environment.launcher == "torchrun" and has_variables("TORCHELASTIC_RUN_ID"):
        return {"init_method": "env://"}
    address = os.environ.get("MASTER_ADDR", "")
    if not address and environment.local_world_size < size:
        raise ValueError(
            f"{environment.launcher} started {size} ranks on several hosts "
            f"({environment.local_world_size} on this one): set MASTER_ADDR to the address of the "
            "host of rank 0, the same on all ranks"
        )
    if not address or _is_loopback(address):
        return {"store": _loopback_store(port, rank, size), "rank": rank, "world_size": size}
    host = f"[{address}]" if ":" in address else address
    return {"init_method": f"tcp://{host}:{port}", "rank": rank, "world_size": size}


def stay_on_loopback(*, unless_named: bool = False) -> None:
    """Makes Gloo and NCCL listen on the loopback interface only.

    Args:
        unless_named: leaves the interfaces that the environment names.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for name in _INTERFACE_VARIABLES:
        if not (unless_named and os.environ.get(name)):
            os.environ[name] = loopback


def _on_one_host(environment: RankEnvironment) -> bool:
    """Whether the launcher says so. RANK and WORLD_SIZE set by hand do not: the address may."""
    address = os.environ.get("MASTER_ADDR", "")
    if environment.launcher == "torchrun" and not has_variables("LOCAL_WORLD_SIZE"):
        return _is_loopback(address)
    return environment.local_world_size == environment.world_size


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _port() -> int:
    port = number_in("MASTER_PORT") if has_variables("MASTER_PORT") else _DEFAULT_PORT
    if not 0 < port < 1 << 16:
        raise ValueError(f"the environment variable MASTER_PORT is {port}: use 1 to 65535")
    return port


def _loopback_store(port: int, rank: int, size: int) -> Store:
    """A TCPStore of which rank 0 listens on the loopback address alone; torch's own on all."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if rank > 0:
        return TCPStore("127.0.0.1", port, size, is_master=False)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"rank 0 cannot listen on port {port} of this host ({error.strerror}): set MASTER_PORT "
            "to a free port, the same on all ranks"
        ) from None
    listener.listen()
    return TCPStore("127.0.0.1", port, size, is_master=True, master_listen_fd=listener.detach())
