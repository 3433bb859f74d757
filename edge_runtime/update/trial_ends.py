# SPDX-License-Identifier: Apache-2.0
"""How a trial's process ends, and whose fault that is.

Only :data:`VERDICT` blames the weights. What this device cannot do (no memory, no file
handles, a disk that gives an error, a package that cannot be imported) is
:data:`BLOCKED`. What fails before the model's turn is no fault of the model's, so the
beginning of its turn is told on standard output; and its end, as an exit code alone is
no proof: the process that started the trial may not learn it.
"""

from collections.abc import Iterator

from edge_runtime.errors import (
    BackendError,
    BlockedError,
    DpuError,
    tells_of_the_system,
)

VERDICT, NO_BACKEND, BLOCKED = 20, 11, 10
BEGUN, PASSED = b"the model's turn\n", b"passed\n"
THREADS = 4  # that NumPy's BLAS may use in a trial


def end_code(error: Exception) -> int:
    """Return what a trial ends with for an error: whose fault it is."""
    if isinstance(error, BlockedError) or any(map(_is_of_the_system, _chain(error))):
        return BLOCKED
    if isinstance(error, BackendError):
        return NO_BACKEND
    # A bug in this project is no verdict either.
    return VERDICT if isinstance(error, DpuError) else BLOCKED


def _is_of_the_system(error: BaseException) -> bool:
    system = isinstance(error, OSError | MemoryError | ImportError)
    return system or tells_of_the_system(str(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    # A BackendError is that a package is missing: what its import raised says no more.
    while error is not None:
        yield error
        error = None if isinstance(error, BackendError) else error.__cause__
