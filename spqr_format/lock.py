"""One writer in a folder at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import SpqrError

try:
    import fcntl
except ImportError:  # not a POSIX system: two writers then meet at the first file that both would create
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)


class FolderLock:
    """Held from the moment it is made until `release`; the system drops it when the process ends, however it ends.

    The folder itself is locked, so that no file of its own is left behind. Raises E512 where another writer, of this or of
    another process, holds it. File systems that cannot lock a folder (some network ones) go without.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None  # first, for `release` is called in any case
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise SpqrError("E512", str(folder), "another process is writing here") from None
        else:
            self._descriptor = descriptor

    def release(self) -> None:
        """Lets the next writer in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()
