"""One process at a time in one place. The system releases a lock when its process ends, however it ends: a killed one is in nobody's way."""

from __future__ import annotations

import atexit
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from parts.errors import InputError
from parts.processes import is_first_process

if TYPE_CHECKING:
    from filelock import FileLock

_held: dict[Path, FileLock] = {}


def hold(*targets: str | Path) -> None:
    """Keep other processes from `targets`, files or folders that this run writes, until it ends.

    Of a launcher's processes the first one holds the locks, for all. A lock is a file beside its target, `.<name>.lock`, that says who.

    Raises:
        InputError: another process holds one, or nothing can be written beside a target.
    """
    if not is_first_process():
        return
    from filelock import FileLock, Timeout

    for target in map(Path, targets):
        path = _lock_path(target)
        if path in _held:
            continue
        lock = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"{target}: in use by {_holder(path)}; expected it to end first, or another place") from None
        except OSError as error:
            raise InputError(f"{target}: cannot be written there ({error.strerror})") from None
        _held[path] = lock
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        path.write_text(f"process {os.getpid()} on {platform.node()} since {now}: {' '.join(sys.argv)}", encoding="utf-8")


@contextmanager
def alone_at(target: str | Path) -> Iterator[bool]:
    """Whether nobody else works at a target, for a moment, to clear up there; the lock that a killed process left goes too."""
    from filelock import FileLock, Timeout

    path = _lock_path(Path(target))
    if not is_first_process() or path in _held:
        yield path in _held
        return
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):  # somebody's, or in a folder that is read only
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _lock_path(target: Path) -> Path:
    return Path(os.path.realpath(target.parent)) / f".{target.name}.lock"


def _holder(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8").split())[:300] or "another process"
    except OSError:  # it has just ended
        return "another process"


@atexit.register
def release() -> None:
    """Release this process's locks, and remove their files."""
    while _held:
        path, lock = _held.popitem()
        path.unlink(missing_ok=True)  # while it is held: whoever opened it before finds it gone and makes a new one
        lock.release()
