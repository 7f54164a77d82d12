"""Memory that stays with the process: glibc hands large blocks back to the system at once and asks for them anew.

Every layer of a VAE at 512x512 fills blocks of some 100 MB, and each page of a fresh block costs a page fault: about a
quarter of the decoder's time on a CPU. Kept blocks cost none. The price is in memory: what was needed at the peak
stays with the process, for whatever it allocates next.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Of <malloc.h>: the size of free memory at the heap's end beyond which it is given back, and how many blocks may be
# requested from the system one by one. With their defaults, to which they return.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM, _DEFAULT_MMAPS = 128 * 1024, 65536


def can_keep_memory() -> bool:
    """Tell whether the C library is the one that these settings are of."""
    return platform.libc_ver()[0] == "glibc"


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the process keep freed memory: a setting of the whole process, and of glibc alone."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAPS)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM)
        libc.malloc_trim(0)
