"""Which rank a process is, as its launcher wrote it into the environment."""

from __future__ import annotations

import os

import pytest

from colrow.launch import RankEnvironment, rank_environment

SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": "1"}, None),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            RankEnvironment("torchrun", 3, 4, 1, 2),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            RankEnvironment("mpiexec", 3, 4, 1, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
            RankEnvironment("mpiexec", 1, 2, 0, 1),
        ),
        (
            SRUN | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3"},
            RankEnvironment("srun", 5, 7, 1, 3),
        ),
        (
            SRUN
            | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
            | {"PMI_RANK": "5", "PMI_SIZE": "8"},
            RankEnvironment("srun", 5, 8, 1, 4),
        ),
        # The shell of an salloc: the job's tasks, but no step, or the interactive one.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),
        (SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "8"}, None),
        # srun --pty bash
        (SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_launchers_are_recognised(
    variables: dict[str, str],
    expected: RankEnvironment | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_environment() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "says rank 2 of 2.*if they are left over, unset them"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "says rank 0 of 0"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "set LOCAL_RANK and LOCAL_WORLD_SIZE"),
    ],
)
def test_a_broken_environment_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        rank_environment()
