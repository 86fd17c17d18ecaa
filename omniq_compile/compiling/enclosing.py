"""Refuses layer patterns that a block compiled on its own, or a part of one, cannot obey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from omniq_compile.compiling.block_functions import is_whole_block
from omniq_compile.compiling.compiled_modules import original
from omniq_compile.compiling.traced_modules import modules_being_called, traced_modules
from omniq_compile.lowering.errors import OptionError
from omniq_compile.passes import dynamo
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.patterns import first_match
from omniq_compile.passes.sites import Site


def refuse_full_names(config: QuantConfig, sites: Sequence[Site]) -> None:
    """Check the patterns of a compile against the names that its graph does not show.

    diffusers' ``compile_repeated_blocks`` compiles one block for all of its class, and Dynamo
    compiles a module on its own where a graph break interrupts its caller. A pattern with a block's
    index or full name then matches nothing in the graph, though it does in the model, and the
    layer it names would be quantized. The model is found as the outermost module whose call is in
    progress.

    Args:
        config: whose patterns to check.
        sites: of the graph, as decided by the configuration.

    Raises:
        OptionError: a pattern names a layer that is quantized, of the compiled module or of one of
            its class that would share the compiled code, only by its full name.
    """
    quantized = [site for site in sites if site.decision.method is not None]
    given = any(config.layer_patterns.values())
    calls = list(modules_being_called()) if given and quantized else []
    if not calls or calls[0] is calls[-1]:
        return
    compiled, model = calls[0], calls[-1]
    for name, module in model.named_modules():
        if type(original(module)) is not type(compiled) or not name:
            continue
        for site in quantized:
            full = site.layer_in(name)
            for option, patterns in config.layer_patterns.items():
                pattern = first_match(patterns, full)
                if pattern is not None and first_match(patterns, site.layer) is None:
                    raise OptionError(
                        f"{option} pattern {pattern!r} names {full} of {type(model).__name__}, and "
                        f"{type(compiled).__name__} is compiled on its own here, once for all of "
                        f"them, where that layer is only {site.layer!r}. Use "
                        "omniq_compile.compile(model, options), which knows the full name of "
                        "every block's layers; or a pattern that means the same layer of each."
                    )


def refuse_unequal(config: QuantConfig, sites: Sequence[Site]) -> None:
    """Check that the layers of a module that a graph break left alone are decided for all like it.

    Dynamo compiles the rest of its method once, for every module of its class in a block, where the
    patterns may tell them apart.

    Args:
        config: with patterns for the names in the block.
        sites: of the graph, with those names.

    Raises:
        OptionError: a pattern names a layer of one of them, and not of another.
    """
    modules = traced_modules()
    if not any(config.layer_patterns.values()) or len(modules) < 2:
        return
    alone, block = modules[0], modules[-1]
    alike = {name: module for name, module in block.named_modules() if type(module) is type(alone)}
    own = next((name for name, module in alike.items() if module is alone), None)
    if own is None:
        return
    for site in sites:
        inside = site.layer.removeprefix(own)
        for option, patterns in config.layer_patterns.items():
            named = {name: first_match(patterns, f"{name}{inside}") is not None for name in alike}
            if len(set(named.values())) > 1:
                yes = next(name for name, matched in named.items() if matched)
                no = next(name for name, matched in named.items() if not matched)
                raise OptionError(
                    f"{option} names {yes}{inside} of {type(block).__name__} and not "
                    f"{no}{inside}, and a graph break in {type(alone).__name__} has the two "
                    "compiled once, for both. Use patterns that name the same layer of each, or "
                    "take the break out (TORCH_LOGS='graph_breaks' shows it)."
                )


def refuse_many(policies: Mapping[type[nn.Module], int]) -> None:
    """Check that a graph break leaves no more policies to one function than PyTorch compiles.

    Blocks of each policy have a function of their own, but beside a graph break Dynamo compiles
    their methods, which they share. Beyond its limit it runs blocks as they are.

    Args:
        policies: how many there are for blocks of each class.

    Raises:
        OptionError: the graph is of such a method, and there are more.
    """
    if is_whole_block(dynamo.traced_locals()):
        return
    limit = torch._dynamo.config.recompile_limit
    kind = next(map(type, traced_modules()[-1:]), nn.Module)  # the block's
    count = policies.get(kind, 0)
    if count > limit:
        raise OptionError(
            f"the options give {count} different policies to blocks of {kind.__name__}, and a "
            f"graph break has PyTorch compile one method for all of them, at most {limit} times "
            "(torch._dynamo.config.recompile_limit). Use patterns that name the same layers in "
            "every block, take the break out (TORCH_LOGS='graph_breaks' shows it), or raise the "
            "limit."
        )
