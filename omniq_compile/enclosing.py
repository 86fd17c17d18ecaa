"""Refuses layer patterns that name a module by its place in a model it is compiled apart from."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from omniq_compile.lowering.errors import OptionError
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.patterns import matches


def refuse_full_names(config: QuantConfig) -> None:
    """Check the patterns of a compile against the names that its graph does not show.

    diffusers' ``compile_repeated_blocks`` compiles one block for all of its class, and Dynamo
    compiles a module on its own where a graph break interrupts its caller. A pattern with a block's
    index or full name then matches nothing in the graph, though it does in the model, and the
    layer it names would be quantized. The model is found as the outermost module whose call is in
    progress.

    Raises:
        OptionError: a pattern names a layer of the compiled module, or of one of its class that
            would share the compiled code, only by its full name.
    """
    patterns = [(option, p) for option, given in config.layer_patterns.items() for p in given]
    calls = list(_modules_being_called()) if patterns else []
    if not calls or calls[0] is calls[-1]:
        return
    compiled, model = calls[0], calls[-1]
    for name, module in model.named_modules():
        if type(_original(module)) is not type(compiled) or not name:
            continue
        place = ".".join(part for part in name.split(".") if part != "_orig_mod")
        for layer, _ in compiled.named_modules():
            for option, pattern in patterns:
                if layer and matches(pattern, f"{place}.{layer}") and not matches(pattern, layer):
                    raise OptionError(
                        f"{option} pattern {pattern!r} names {place}.{layer} of "
                        f"{type(model).__name__}, and {type(compiled).__name__} is compiled on its "
                        f"own here, once for all of them, where that layer is only {layer!r}. Use "
                        "omniq_compile.compile(model, options), which knows the full name of "
                        "every block's layers; or a pattern that means the same layer of each."
                    )


def _modules_being_called() -> Iterator[nn.Module]:
    """Yield the modules whose methods are on the stack, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield _original(module)
        frame = frame.f_back  # type: ignore[assignment]


def _original(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` wrapped, if it did."""
    original = module._modules.get("_orig_mod")
    return module if original is None else original
