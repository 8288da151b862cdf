"""Ranks: who a process is, how they are started and watched, which one failed.

Importing this package does not import torch.
"""

from colrow.launch.environment import RankEnvironment, launched_by, rank_environment
from colrow.launch.errors import BAD_INPUT, RankFailure, debugging, error_message
from colrow.launch.ranks import available_cores, launch

__all__ = [
    "BAD_INPUT",
    "RankEnvironment",
    "RankFailure",
    "available_cores",
    "debugging",
    "error_message",
    "launch",
    "launched_by",
    "rank_environment",
]
