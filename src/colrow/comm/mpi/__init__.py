"""A torch.distributed backend for CPU ranks of one host, over MPI: ``colrow_mpi``.

MPI moves a small message between two processes of a host in microseconds, through shared memory,
where Gloo goes through sockets. ``start`` brings MPI up in ranks that no mpiexec started, ``group``
(of ``reductions`` and ``exchanges``) is the process group, ``work`` waits. Needs the ``cpu`` extra
(mpi4py and an MPI library).
"""

BACKEND = "colrow_mpi"
"""Its name for torch.distributed."""
