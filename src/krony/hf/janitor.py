"""Removes a claim when the process that made it is gone, however it ended: a program of its own.

Run as `python -I -S janitor.py FOLDER` with a pipe as its input. A word in the pipe says that all
is done; the pipe's end says that the owner was killed, and then the folder is removed, unless
another process has claimed it since. Nothing but the standard library, so that it starts at once.
"""

import os
import shutil
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX: claims hold, but nobody cleans up after a kill
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
PATIENCE = 500  # times 10 ms; then somebody else is at work there


def locked(folder: Path) -> int | None:
    """A descriptor that holds the lock in `folder`; None if another process has it.

    Raises:
        FileNotFoundError: the folder is gone.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if fcntl is None:
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: then there are none
        return descriptor
    try:
        # Between opening and locking, the one who had it may have removed it.
        if os.fstat(descriptor).st_ino == os.stat(folder / LOCK).st_ino:
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    raise FileNotFoundError(folder)


def wait(folder: Path) -> None:
    """Until the pipe says that all is done, or ends; then remove what is left."""
    if sys.stdin.buffer.read(1):
        return
    for _ in range(PATIENCE):  # the system may close the pipe before it lifts the lock
        try:
            if locked(folder) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                return
        except OSError:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    wait(Path(sys.argv[1]))
