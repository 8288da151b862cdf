"""Which rank this process is, and who started it.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

# Where the ranks that launch() started meet: a file in a directory of their own.
STORE_VARIABLE = "COLROW_STORE"
# glibc returns large blocks to the system as soon as they are free, which hands them out again page
# by page, zeroed: some 5 % of a training step. These ranks keep them, at their largest size so far.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# Slurm gives the shells of salloc and sbatch step numbers too; they are not srun's ranks.
_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place among the ranks, as its launcher wrote it into the environment.

    Attributes:
        launcher: "colrow", "torchrun", "mpiexec" or "srun".
        rank: this process's number among all ranks.
        world_size: number of ranks on all hosts.
        local_rank: this process's number among the ranks of its host.
        local_world_size: number of ranks on its host.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def remedy(self) -> str:
        """What to add to a complaint when the variables may be left over from something else."""
        if self.launcher != "torchrun" or has_variables("TORCHELASTIC_RUN_ID"):
            return ""
        return (
            " (RANK and WORLD_SIZE are set in the environment, and no torchrun runs: if they are "
            "left over, unset them)"
        )

    def __post_init__(self) -> None:
        for what, number, size in (
            ("rank", self.rank, self.world_size),
            ("local rank", self.local_rank, self.local_world_size),
        ):
            if not 0 <= number < size:
                raise ValueError(
                    f"{self.launcher}'s environment says {what} {number} of {size}: "
                    f"a {what} is at least 0 and below the number of ranks{self.remedy}"
                )


def launched_by() -> str | None:
    """The launcher whose rank this process is, None when nobody started ranks.

    Returns:
        "colrow" (:func:`colrow.launch.launch`), "torchrun", "mpiexec", "srun" or None.
    """
    environment = rank_environment()
    return environment.launcher if environment else None


def rank_environment() -> RankEnvironment | None:
    """Reads what the launcher of this process wrote into the environment.

    Known are :func:`colrow.launch.launch`, torchrun (RANK, WORLD_SIZE), Open MPI
    (OMPI_COMM_WORLD_*), MPICH and Intel MPI (PMI_*, MPI_LOCAL*) and Slurm's srun (SLURM_PROCID and
    the step's variables). The shell of an ``salloc`` or ``sbatch`` is not a rank, nor is a step of
    one task.

    Raises:
        ValueError: when a variable is not a number, a rank is out of range, or the launcher does
            not say which ranks share this host.
    """
    if has_variables("RANK", "WORLD_SIZE"):
        launcher = "colrow" if has_variables(STORE_VARIABLE) else "torchrun"
        rank, size = number_in("RANK"), number_in("WORLD_SIZE")
        # Both are always set by torchrun; set by hand, the pair alone means one host.
        local_rank = number_in("LOCAL_RANK") if has_variables("LOCAL_RANK") else rank
        local_size = number_in("LOCAL_WORLD_SIZE") if has_variables("LOCAL_WORLD_SIZE") else size
        return RankEnvironment(launcher, rank, size, local_rank, local_size)
    if has_variables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        return RankEnvironment(
            "mpiexec",
            number_in("OMPI_COMM_WORLD_RANK"),
            number_in("OMPI_COMM_WORLD_SIZE"),
            *_local("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        )
    slurm = _slurm_environment()
    if has_variables("PMI_RANK", "PMI_SIZE"):
        rank, size = number_in("PMI_RANK"), number_in("PMI_SIZE")
        # srun sets PMI_* as well; an mpiexec inside a Slurm job gives its ranks other numbers.
        if slurm and (slurm.rank, slurm.world_size) == (rank, size):
            return slurm
        local_names = ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        if has_variables("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"):
            local_names = ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
        return RankEnvironment("mpiexec", rank, size, *_local(*local_names))
    return slurm


def allocator_variables() -> dict[str, str]:
    """What the environment of a rank says to glibc's allocator.

    Nothing where the user says something already (MALLOC_*, GLIBC_TUNABLES or LD_PRELOAD).
    """
    names = (name for name in os.environ if os.environ[name])
    if any(n.startswith("MALLOC_") or n in ("GLIBC_TUNABLES", "LD_PRELOAD") for n in names):
        return {}
    return dict(_KEEP_FREED_MEMORY)


@contextmanager
def inherited_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets these variables inside, for libraries and processes that are started there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def has_variables(*names: str) -> bool:
    """Whether the environment has all of these, none of them empty."""
    return all(os.environ.get(name) for name in names)


def number_in(name: str) -> int:
    """The whole number in an environment variable.

    Raises:
        ValueError: when it is none; names the variable.
    """
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(
            f"the environment variable {name} is {os.environ[name]!r}, not a whole number"
        ) from None


def _local(rank_name: str, size_name: str) -> tuple[int, int]:
    if not has_variables(rank_name, size_name):
        rank_name, size_name = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    if not has_variables(rank_name, size_name):
        raise ValueError(
            "this mpiexec does not tell which ranks share a host: set LOCAL_RANK and "
            "LOCAL_WORLD_SIZE for each rank"
        )
    return number_in(rank_name), number_in(size_name)


def _slurm_environment() -> RankEnvironment | None:
    if not has_variables("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_LOCALID"):
        return None
    if number_in("SLURM_STEP_ID") >= _FIRST_SPECIAL_SLURM_STEP:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if has_variables("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    size = number_in(tasks) if has_variables(tasks) else 1
    if size == 1:
        return None
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or str(size)
    node = number_in("SLURM_NODEID") if has_variables("SLURM_NODEID") else 0
    local_size = _tasks_of_node(per_node, node)
    return RankEnvironment(
        "srun", number_in("SLURM_PROCID"), size, number_in("SLURM_LOCALID"), local_size
    )


def _tasks_of_node(per_node: str, node: int) -> int:
    """The ``node``-th number of Slurm's run-length list: "4(x2),3" is 4, 4, 3."""
    counts: list[int] = []
    try:
        for item in per_node.split(","):
            tasks, _, times = item.partition("(x")
            counts += [int(tasks)] * int(times.rstrip(")") or 1)
        return counts[node]
    except (ValueError, IndexError):
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE is {per_node!r}, which has no number of tasks for the "
            f"node {node}"
        ) from None
