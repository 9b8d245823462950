"""The C library's memory, for processes that do nothing but compute."""

from __future__ import annotations

import ctypes
import os
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 * 2**20
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep :data:`KEPT_BYTES` of freed memory for the next tile instead of giving it back to the system.

    Memory that is fresh from the system costs as much time as the convolution that fills it. A setting of the whole
    process, so only programs of our own call this; nothing where there is no glibc, or where the user has set malloc
    by its environment variables.
    """
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if set_by_user or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # the first one ends glibc's own adjustment of the second, whose start of 128 KiB would map every tile anew
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
