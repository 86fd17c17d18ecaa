"""Refuses layer patterns that name a module by its place in a model it is compiled apart from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import nn

from omniq_compile.compiling.compiled_modules import original
from omniq_compile.lowering.errors import OptionError
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


def modules_being_called() -> Iterator[nn.Module]:
    """Yield the modules whose methods are on the stack, the innermost first.

    Those that ``torch.compile`` wrapped are as they were before.
    """
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield original(module)
        frame = frame.f_back  # type: ignore[assignment]
