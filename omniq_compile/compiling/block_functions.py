"""The function that a repeated block is compiled as: one for all blocks that compile alike."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn


class BlockFunctions:
    """The functions of blocks of one class, sizes and policy, which Dynamo compiles.

    Dynamo counts recompilations per code object: where many blocks that each compile anew share
    one, they reach its limit (``torch._dynamo.config.recompile_limit``), from which on blocks run
    as they are, without an error. So blocks share a function until one of them compiles anew though
    its inputs look like those of a block before, as where each reads its own number. From then on
    only those do whose own numbers and names are equal. Before that they are not told apart: most
    blocks that have a number never read it. A block with hooks has a function of its own, which is
    not kept here: no later hook is the same, and what was compiled goes with what calls it.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self._name = f"run_{kind.__name__}"
        self._shared = self._new()
        self._by_values: dict[Hashable, FunctionType] = {}
        self._seen: set[Hashable] = set()
        self._apart = False

    def of(self, block: nn.Module) -> FunctionType:
        """Return what calls a block, to be compiled; see the class for which blocks share it."""
        if hooks_of(block) != NO_HOOKS:
            return self._new()
        values = _own_values(block)
        if values not in self._by_values:
            self._by_values[values] = self._new() if self._apart else self._shared
        return self._by_values[values]

    def ran(self, arguments: Any, compiled: bool) -> None:
        """Note the first call of a block.

        Args:
            arguments: of the call, any nest of tensors and values.
            compiled: whether a graph was compiled in it.
        """
        inputs = str(torch.utils._pytree.tree_map(_looks, arguments))
        self._apart |= compiled and inputs in self._seen
        self._seen.add(inputs)

    def _new(self) -> FunctionType:
        # Dynamo skips the `_call_impl` of classes that are torch's own, such as `nn.Sequential`.
        code = _run_block.__code__.replace(co_name=self._name)
        function = FunctionType(code, globals(), _run_block.__name__)
        weakref.finalize(function, _forget_compiled, code).atexit = False
        return function


Hooks = tuple[tuple[int, ...], tuple[int, ...]]
NO_HOOKS: Hooks = (), ()


def hooks_of(block: nn.Module) -> Hooks:
    """Identify the forward hooks of a block itself, by their numbers: no two hooks share one."""
    return tuple(block._forward_pre_hooks), tuple(block._forward_hooks)


def is_whole_block(arguments: Mapping[str, Any]) -> bool:
    """Say whether a function with such arguments is that of a block, and no other that Dynamo
    compiles on its own, as it does beside a graph break.
    """
    code = _run_block.__code__
    return set(arguments) == set(code.co_varnames[: code.co_argcount + 2])


def _run_block(block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    # Past `__call__`, which would find the compiled form again; the hooks run in here.
    return block._call_impl(*args, **kwargs)


def _forget_compiled(code: CodeType) -> None:
    """Free what Dynamo compiled of a code object, and the quantized weights in it.

    It keeps them also when nothing can call them any more, as after another `compile` of a model.
    """
    from torch._dynamo.eval_frame import remove_from_cache  # private, of torch 2.11 to 2.15

    remove_from_cache(code)


_PLAIN = (int, float, str, type(None), torch.dtype)


def _own_values(block: nn.Module) -> Hashable:
    """What tells a block from others of its class and sizes, and Dynamo may compile for."""
    return tuple(
        (
            place,
            type(module),
            tuple((name, v) for name, v in vars(module).items() if isinstance(v, _PLAIN)),
        )
        for place, module in block.named_modules()
    )


def _looks(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        about = type(argument), argument.layout, argument.dtype, argument.device
        # Nested tensors have no sizes, and some sparse ones no strides.
        plain = argument.layout is torch.strided and not argument.is_nested
        return (*about, argument.shape, argument.stride()) if plain else about
    return argument if isinstance(argument, _PLAIN) else type(argument)
