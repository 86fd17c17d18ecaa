"""Every metric beside its formula in numpy, and the gate on made-up numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from omniq_compile import OptionError
from omniq_compile.quality import perceptual
from omniq_compile.quality.compare_figures import Row, amplification
from omniq_compile.quality.gate import GATES, Gate
from omniq_compile.quality.generation import parse_seeds, pictures_of
from omniq_compile.quality.metrics import picture_metrics, relative_l2

pytest.importorskip("skimage")


def pair(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(0)
    a = numbers.random(shape, dtype=np.float32)
    return a, np.clip(a + numbers.normal(0, 0.1, shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(9, 14, 3), (8, 8, 1), (3, 11, 9, 3)])
def test_metrics_are_their_formulas(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    found = picture_metrics(a, b)
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    assert found["psnr"] == pytest.approx(-10 * np.log10(((x - y) ** 2).mean()), rel=1e-5)
    assert found["mae"] == pytest.approx(np.abs(x - y).mean())
    cosine = x @ y / np.sqrt((x @ x) * (y @ y))
    assert found["cosine"] == pytest.approx(cosine, rel=1e-9)
    assert found["relative_l2"] == pytest.approx(np.sqrt(((x - y) ** 2).sum() / (x @ x)))
    pictures = (a, b) if a.ndim == 4 else (a[None], b[None])
    assert found["ssim"] == pytest.approx(np.mean([ssim(*p) for p in zip(*pictures, strict=True)]))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, with uniform 7 x 7 windows and sample covariances, over each channel."""
    windows = [
        np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (7, 7), (0, 1))
        for x in (a, b)
    ]
    (mu_a, mu_b) = (w.mean((-1, -2)) for w in windows)
    spread = [w - m[..., None, None] for w, m in zip(windows, (mu_a, mu_b), strict=True)]
    var_a, var_b, both = (
        (spread[i] * spread[j]).sum((-1, -2)) / 48 for i, j in ((0, 0), (1, 1), (0, 1))
    )
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mu_a * mu_b + c1) * (2 * both + c2)
    return float((value / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean())


def test_equal_black_and_broken_pictures() -> None:
    a, b = pair(8, 8, 1)
    same = picture_metrics(a, a.copy())
    assert same == {
        "psnr": float("inf"), "ssim": 1.0, "mae": 0.0, "cosine": pytest.approx(1), "relative_l2": 0
    }  # fmt: skip
    black = np.zeros_like(a)
    assert picture_metrics(black, black)["cosine"] == 1
    assert picture_metrics(black, a)["cosine"] == 0
    assert relative_l2(black, a) == float("inf")
    b[0, 0] = np.nan
    assert all(np.isnan(value) for value in picture_metrics(a, b).values())
    assert picture_metrics(a[:6], a[:6])["ssim"] is None
    with pytest.raises(OptionError, match="shapes"):
        picture_metrics(a, a[:6])


def seed(**changed: float) -> dict[str, float]:
    return {"seed": 3, "psnr": 25.0, "cosine": 0.995, "relative_l2": 0.08, **changed}


def test_the_gate_is_at_its_thresholds() -> None:
    strict = GATES["strict"]
    assert strict == Gate(psnr=25.0, cosine=0.995, relative_l2=0.08)
    assert GATES["smoke"].psnr == 20.0
    assert strict.failures([seed(), seed(psnr=float("inf"))]) == []
    for name, bad in (("psnr", 24.99), ("cosine", 0.9949), ("relative_l2", 0.0801)):
        (line,) = strict.failures([seed(), seed(**{name: bad})])
        assert line.startswith(f"seed 3: {name} ")
        assert len(strict.failures([seed(**{name: float("nan")})])) == 1


def test_seeds() -> None:
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("7, 1-2,5") == [7, 1, 2, 5]
    for text in ("", "-1", "1-", "a", "1.5", "0,,1", str(1 << 63)):
        with pytest.raises(OptionError, match="--seeds"):
            parse_seeds(text)


def test_pictures_of_every_kind() -> None:
    class Result:
        def __init__(self, **made: object) -> None:
            vars(self).update(made)

    grey = np.arange(2 * 8 * 9, dtype=np.float32).reshape(2, 8, 9) / 144
    assert pictures_of(Result(images=grey)).shape == (2, 8, 9, 1)
    first = torch.from_numpy(grey)[:, None].expand(2, 3, 8, 9)
    assert np.array_equal(pictures_of(Result(images=first))[..., 1], grey)
    from PIL import Image

    pil = [Image.fromarray(np.full((8, 9, 3), value, np.uint8)) for value in (0, 255)]
    assert pictures_of(Result(images=pil)).mean((1, 2, 3)).tolist() == [0, 1]
    video = np.stack([np.stack([grey[0]] * 3, -1)] * 5)[None]
    assert pictures_of(Result(frames=video)).shape == (5, 8, 9, 3)


def test_the_factor_of_differences_keeps_them_in_range() -> None:
    a = np.full((8, 8, 1), 0.5, np.float32)
    assert amplification([Row("", a, a + 0.009)]) == 100
    assert amplification([Row("", a, a + 0.3)]) == 2
    assert amplification([Row("", a, a)]) == 1000


def test_lpips_that_cannot_be_measured_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "32 x 80 are smaller" in perceptual.load_lpips((32, 80))[1]
    monkeypatch.setitem(sys.modules, "lpips", None)
    distance, reason = perceptual.load_lpips((64, 64))
    assert distance is None
    assert "pip install lpips" in reason


def test_lpips_reads_weights_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips", exc_type=ImportError)
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "not on this machine" in perceptual.load_lpips((64, 64))[1]
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / Path(torchvision.models.AlexNet_Weights.DEFAULT.url).name
    torch.save(torchvision.models.alexnet().state_dict(), file)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: torch.load(file))
    distance, reason = perceptual.load_lpips((64, 64))
    assert distance is not None, reason
    a, b = pair(64, 64, 3)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, b) > 1e-4
    assert distance(a[..., :1], b[..., :1]) > 1e-4
