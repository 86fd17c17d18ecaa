"""Runs a model once without any values: what its blocks do, its work, and its live tensors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from omniq_compile.lowering.errors import OmniqError


@dataclass
class BlockCall:
    """One call of a repeated block.

    Attributes:
        args, kwargs: as it was called.
        output: what it returned.
        operations: every operator that ran in it, with the shapes, dtypes and strides of its
            tensors and the block's own names of its parameters. Two blocks of one class with the
            same operations do the same work on the same layers.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    operations: list[Any] = field(default_factory=list)


@dataclass
class MetaRun:
    """What one call of a model showed.

    Attributes:
        calls: of each repeated block, in the order of the run.
        attention_flops: of `scaled_dot_product_attention`, two a multiply-add.
        other_flops: of every other product and convolution.
        peak_bytes: of the tensors alive at once, parameters and buffers left out.
    """

    calls: list[tuple[str, BlockCall]] = field(default_factory=list)
    attention_flops: int = 0
    other_flops: int = 0
    peak_bytes: int = 0


def to_meta(inputs: Any) -> Any:
    """Return the same structure with tensors on the meta device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)


def run_on_meta(
    model: nn.Module, inputs: Mapping[str, Any], blocks: Mapping[str, nn.Module]
) -> MetaRun:
    """Call a model on the meta device, eagerly, and watch it.

    Attention is taken as one operator that keeps no score matrix, as fused kernels have it; the
    meta device would write it out.

    Raises:
        OmniqError: the model needs values to run, or other inputs.
    """
    run = MetaRun()
    watch = _Watch(model, run)
    hooks = [hook for name, block in blocks.items() for hook in watch.follow(name, block)]
    try:
        with torch.no_grad(), _Attention(watch), watch:
            model(**inputs)
    except (RuntimeError, NotImplementedError) as error:
        raise OmniqError(
            f"{type(model).__name__} cannot run without values, on the meta device: {error}"
        ) from error
    except Exception as error:  # such as an input that this configuration wants, and others do not
        raise OmniqError(
            f"{type(model).__name__} refused the inputs that were made up for it: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return run


class _Watch(TorchDispatchMode):
    """Sees every operator that runs."""

    def __init__(self, model: nn.Module, run: MetaRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run
        self._call: BlockCall | None = None
        self._names: dict[int, str] = {}
        self._live = 0
        self._known: dict[Any, tuple[Any, ...]] = {}
        owned = [*model.parameters(), *model.buffers()]
        self._seen = {tensor.untyped_storage()._cdata for tensor in owned}

    def follow(self, name: str, block: nn.Module) -> list[Any]:
        """Hook a block, so that its calls are recorded; returns the hooks."""
        names = {id(p): n for n, p in [*block.named_parameters(), *block.named_buffers()]}

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._call, self._names = BlockCall(args, kwargs), names
            self._run.calls.append((name, self._call))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            assert self._call is not None
            self._call.output = output
            self._call = None

        return [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave, with_kwargs=True),
        ]

    def record(self, operator: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note an operator of the block that is running, and the memory of its result."""
        if self._call is not None:
            leaves, structure = tree_flatten((args, kwargs))
            seen = tuple(self._describe(leaf) for leaf in leaves)
            self._call.operations.append((str(operator), str(structure), seen))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())

    def _describe(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf)
        name = self._names.get(id(leaf))
        return name, tuple(leaf.shape), leaf.stride(), str(leaf.dtype)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self._live += storage.nbytes()
        self._run.peak_bytes = max(self._run.peak_bytes, self._live)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size

    def _call_operator(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, or allocate what it returned for tensors that look the same.

        A model repeats a few shapes, and PyTorch's Python takes up to a millisecond to find what
        an operator returns on the meta device.
        """
        if not _makes_one_tensor(operator):
            return operator(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        key = (operator, structure, tuple(map(_looks, leaves)))
        known = self._known.get(key)
        if known is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        output = operator(*args, **kwargs)
        if output.is_meta:
            self._known[key] = (output.shape, output.stride(), output.dtype)
        return output

    def add_attention(self, flops: int) -> None:
        self._run.attention_flops += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = self._call_operator(func, args, kwargs)
        self.record(func, args, kwargs, output)
        # The formulas of `FlopCounterMode`, which decomposes every operator on its way to them.
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self._run.other_flops += count(*args, **kwargs, out_val=output)
        return output


def _looks(leaf: Any) -> Any:
    """What an operator's result depends on, beside values."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return repr(leaf)


@cache
def _makes_one_tensor(operator: Any) -> bool:
    """Whether an operator returns one tensor, in memory of its own, and writes to no other."""
    schema = operator._schema
    own = [result for result in schema.returns if result.alias_info is None]
    return (
        [str(result.type) for result in own] == ["Tensor"]
        and len(schema.returns) == 1
        and not schema.is_mutable
    )


class _Attention(TorchFunctionMode):
    """Takes `scaled_dot_product_attention` as one operator."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in names)
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        self._watch.record("attention", args, kwargs, output)
        self._watch.add_attention(attention_flops(query.shape, key.shape, value.shape))
        return output


def attention_flops(query: Any, key: Any, value: Any) -> int:
    """Count ``softmax(q k^T) v``: q ``[..., S, D]``, k ``[..., T, D]``, v ``[..., T, E]``."""
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
