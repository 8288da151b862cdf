"""What a process that is killed leaves behind, and who may still be writing: names and locks.

Temporary directories and unfinished files carry the process that made them in their names, so that
a later one can tell those of dead processes from those in use, and removes its own alone. A
directory that one run writes to is locked by it; a lock ends with its process, however that ends.

Importing this module does not import torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

LOCK = ".lock"
_OWNER = re.compile(r"[.-]([0-9a-f]{8})-(\d+)-(\d+)(?:-[^.]*)?(?:\.part)?")
# The locks that this process holds, by device and inode: file descriptor, and how often.
_held: dict[tuple[int, int], tuple[int, int]] = {}


def scratch_directory(kind: str) -> Path:
    """A new temporary directory; those of this kind that dead processes left are removed first."""
    prefix = f"colrow-{kind}"
    _remove_stale(Path(tempfile.gettempdir()), prefix)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}-{_owner(os.getpid())}-"))


def part_of(path: Path) -> Path:
    """The name under which to write what will be ``path``; dead processes' ones are removed."""
    _remove_stale(path.parent, path.name)
    return path.with_name(f"{path.name}.{_owner(os.getpid())}.part")


def lock(directory: Path, remedy: str) -> None:
    """Makes the directory this process's alone to write to, until it is unlocked as often.

    Or until the process ends. Where the file system has no locks, nothing is locked.

    Args:
        directory: is made when it is missing.
        remedy: what to do instead, for the message.

    Raises:
        ValueError: when another process holds it, on this host or another one.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    stat = os.fstat(descriptor)
    if (stat.st_dev, stat.st_ino) in _held:
        os.close(descriptor)
        own, times = _held[stat.st_dev, stat.st_ino]
        _held[stat.st_dev, stat.st_ino] = own, times + 1
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return
        raise ValueError(
            f"{directory} is in use by another run ({holder or 'which has not said its name'}): "
            f"wait for it to end, or {remedy}"
        ) from None
    _held[stat.st_dev, stat.st_ino] = descriptor, 1
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def unlock(directory: Path) -> None:
    """Gives up a lock of this process once; without one does nothing."""
    with suppress(OSError):
        stat = (directory / LOCK).stat()
        descriptor, times = _held.pop((stat.st_dev, stat.st_ino), (-1, 1))
        if times > 1:
            _held[stat.st_dev, stat.st_ino] = descriptor, times - 1
        elif descriptor >= 0:
            os.close(descriptor)


def _remove_stale(directory: Path, prefix: str) -> None:
    here = _owner(os.getpid()).partition("-")[0]
    try:
        entries = list(os.scandir(directory))
    except OSError:
        return
    for entry in entries:
        match = _OWNER.fullmatch(entry.name.removeprefix(prefix))
        if not entry.name.startswith(prefix) or match is None or match[1] != here:
            continue
        with suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            if _started(int(match[2])) == match[3]:  # it runs
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


@cache
def _owner(process: int) -> str:
    """A process of all hosts and containers: where it is, its id, and when it started."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    here = hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]
    return f"{here}-{process}-{_started(process)}"


def _started(process: int) -> str:
    """When it started, in ticks; "0" for one that runs where that is unknown, "" for none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "0"
