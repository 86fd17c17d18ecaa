"""How far pictures are from their references: each number from a library that is known for it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from omniq_compile.lowering.errors import OptionError
from omniq_compile.quality.generation import Pictures

# Width of the window that structural similarity looks through: its paper's, in scikit-image.
SSIM_WINDOW = 7


def need(module: str) -> Any:
    """Import a package of the ``compare`` extra.

    Raises:
        OptionError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OptionError(
            f"comparing pictures needs {module.partition('.')[0]} ({error}): "
            "pip install 'omniq-compile[compare]'."
        ) from error


def picture_metrics(reference: Pictures, picture: Pictures) -> dict[str, float | None]:
    """Compare pictures with values from 0 to 1.

    Args:
        reference, picture: ``[H, W, C]``, or ``[n, H, W, C]`` to compare all as one.

    Returns:
        ``psnr`` in dB (infinite for equal pictures), ``ssim``, ``mae``, ``cosine`` and
        ``relative_l2``; ssim is None for pictures smaller than its window, and for several at
        once their mean.

    Raises:
        OptionError: shapes that differ.
    """
    if reference.shape != picture.shape:
        raise OptionError(
            f"cannot compare pictures of shapes {list(reference.shape)} and {list(picture.shape)}."
        )
    if not np.isfinite(picture).all():
        # scikit-image would stop here; a model that breaks is what a gate is for.
        return dict.fromkeys(("psnr", "ssim", "mae", "cosine", "relative_l2"), float("nan"))
    left, right = (torch.from_numpy(x.astype(np.float64).ravel()) for x in (reference, picture))
    return {
        "psnr": psnr(reference, picture),
        "ssim": _ssim(reference, picture),
        "mae": float(F.l1_loss(right, left)),
        "cosine": _cosine(left, right),
        "relative_l2": relative_l2(reference, picture),
    }


def psnr(reference: Any, picture: Any) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite for equal pictures."""
    if np.array_equal(reference, picture):
        return float("inf")
    metrics = need("skimage.metrics")
    return float(metrics.peak_signal_noise_ratio(reference, picture, data_range=1))


def relative_l2(reference: Any, value: Any) -> float:
    """Return ``||value - reference|| / ||reference||``; infinite where only the reference is 0."""
    left, right = (np.asarray(x, dtype=np.float64) for x in (reference, value))
    if not left.any():
        return float("inf") if right.any() else 0.0
    metrics = need("skimage.metrics")
    return float(metrics.normalized_root_mse(left, right, normalization="euclidean"))


def _cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    # Two black pictures point nowhere, and equally so.
    if not left.any() or not right.any():
        return float(not left.any() and not right.any())
    return float(F.cosine_similarity(left, right, dim=0))


def _ssim(reference: Pictures, picture: Pictures) -> float | None:
    if min(reference.shape[-3:-1]) < SSIM_WINDOW:
        return None
    if reference.ndim == 4:
        each = [_ssim(a, b) for a, b in zip(reference, picture, strict=True)]
        return float(np.mean([x for x in each if x is not None]))
    metrics = need("skimage.metrics")
    return float(
        metrics.structural_similarity(
            reference, picture, data_range=1, channel_axis=-1, win_size=SSIM_WINDOW
        )
    )
