"""`compile`: each repeated block compiled once per distinct policy, and called for all."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from omniq_compile.backend import compile_graph
from omniq_compile.compiling.all_kept import KeptLayers
from omniq_compile.compiling.block_functions import NO_HOOKS, BlockFunctions, Hooks, hooks_of
from omniq_compile.compiling.block_parts import compiled_parts, holds_wide_linear
from omniq_compile.compiling.compiled_modules import call_instead
from omniq_compile.compiling.enclosing import refuse_many, refuse_unequal
from omniq_compile.compiling.own_backend import own_backend
from omniq_compile.compiling.silent_blocks import (
    after_first_call,
    warn_not_called,
    warn_without_products,
)
from omniq_compile.compiling.unmatched import warn_unmatched_in
from omniq_compile.compiling.whole_or_blocks import check_not_whole, refuse_whole
from omniq_compile.given_model import check_model
from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.model_blocks import module_blocks
from omniq_compile.own_method import OwnMethod
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.layer_names import possible_names
from omniq_compile.passes.patterns import first_match
from omniq_compile.passes.policy import leading_reason
from omniq_compile.passes.sites import Site

logger = logging.getLogger("omniq")

NOT_PASSED_ON = ("model", "backend", "options")


def compile(
    model: nn.Module, options: Mapping[str, Any] | QuantConfig, **compile_arguments: Any
) -> nn.Module:
    """Compile a model's repeated blocks in place, one compile for each class and policy.

    What `torch.compile` cannot know of a block compiled on its own, its name and its place in the
    model, is known here: ``ignored_layers`` and ``w4a8_fallback_layers`` match full names, and the
    leading ``num_bf16_fallback_layers`` blocks stay BF16, in the order the model first runs them.
    Layers outside the blocks (embeddings, the last projection) run as they are. Of a block that no
    one can call, such as an ``nn.ModuleList`` of attention and feed-forward, what can be called in
    it is compiled. A model that calls none of its blocks, but methods of theirs, is warned of when
    it is called. One that is compiled as a whole later, alone or in something around it, refuses.

    Args:
        model: any module with repeated blocks.
        options: see `QuantConfig`.
        compile_arguments: passed on to ``torch.compile``, such as ``dynamic=True``; ``mode`` goes
            in place of the option of that name.

    Returns:
        The model.

    Raises:
        OptionError: no module, unknown options, arguments or mode, a mode that the compiler does
            not read, a model without repeated blocks or one that is compiled as a whole.
    """
    check_model(model, "compile")
    _check_arguments(compile_arguments)
    check_not_whole(model)
    config = QuantConfig.from_options(options).with_mode(compile_arguments.pop("mode", None))
    blocks = compiled_parts(module_blocks(model), config)
    if not blocks:
        raise OptionError(
            f"{type(model).__name__} has no repeated blocks to compile. Compile it whole: "
            "torch.compile(model, backend='omniq', options=...)."
        )
    warn_unmatched_in(model, config)
    stored = any(isinstance(weight, QuantizedTensor) for weight in model.parameters())
    # A model that is kept whole is so by no option, which a user could change.
    warned = None if stored or config.keep_all else type(model).__name__
    regions = _Regions(warned, blocks, config, compile_arguments)
    refuse_whole(model)
    after_first_call(model, partial(regions.warn_of_silence, type(model).__name__))
    return model


def _check_arguments(given: Mapping[str, Any]) -> None:
    if "backend" in given:
        raise OptionError(
            "omniq_compile.compile takes no argument 'backend': it compiles with omniq's. Other "
            "backends are for torch.compile."
        )
    # Those that it passes on; the model and the options are its own.
    valid = [n for n in inspect.signature(torch.compile).parameters if n not in NOT_PASSED_ON]
    for name in given:
        if name not in valid:
            raise OptionError(unknown("argument of omniq_compile.compile", name, valid))


class _Regions:
    """The compiled forms of a model's blocks, made when each block first runs.

    ``warned`` is what a warning calls the model where nothing is quantized; None is no warning.
    ``blocks`` are the parts of each block that are compiled.
    """

    def __init__(
        self,
        warned: str | None,
        blocks: dict[str, dict[str, nn.Module]],
        config: QuantConfig,
        compile_arguments: dict[str, Any],
    ) -> None:
        self._warned = warned
        self._block_of = {name: block for block, parts in blocks.items() for name in parts}
        self._count = len(blocks)
        self._left = set(self._block_of)  # the parts that have not run
        self._expected = any(
            holds_wide_linear(part, config) for parts in blocks.values() for part in parts.values()
        )
        self._kept = KeptLayers()
        self._config = config
        self._arguments = compile_arguments
        self._order: dict[str, int] = {}
        self._backends: dict[Any, Any] = {}
        self._functions: dict[Any, BlockFunctions] = {}
        self._policies = _count_policies(config, blocks)
        for name, part in (item for parts in blocks.values() for item in parts.items()):
            call_instead(part, OwnMethod(partial(self._first_call, name), part))

    def warn_of_silence(self, model: str) -> None:
        """Warn, when a model has run, where nothing of its blocks was compiled."""
        if self._config.keep_all:
            return
        first = next(iter(self._block_of.values()))
        graphs, products = self._kept.graphs, self._kept.products
        if not self._order:
            warn_not_called(model, self._count, first)
        elif len(self._order) == self._count and not (products if self._expected else graphs):
            warn_without_products(model, self._count, first, graphs)

    def _first_call(self, name: str, block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return block._call_impl(*args, **kwargs)  # there PyTorch compiles nothing, and warns
        place = self._order.setdefault(self._block_of[name], len(self._order))
        config = block_config(self._config, name, block, place)
        if config not in self._backends:
            # The patterns are names of this block's modules now, which no user has to hear of.
            # Dynamo keeps the backend, and by it would keep all functions if it referred to this.
            decided = partial(_check, self._kept, self._policies)
            self._backends[config] = own_backend(
                partial(compile_graph, config=config, decided=decided, by_block=True)
            )
            logger.info("policy %d starts at block %s", len(self._backends), name)
        functions, graphs = self._functions_of(block, config), self._kept.graphs
        compiled = torch.compile(functions.of(block), **self._backends[config], **self._arguments)
        # Dynamo does not see that a hook is added to a module, or removed.
        call = partial(_call_with_hooks, compiled, hooks_of(block), partial(self._first_call, name))
        call_instead(block, OwnMethod(call, block))
        result = compiled(block, *args, **kwargs)
        if hooks_of(block) == NO_HOOKS:  # those of others are compiled apart anyhow
            functions.ran((args, kwargs), compiled=self._kept.graphs > graphs)
        self._left.discard(name)
        if not self._left and self._warned is not None:
            self._kept.warn(self._warned)
        return result

    def _functions_of(self, block: nn.Module, config: QuantConfig) -> BlockFunctions:
        """Return the functions of blocks of one class, policy, and sizes, of which a UNet's blocks
        have many.
        """
        kind = type(block)
        sizes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        key = kind, sizes, config
        if key not in self._functions:
            self._functions[key] = BlockFunctions(kind)
        return self._functions[key]


def _count_policies(
    config: QuantConfig, blocks: dict[str, dict[str, nn.Module]]
) -> Counter[type[nn.Module]]:
    """Return how many different policies a model's configuration gives to blocks of each class."""
    policies = {
        (type(part), block_config(config, name, part, place))
        for place, parts in enumerate(blocks.values())
        for name, part in parts.items()
    }
    return Counter(kind for kind, _ in policies)


def _check(
    kept: KeptLayers,
    policies: Mapping[type[nn.Module], int],
    config: QuantConfig,
    sites: Sequence[Site],
) -> None:
    refuse_many(policies)
    refuse_unequal(config, sites)
    kept.add(config, sites)


def _call_with_hooks(
    compiled: Callable[..., Any],
    hooks: Hooks,
    first_call: Callable[..., Any],
    block: nn.Module,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call what a block was compiled to while it had some hooks, or compile it for those it has."""
    call = compiled if hooks_of(block) == hooks else first_call
    return call(block, *args, **kwargs)


def _pattern(name: str, below: bool) -> str:
    """Word the pattern of what has a name in a block, and maybe of what is below it."""
    if not name:
        return "re:.*" if below else "re:"
    return f"re:{re.escape(name)}" + (r"(\..*)?" if below else "")


def _names_above(name: str) -> list[str]:
    """Name what holds something in a block, the block among it, which is named ""."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))] if name else []


def block_config(config: QuantConfig, name: str, block: nn.Module, place: int) -> QuantConfig:
    """Return the configuration of one block, with names as the block itself sees them.

    Args:
        config: of the whole model.
        name: of the block.
        block: the module.
        place: zero-based, in the order the model runs its blocks.
    """
    names = possible_names(block, name)

    def inside(patterns: tuple[str, ...]) -> tuple[str, ...]:
        # A name that is no regular expression means what is below it too, such as the layers of an
        # adapter that is loaded after the first call.
        plain = [pattern for pattern in patterns if not pattern.startswith("re:")]
        whole = {own for own, full in names if first_match(plain, full)}
        return tuple(
            _pattern(own, own in whole)
            for own, full in names
            if first_match(patterns, full) and whole.isdisjoint(_names_above(own))
        )

    return dataclasses.replace(
        config,
        ignored_layers=inside(config.ignored_layers),
        w4a8_fallback_layers=inside(config.w4a8_fallback_layers),
        num_bf16_fallback_layers=0,
        keep_all=config.keep_all
        or (leading_reason(config) if place < config.num_bf16_fallback_layers else ""),
    )
