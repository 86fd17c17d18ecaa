"""The ``torch.compile`` entry point: passes, then lowering, then Inductor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from omniq_compile.compiling import inductor, weight_changes
from omniq_compile.compiling.all_kept import layers_in, warn_all_kept
from omniq_compile.compiling.denoise import current_step
from omniq_compile.compiling.enclosing import refuse_full_names
from omniq_compile.compiling.low_precision import SeenCasts
from omniq_compile.compiling.traced_modules import model_around, traced_modules, weight_names
from omniq_compile.compiling.unmatched import warn_unmatched
from omniq_compile.compiling.weights import BoundWeights
from omniq_compile.lowering import ops  # noqa: F401  (defines the operators)
from omniq_compile.lowering.errors import GradientError, OptionError, WeightError
from omniq_compile.lowering.target import Target, detect
from omniq_compile.lowering.triton_kernels.ops import operators_kept
from omniq_compile.passes import dynamo, pipeline
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.context import Context
from omniq_compile.passes.policy import main_device
from omniq_compile.passes.sites import Site
from omniq_compile.reports import structured_trace
from omniq_compile.reports.summary import summary_line

# Below `omniq_compile`, which TORCH_LOGS="omniq" and TORCH_LOGS="omniq_compile" set; see
# `torch_logs`.
logger = logging.getLogger("omniq")
logger.parent = logging.getLogger("omniq_compile")

# By graphs that were compiled, of which a model may have several.
_seen_casts = SeenCasts()

Compiled = Callable[..., Any]
Decided = Callable[[QuantConfig, Sequence[Site]], None]


def omniq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | QuantConfig | None = None,
    mode: str | None = None,
    name: str | None = None,
) -> Compiled:
    """Compile one graph of Dynamo's; ``torch.compile(model, backend="omniq")`` calls this.

    Args:
        gm: the traced graph, which is left as it is.
        example_inputs: its inputs, parameters included.
        options: see `QuantConfig`.
        mode: one of ``torch.compile``'s modes, in place of the option of that name.
        name: what ``torch.compile`` of torch 2.15 calls a compiled region; it is logged.

    Raises:
        OptionError: unknown options or mode, a mode that the compiler does not read, a device
            without kernels, or a layer pattern that needs the name of a block compiled on its own.
        GradientError: gradients are enabled and an input requires them, or the model enables them.
        WeightError: an input is on the meta device.
    """
    config = QuantConfig.from_options(options).with_mode(mode)
    if name is not None:
        logger.info("region %s", name)
    return compile_graph(gm, example_inputs, config, decided=_check_options)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: QuantConfig,
    *,
    decided: Decided,
    by_block: bool = False,
) -> Compiled:
    """Compile one graph of Dynamo's by a checked configuration; see `omniq`.

    Args:
        gm: the traced graph, which is left as it is.
        example_inputs: its inputs, parameters included.
        config: what to do.
        decided: gets the configuration and the graph's sites, once they are decided and before they
            are compiled; what it raises refuses them.
        by_block: see `run_passes`.

    Raises:
        OptionError, GradientError, WeightError: as `omniq` does.
    """
    _refuse_gradients(gm, example_inputs)
    _refuse_meta(example_inputs)
    usual = _compile_for_steps(gm, example_inputs, config, decided, by_block)
    if not config.w4a8_fallback_steps:
        return usual
    with_mxfp8 = config.with_mxfp8_activations()
    fallback = _compile_for_steps(gm, example_inputs, with_mxfp8, _no_check, by_block)

    def run(*arguments: Any) -> Any:
        in_fallback = current_step() in config.w4a8_fallback_steps
        return (fallback if in_fallback else usual)(*arguments)

    return run


def run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: QuantConfig,
    seen_casts: SeenCasts,
    target: Target | None = None,
    *,
    with_stages: bool,
    by_block: bool = False,
) -> tuple[fx.GraphModule, Context]:
    """Run the passes on a graph that Dynamo is compiling, told of the model that it is part of.

    Args:
        gm: the graph as Dynamo traced it, which is left as it is.
        example_inputs: those that it was traced with.
        config: the options.
        seen_casts: by the graphs before it, and by this one then.
        target: to lower for; by default the graph's own, see `run_target`.
        with_stages: whether the context keeps a copy of the graph at the end of each stage.
        by_block: layers are named in the outermost module that is compiled, and not in that which
            Dynamo compiles on its own after a graph break.

    Returns:
        The rewritten graph, and what the passes found.
    """
    modules, model = traced_modules(), model_around()
    context = Context(
        config,
        target or run_target(config, dynamo.devices(gm.graph)),
        weight_names(gm, example_inputs, modules[-1 if by_block else 0] if modules else None),
        seen_casts.has_low_precision(model),
        stages={} if with_stages else None,
    )
    rewritten = pipeline.run(gm, context)
    seen_casts.note(model, context.sites)
    return rewritten, context


def _compile_for_steps(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: QuantConfig,
    decided: Decided,
    by_block: bool,
) -> Compiled:
    start = time.perf_counter()
    traced = structured_trace.wanted()
    rewritten, context = run_passes(
        gm, example_inputs, config, _seen_casts, with_stages=traced, by_block=by_block
    )
    seconds = time.perf_counter() - start
    _refuse_inner_gradients(context.sites, example_inputs)
    decided(config, context.sites)
    for site in context.sites:
        if site.decision.kernel is not None and site.problem is not None:
            site.decision.kernel.start(site.problem)
    _log(context, seconds)
    if traced:
        structured_trace.publish(context, summary_line(context, seconds))
    return bind(gm, rewritten, context, example_inputs)


def _check_options(config: QuantConfig, sites: Sequence[Site]) -> None:
    """Refuse or warn of options that cannot be, or may not be, what the user means."""
    refuse_full_names(config, sites)
    if sites:
        layers = [site.layer for site in sites]
        nothing = f"none of this graph's {len(layers)} layers"
        warn_unmatched(config, layers, nothing, layers_in(traced_modules()))
    warn_all_kept(config, sites)


def _no_check(config: QuantConfig, sites: Sequence[Site]) -> None:
    """Check nothing: the same layers were checked for the other steps."""


def bind(
    gm: fx.GraphModule,
    rewritten: fx.GraphModule,
    context: Context,
    example_inputs: Sequence[Any],
) -> Compiled:
    """Compile a rewritten graph, and give it the weights that each call's parameters stand for."""
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    left = [n for n in rewritten.graph.nodes if n.op == "placeholder"]
    kept = [names.index(n.name) for n in left if n.name in names]
    added = [dynamo.value(n) for n in left if n.name not in names]
    inputs = [example_inputs[i] for i in kept] + added
    compiled = _compile(rewritten, inputs, context.config)
    if not context.bindings:
        return lambda *arguments: compiled(*[arguments[i] for i in kept])
    weights = BoundWeights(context.bindings, names)

    def run(*arguments: Any) -> Any:
        parts = weights.look_up(arguments)
        try:
            return compiled(*[arguments[i] for i in kept], *parts)
        finally:
            weight_changes.returned()

    return run


def _compile(gm: fx.GraphModule, inputs: Sequence[Any], config: QuantConfig) -> Compiled:
    if config.compiler == "inductor":
        return inductor.compile(gm, inputs, inductor.settings_of(config))
    # `torch.compiler` lists backends and looks none up. Private, checked on torch 2.11 to 2.15.
    from torch._dynamo.backends.registry import lookup_backend

    with operators_kept():
        return lookup_backend(config.compiler)(gm, list(inputs))  # type: ignore[no-any-return]


def _refuse_gradients(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    results = torch.utils._pytree.tree_leaves(gm.graph.output_node().args)
    values = [dynamo.value(node) for node in results if dynamo.is_tensor(node)]
    # A model may turn gradients off itself: its inputs then want some, and nothing has any.
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        raise _for_inference(inputs)


def _for_inference(inputs: Sequence[Any]) -> GradientError:
    wanting = sum(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    return GradientError(
        f"omniq is for inference, and {wanting} inputs or parameters of this graph require "
        "gradients. Call the model under torch.inference_mode() or torch.no_grad(), or turn "
        "gradients off with model.requires_grad_(False)."
    )


def _refuse_inner_gradients(sites: Sequence[Site], inputs: Sequence[Any]) -> None:
    """Refuse gradients that no result has, or that a model turns on itself: those through codes
    would be wrong.
    """
    wanting = [s.layer for s in sites if s.gradients and s.decision.method is not None]
    if not wanting:
        return
    if torch.is_grad_enabled():
        raise _for_inference(inputs)
    raise GradientError(
        f"omniq is for inference, and this model asks for gradients of {len(wanting)} layers, "
        f"such as {wanting[0]!r}, inside torch.enable_grad(). Keep these layers with "
        "'ignored_layers', or turn the gradients of parameters off with "
        "model.requires_grad_(False) where no others are asked for."
    )


def _refuse_meta(inputs: Sequence[Any]) -> None:
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in inputs):
        raise WeightError(
            "this model, or an input of it, is on the meta device, where tensors have no values to "
            "quantize. Load its weights first; `omniq_compile.explain` and `omniq plan` need none."
        )


def run_target(config: QuantConfig, devices: Iterable[torch.device]) -> Target:
    """Return the target to run on; the options may name another architecture of its device.

    Args:
        config: the options.
        devices: of the tensors in the graph.
    """
    here = detect(main_device(devices))
    if config.target is None or here.runs(config.target):
        return config.target or here
    raise OptionError(
        f"option 'target' is {str(config.target)!r}, and this model is on {str(here)!r}, which "
        "cannot run it. Leave 'target' out to compile for the model's own device; "
        "`omniq dump --target` and omniq_compile.explain(target=...) show the graph for another."
    )


def _log(context: Context, seconds: float) -> None:
    logger.info("%s", summary_line(context, seconds))
    for site in context.sites:
        if site.decision.method is None:
            logger.debug("kept %s (%s): %s", site.layer, site.spelling, site.decision.reason)
