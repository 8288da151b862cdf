"""Raw MPI between two processes, without torch: ``mpiexec -n 2 python mpi_latency.py``.

For choosing the library: the shortest median of five rounds of a blocking all-reduce.
"""

import statistics
import time

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
library = MPI.Get_library_version().splitlines()[0].strip()
for count, repeats in ((1024, 2000), (1 << 18, 200), (4 << 20, 20)):
    x = np.ones(count, dtype=np.float32)
    y = np.empty_like(x)
    rounds = []
    for _ in range(5):
        samples = []
        comm.Barrier()
        for _ in range(repeats):
            started = time.perf_counter()
            comm.Allreduce(x, y)
            samples.append(time.perf_counter() - started)
        rounds.append(statistics.median(samples))
    best = min(rounds)
    if comm.rank == 0:
        print(f"{library}: {x.nbytes} bytes, {best * 1e6:.1f} us, {x.nbytes / best / 1e9:.2f} GB/s")
