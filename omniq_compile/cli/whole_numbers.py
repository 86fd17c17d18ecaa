"""Whole numbers on the command line, as ``argparse`` takes types."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Return a number from 1 on.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def seed(text: str) -> int:
    """Return what a ``torch.Generator`` takes.

    Raises:
        argparse.ArgumentTypeError: it is no such number.
    """
    value = _whole(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**63 - 1")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
