"""Makes ``TORCH_LOGS="omniq"`` known to PyTorch, and quantized weights to ``torch.load``.

PyTorch 2.13 calls the entry points of the group ``torch.backends`` while it is imported, before it
reads ``TORCH_LOGS``, so that a backend can register the names of its logs. Earlier ones read it
first, and ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns the entry points off: there only the importable
name works, ``TORCH_LOGS="omniq_compile"``. Without entry points ``torch.load`` knows quantized
weights once ``omniq_compile.QuantizedTensor`` was used.
"""

from __future__ import annotations


def register() -> None:
    """Register the alias and the weights; PyTorch calls this while it is being imported.

    What fails here would fail ``import torch``, for programs without omniq too: it is logged.
    """
    try:
        # Private, checked on torch 2.11 to 2.15.
        from torch._logging._internal import register_log

        from omniq_compile.lowering.pickled import allow_loading

        # The parent of the logger `omniq`, as in `backend`: both spellings set the same one.
        register_log("omniq", "omniq_compile")
        allow_loading()
    except (ImportError, AttributeError, TypeError) as error:  # of a version that differs
        import logging

        logging.getLogger("omniq").warning(
            "omniq could not register with torch: TORCH_LOGS='omniq' and torch.load of quantized "
            "weights will not work: %r",
            error,
        )
