"""The memory that contenders share: one heap, whose page faults are no contender's own."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt` (`man 3 mallopt`)."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for what is allocated next, for the rest of the process.

    By default it gives free memory at the end of its heap back to the system, and takes it anew, a page fault every 4
    KiB. How often that happens is decided by what lies last in the heap, and so by all contenders that a process holds.

    Returns:
        Whether the allocator is glibc's; others (jemalloc, macOS) are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))
