"""Memory of large results: used again once a result is gone, and never before."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from omniq_compile.lowering import recycled
from omniq_compile.lowering.integer_matmul import int8_matmul

ROWS, COLUMNS = 1031, 2053  # int32: 8.5 MB


@pytest.fixture(autouse=True)
def nothing_free() -> Iterator[None]:
    gc.collect()
    recycled._free.clear()
    yield
    recycled._free.clear()


def large(value: int, rows: int = ROWS) -> torch.Tensor:
    return recycled.empty((rows, COLUMNS), torch.int32).fill_(value)


def test_a_result_takes_the_memory_of_one_that_is_gone() -> None:
    first = large(1)
    address = first.data_ptr()
    del first
    assert large(2, ROWS - 7).data_ptr() == address


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x[5:9, 3], lambda x: x.numpy()])
def test_memory_that_anything_still_reads_is_left_alone(keep) -> None:  # type: ignore[no-untyped-def]
    first = large(1)
    address, kept = first.data_ptr(), keep(first)
    del first
    second = large(2)
    assert second.data_ptr() != address
    assert (kept == 1).all()
    assert (second == 2).all()


def test_a_block_that_is_too_small_is_not_taken() -> None:
    small = large(1)
    address = small.data_ptr()
    del small
    more = large(2, ROWS + 1)
    assert more.data_ptr() != address
    assert (more == 2).all()


def test_small_results_are_pytorchs_own() -> None:
    recycled.empty((3, 5), torch.int32)
    assert not recycled._free


def test_another_default_device_changes_nothing() -> None:
    """Memory of another device has no address here."""
    with torch.device("meta"):
        results = large(1), recycled.empty((3, 5), torch.int32)
    assert {result.device.type for result in results} == {"cpu"}
    assert (results[0] == 1).all()


def test_no_more_than_the_largest_blocks_wait() -> None:
    results = [large(i, ROWS + i) for i in range(recycled.KEPT + 3)]
    largest = {result.data_ptr() for result in results[-recycled.KEPT :]}
    results.clear()
    assert {block.data_ptr() for block in recycled._free} == largest


def test_threads_do_not_share_memory() -> None:
    failures: list[int] = []

    def work(value: int) -> None:
        for _ in range(20):
            result = large(value)
            failures.extend([value] * int((result != value).any()))
            del result

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_products_into_used_memory_are_exact() -> None:
    """Whatever the last result left there, with rows of zeros among the operands."""
    K = 70
    a = torch.randint(-127, 128, (ROWS, K), dtype=torch.int8)
    b = torch.randint(-127, 128, (COLUMNS, K), dtype=torch.int8)
    a[::5] = 0
    exact = (a.double() @ b.double().T).int()
    waste = large(0x7F7F7F7F)
    address = waste.data_ptr()
    del waste
    result = int8_matmul(a, b, True)
    assert result.data_ptr() == address
    assert torch.equal(result, exact)
    held = int8_matmul(a[:-1], b, True)
    assert held.data_ptr() != address
    assert torch.equal(result, exact)
