"""Memory-mapped files count as a process's memory as far as it has read them; this takes them off again."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable


def release_pages(files: Iterable[str]) -> None:
    """Give back the pages of all read-only mappings of these files; the next access maps them again.

    The data stay in the system's page cache. Does nothing outside Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    wanted = {os.path.realpath(file) for file in files}
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as maps:
        for line in maps:
            # address range, permissions, offset, device, inode, path
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted and "w" not in fields[1]:
                start, end = (int(address, 16) for address in fields[0].split("-"))
                length = ctypes.c_size_t(end - start)
                libc.madvise(ctypes.c_void_p(start), length, mmap.MADV_DONTNEED)
