"""The call of Inductor, and what it is told about GEMMs first."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from omniq_compile.compiling import kernel_accesses
from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.triton_kernels import launch
from omniq_compile.passes.config import QuantConfig

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e8m0fnu)


def settings_of(config: QuantConfig) -> dict[str, Any]:
    """Return the settings of Inductor that a configuration asks for, by its mode and by name."""
    return {**torch._inductor.list_mode_options(config.mode), **config.inductor}


def compile(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a graph with `torch._inductor.compile`.

    Args:
        gm: a graph of torch's operators and omniq's.
        inputs: one for each placeholder, real or fake.
        settings: of Inductor, see `torch._inductor.list_options`.

    Raises:
        OptionError: a setting that fails at the codes of a format, or a device that Inductor
            generates no code for.
    """
    _refuse_devices_without_code(inputs)
    _refuse_checks_of_codes(inputs, settings)
    _store_operands_once()
    _divide_sums()
    kernel_accesses.remember()
    with _rows_in_registers(inputs):
        compiled: Callable[..., Any] = torch._inductor.compile(
            gm, list(inputs), options={**settings, **_known_by_own_code(settings)}
        )
    return compiled


def _refuse_devices_without_code(inputs: Sequence[Any]) -> None:
    """Refuse devices for which nobody told Inductor how, where it fails with a KeyError.

    Private, checked on torch 2.11 to 2.15.
    """
    from torch._inductor.codegen.common import get_scheduling_for_device, init_backend_registration

    init_backend_registration()
    for device in {x.device.type for x in inputs if isinstance(x, torch.Tensor)}:
        if device == "npu":
            _register_npu()
        if get_scheduling_for_device(device) is None:
            raise OptionError(
                f"Inductor generates no code for {device!r} here. What registers it belongs to the "
                "device's own package: torch_npu has it where Triton for Ascend is installed. "
                "Without it compile with options={'compiler': 'aot_eager'}, or --compiler "
                "aot_eager on the command line."
            )


def _register_npu() -> None:
    """Let torch_npu tell Inductor how, which it does by itself for Inductor's own backend alone.

    That is in the call that `patch_inductor_wrapper` of torch_npu/utils/_dynamo.py replaces.
    Private, checked on torch_npu 2.11 to 2.14; without Triton for Ascend it warns and does nothing.
    """
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("torch_npu.utils._dynamo").register_inductor_npu()


def _refuse_checks_of_codes(inputs: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Refuse to look for NaN in codes of 8 bits, which PyTorch cannot ask whether they are Inf."""
    if not settings.get("nan_asserts", torch._inductor.config.nan_asserts):
        return
    codes = {x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.dtype in FLOAT8}
    if codes:
        raise OptionError(
            f"Inductor's setting 'nan_asserts' fails at codes in {codes.pop()}, for which PyTorch "
            "has no isinf. Leave it out with this method: omniq refuses weights with NaN or Inf "
            "when it quantizes them."
        )


# What AOTInductor writes beside a packaged model; elsewhere only the caches read it.
_METADATA = "aot_inductor.metadata"


def _known_by_own_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a setting that tells graphs of this code of omniq's from others in PyTorch's caches.

    A compiled graph has launches of omniq's kernels in it, and its key has only the names of their
    operators. PyTorch's own tag, ``torch.compiler.config.cache_key_tag``, is not for that: which
    block sizes of Inductor's kernels were fastest is kept by it too, and Inductor's workers, which
    do not get it, keep them by another name than they are looked up by. A first call whose program
    lies in the cache would time them again.
    """
    given = settings.get(_METADATA, torch._inductor.config.aot_inductor.metadata)
    return {_METADATA: {**given, "omniq": _own_code()}}


@cache
def _own_code() -> str:
    """Return a digest of what decides about a graph's code beside Inductor: the files that make
    launches (device code, tiles and their choice), and this one.
    """
    digest = hashlib.sha256()
    for file in (*sorted(Path(launch.__file__).parent.glob("*.py")), Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _store_operands_once() -> None:
    """Tell Inductor that GEMMs read their operands from memory, as it knows of `aten.mm`.

    Where one activation feeds three GEMMs, it would otherwise compute and store it three times on
    a GPU. `torch._int_mm` reads rows too: what is computed from columns Inductor would store as
    columns, which cuBLASLt refuses. Private, checked on torch 2.11 to 2.15, whose function for the
    first takes no Triton launches before 2.13; other graphs of the process may profit too.
    """
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
    from torch._inductor.lowering import (
        add_layout_constraint,
        constrain_to_fx_strides,
        needs_realized_inputs,
    )

    aten, known = torch.ops.aten, needs_realized_inputs
    add_layout_constraint(aten._int_mm.default, constrain_to_fx_strides)
    known.update([aten._scaled_mm.default, aten._int_mm.default])
    known.add(triton_kernel_wrapper_mutation)  # type: ignore[arg-type]


# With more symbols sympy may take long to divide.
_FEW_SYMBOLS = 8


@cache
def _divide_sums() -> None:
    """Let Inductor see that ``960 * s + 6720`` is a multiple of ``s + 7``.

    So many elements have rows of text and image tokens, of which one number is symbolic. Inductor
    of torch 2.12 and 2.13 fuses what computes them with the amax of their rows on a GPU, and then
    fails as it cannot divide them among the rows ("CantSplit", pytorch/pytorch#183696), which 2.11
    and 2.14 can. Private, checked on torch 2.11 to 2.13; other graphs of the process profit too.
    """
    if torch.__version__ >= "2.14":
        return
    from torch._inductor.sizevars import SizeVarAllocator

    known = SizeVarAllocator.statically_known_multiple_of

    def is_multiple(sizes: Any, numerator: Any, denominator: Any) -> bool:
        return known(sizes, numerator, denominator) or _divides(denominator, numerator)

    allocator: Any = SizeVarAllocator
    allocator.statically_known_multiple_of = is_multiple


def _divides(denominator: Any, numerator: Any) -> bool:
    """Say whether a size with symbols is a whole multiple of another, as polynomials over integers.

    Over fractions ``s * (s + 7) / 2`` would be one of ``s + 7``, which for an odd ``s`` it is not.
    """
    import sympy  # type: ignore[import-untyped]
    from sympy.polys.polyerrors import BasePolynomialError  # type: ignore[import-untyped]

    sizes = denominator, numerator
    symbols: list[set[Any]] = [getattr(size, "free_symbols", set()) for size in sizes]
    if not symbols[0] or len(set.union(*symbols)) > _FEW_SYMBOLS:
        return False
    try:
        _, rest = sympy.div(numerator, denominator, domain="ZZ")
    except BasePolynomialError:  # one has parts that are none, such as a choice between sizes
        return False
    return bool(rest == 0)


# 512 threads hold 32 elements each of a row of this length, and what is computed from them.
_LONGEST_ROW = 16384


@cache
def _choices() -> Any:
    """Return Inductor's choices, but for rows that a program holds: private, as are the two below,
    and checked on torch 2.11 to 2.15.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint

    class Choices(InductorChoices):
        # Both are static before torch 2.14.
        def should_use_persistent_reduction(  # type: ignore[override]
            self, features: Any, cooperative_reduction: bool
        ) -> bool:
            """Hold contiguous rows of up to `_LONGEST_ROW`, where Inductor stops at 1024.

            Longer ones it reads in a loop for each reduction and once more for the results, and
            computes what comes before them again: the mean and variance of a norm, the amax of
            its result and its codes are four loops.
            """
            if super().should_use_persistent_reduction(features, cooperative_reduction):
                return True
            row = features.reduction_numel
            return (
                torch._inductor.config.triton.persistent_reductions
                and not cooperative_reduction
                and features.get_reduction_hint() is ReductionHint.INNER
                and bool(row.is_number)
                and int(row) <= _LONGEST_ROW
            )

        def reduction_split_factor(  # type: ignore[override]
            self,
            device: torch.device,
            reduction_numel_hint: int,
            numel_hint: int,
            inner_reduction: bool,
        ) -> int:
            """Leave such a row to one program too where there are few of them: cut into parts,
            it takes a launch more, and is computed twice.
            """
            if inner_reduction and reduction_numel_hint <= _LONGEST_ROW:
                return 1
            return super().reduction_split_factor(
                device, reduction_numel_hint, numel_hint, inner_reduction
            )

    return Choices()


@contextlib.contextmanager
def _rows_in_registers(inputs: Sequence[Any]) -> Iterator[None]:
    """Let Inductor's Triton keep a row in registers, unless someone else chooses for it.

    On NVIDIA's and AMD's GPUs alone: nobody has timed it on others.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    on_gpu = any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in inputs)
    if not on_gpu or type(V.choices) is not InductorChoices:
        yield
        return
    with V.set_choices_handler(_choices()):
        yield
