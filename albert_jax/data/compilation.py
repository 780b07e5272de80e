"""How this package's numba functions are compiled: once, off the GIL, kept where that is possible.

In compiled code `int` means int64; a uint64 never meets an int64 in one expression, which numba (as
NumPy) would turn into a float64.
"""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], counted: bool = True) -> Callable[..., Any]:
    """`function` as machine code, made at its first call, which releases the GIL.

    Nothing is checked in it: neither bounds nor division by zero.
    """
    options = {"nogil": True, "error_model": "numpy", "_nrt": counted}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # nowhere to write the cache: compile anew in every process
        return numba.njit(function, **options)


def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `compiled`, for a function that neither makes nor returns arrays.

    It leaves reference counts alone, which else cost an atomic operation at every slice and call.
    """
    return compiled(function, counted=False)
