"""Tells the C library to keep memory that is freed, because a first touch of fresh memory costs ten times a copy.

By default glibc returns freed megabytes to the kernel and takes them back page by page. A step of decoding frees and
allocates the same few buffers every time: for 256 sequences of the tiny model a paged attention took 1.9 ms, of which
1.4 ms were page faults. This is a setting of the process, made once, when a run begins or the first CPU sampler is
made; it costs at most the memory named here.

Large tensors of training have memory of their own (r1fast_kernels/memory.py). What is left to malloc is small, but its
holes lie elsewhere at every step, and each that was touched stays. So their pages are given back now and then.
"""

from __future__ import annotations

import ctypes
import functools
import time

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
KEPT_BYTES = 512 << 20  # free memory at the top of the heap that is not given back
MAPPED_BYTES = 32 << 20  # blocks from here up are mapped and unmapped each time; glibc takes no higher limit


@functools.cache
def keep_freed_memory() -> bool:
    """Whether the C library took the settings (glibc does; others have no such knob)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_TOP_PAD, 64 << 20), (_M_MMAP_THRESHOLD, MAPPED_BYTES))
    return all(mallopt(option, value) for option, value in settings)


# Between two returns of holes. One walks the heap (25 to 45 ms over a thousand blocks of up to 256 KiB), and what comes
# back costs its first touch again (1.4 ms a MiB here); at 3M a whole step takes what it took without (2.83 s, 2.90).
SECONDS = 2.0
_returned = -SECONDS


def give_back_holes() -> bool:
    """Unless it was done just now, gives the pages of free memory back to the system, those between blocks in use too.
    Whether it did. To be called where little is in use, between two steps."""
    global _returned
    if time.monotonic() - _returned < SECONDS:
        return False
    _returned = time.monotonic()
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False
