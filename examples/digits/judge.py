"""What the pictures are worth: a classifier trained on the real digits, and PSNR."""

import functools
from typing import NamedTuple

import numpy as np
from skimage.metrics import peak_signal_noise_ratio
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

MAX_PIXEL = 16


class Digits(NamedTuple):
    """Real pictures, float32 `[n, 8, 8]` from 0 to 1, and their labels, int64 `[n]`."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def load_split() -> tuple[Digits, Digits]:
    """Return scikit-learn's digits as (train, test): 1437 and 360 pictures, always the same."""
    data = load_digits()
    images = (data.images / MAX_PIXEL).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, data.target, test_size=0.2, random_state=0, stratify=data.target
    )
    return Digits(train_x, train_y), Digits(test_x, test_y)


@functools.cache
def _classifier() -> SVC:
    train, _ = load_split()
    return SVC(gamma=0.001).fit(_features(train.images), train.labels)


def _features(images: np.ndarray) -> np.ndarray:
    # gamma=0.001 belongs to the data set's own 0 to 16 scale.
    return images.reshape(len(images), -1) * MAX_PIXEL


def read_digits(images: np.ndarray) -> np.ndarray:
    """Return the digit the classifier reads in each of `images`, `[n, 8, 8]`, as int64 `[n]`."""
    return _classifier().predict(_features(images))


def held_out_accuracy() -> float:
    """Return the share of the real held-out digits that the classifier reads right, 0 to 1."""
    _, test = load_split()
    return float((read_digits(test.images) == test.labels).mean())


def psnr_per_picture(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return each picture's PSNR in dB, float64 `[n]`; infinite where two pictures are equal.

    Both arguments are `[n, 8, 8]` from 0 to 1.
    """
    if reference.shape != images.shape:
        raise ValueError(
            f"cannot compare pictures of shapes {reference.shape} and {images.shape}: draw both "
            f"sets with the same digits"
        )
    return np.array(
        [
            np.inf if np.array_equal(a, b) else peak_signal_noise_ratio(a, b, data_range=1)
            for a, b in zip(reference, images, strict=True)
        ]
    )


def mean_psnr(psnr: np.ndarray) -> float:
    """Return the mean in dB over the pictures that differ; infinite when none does."""
    finite = psnr[np.isfinite(psnr)]
    return float(finite.mean()) if len(finite) else float("inf")
