"""One writer at a time, on every file system."""

from __future__ import annotations

import errno
import fcntl
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from llmlab.base.errors import InputError

HELD = {errno.EAGAIN, errno.EACCES}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # some NFS, Lustre and FUSE mounts


@contextmanager
def locked(path: Path, busy: str, *, seconds: float = 60) -> Iterator[FileIO]:
    """Open a file for reading and appending, unbuffered, and keep other processes from it by flock(2).

    The lock is the open file's: a killed process leaves none. Where the file system has no locks this warns and goes
    on without one.

    Args:
        path: made if it is missing.
        busy: what to say if another process holds it.
        seconds: how long to wait for that process.

    Raises InputError if the file cannot be opened or stays held.
    """
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise InputError(f"cannot write to {path} ({error.strerror}): make it writable or use another place.") from None
    with file:
        deadline = time.monotonic() + seconds
        while not _taken(file):
            if time.monotonic() >= deadline:
                raise InputError(busy)
            time.sleep(0.05)
        yield file


def _taken(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise
        reason = f"the file system of {file.name} has no locks ({error.strerror})"
        warnings.warn(f"{reason}: let no two processes write there at once.", stacklevel=4)
    return True
