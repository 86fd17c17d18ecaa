"""An error of omniq's that was raised while compiling, without the one that Dynamo puts around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import BackendCompilerFailed

from omniq_compile.lowering.errors import OmniqError


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what omniq raised in the place of what Dynamo makes of it.

    Raises:
        OmniqError: as omniq raised it.
    """
    try:
        yield
    except BackendCompilerFailed as failed:
        if isinstance(failed.inner_exception, OmniqError):
            raise failed.inner_exception from None
        raise
