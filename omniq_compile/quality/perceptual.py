"""LPIPS, where its package and its weights are on this machine; nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from omniq_compile.quality.generation import Pictures

# AlexNet's strides leave nothing of smaller pictures.
SMALLEST = 64

Distance = Callable[[Pictures, Pictures], float]


def load_lpips(size: tuple[int, int]) -> tuple[Distance | None, str]:
    """Return LPIPS with AlexNet features for pictures of ``(H, W)``.

    Returns:
        The distance of two pictures ``[H, W, C]`` from 0 to 1, or None with why there is none.
    """
    if min(size) < SMALLEST:
        return None, f"pictures of {size[0]} x {size[1]} are smaller than {SMALLEST} x {SMALLEST}"
    try:
        import lpips
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch fails with a RuntimeError.
        return None, f"package lpips cannot be imported ({error}): pip install lpips torchvision"
    url = AlexNet_Weights.DEFAULT.url
    weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not weights.is_file():
        return None, f"the weights of AlexNet are not on this machine: save {url} as {weights}"
    model = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)

    def distance(reference: Pictures, picture: Pictures) -> float:
        with torch.no_grad():
            left, right = (_as_rgb(x) for x in (reference, picture))
            return float(model(left, right, normalize=True))

    return distance, ""


def _as_rgb(picture: Pictures) -> torch.Tensor:
    channels = np.repeat(picture, 3, -1) if picture.shape[-1] == 1 else picture[..., :3]
    return torch.from_numpy(channels).permute(2, 0, 1)[None]
