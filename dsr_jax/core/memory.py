"""Settings of the host's allocator for buffers that XLA's CPU programs free after each call."""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -4, -1, -2, -8
"""Parameters of glibc's mallopt (malloc.h)."""


def keep_freed_memory() -> bool:
    """Makes malloc reuse freed memory instead of returning it to the kernel.

    XLA allocates a program's temporary buffers anew at each call. glibc maps those above 32 MiB
    from the kernel each time, which then clears every page: up to a third of the time of attention
    on a CPU. From then on the process keeps its peak memory.

    Returns:
      False if the C library has no such setting; nothing changes then.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # A single arena, since those of other threads must map large blocks.
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26), (_ARENA_MAX, 1))
    return all([mallopt(name, value) for name, value in settings])
