"""Memory of a training step on a CPU: kept between steps instead of given back to the system.

XLA takes the memory of a whole step from the C library and frees it after each one. glibc answers a
request of that size with a new mapping, so that every step would touch thousands of fresh pages,
each a fault and a page to be zeroed: on two cores a quarter of the time of a small model's step.
"""

import ctypes
import pathlib
import sys

# From glibc's malloc.h: threads share one heap (others cannot grow to a step's size), no request is
# a mapping of its own, and this much free memory stays at the heap's end.
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1
_KEPT_BYTES = 2**31 - 1
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def keep_freed() -> bool:
    """Has the C library keep what is freed, where steps run on the CPU and the library is glibc.

    To be called before JAX starts its threads, which choose their heaps then. Returns whether it
    was done; machines with a TPU or GPU are left as they are.
    """
    devices = pathlib.Path("/dev")
    if sys.platform != "linux" or any(any(devices.glob(name)) for name in _ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT_BYTES))
    return all(mallopt(name, value) for name, value in settings)
