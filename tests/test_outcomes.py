"""What passed and what failed is in a file while the rest still runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcomes import Outcomes

pytest_plugins = ["pytester"]

TESTS = """
import pathlib, pytest

def test_passes(): pass

@pytest.mark.parametrize("size", [3, 4])
def test_fails(size): assert size == 3, "too large"

def test_is_skipped(): pytest.skip("no device")

@pytest.fixture
def broken(): raise OSError("no memory")

def test_is_not_reached(broken): pass

def test_what_was_before_is_written():
    assert len(pathlib.Path("out/come.txt").read_text().splitlines()) == 7
"""


def test_each_outcome_is_written_when_it_is_known(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TESTS)
    file = Path("out/come.txt")
    pytester.runpytest_inprocess("-p", "no:xdist", plugins=[Outcomes(file)])
    title, empty, *lines = file.read_text().splitlines()
    assert "torch" in title
    assert not empty
    rows = [line.split("  ") for line in lines]
    assert [(outcome, name.partition("::")[2]) for outcome, _, name, *_ in rows] == [
        ("passed", "test_passes"),
        ("passed", "test_fails[3]"),
        ("failed", "test_fails[4]"),
        ("skipped", "test_is_skipped"),
        ("failed", "test_is_not_reached"),
        ("passed", "test_what_was_before_is_written"),
    ]
    assert all(seconds.endswith(" s") for _, seconds, *_ in rows)
    assert "too large" in rows[2][3]
    assert "no memory" in rows[4][3]
