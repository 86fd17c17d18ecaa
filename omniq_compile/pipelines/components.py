"""Which component of a pipeline is quantized, and how: `build_quant_config`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from omniq_compile.lowering.errors import OptionError, hint, unknown
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.layer_names import possible_names
from omniq_compile.passes.patterns import matches

DEFAULT = "default"

Options = Mapping[str, Any] | None


@dataclass(frozen=True)
class PipelineQuantConfig:
    """The checked options of a pipeline's components.

    Attributes:
        everywhere: options of the transformers, where one method was given for the pipeline.
        components: options by component, or by the dotted path of a part of one; None is BF16.
    """

    everywhere: Options = None
    components: Mapping[str, Options] = field(default_factory=dict)

    def options_for(self, component: str, *, is_stored: bool = False) -> dict[str, Any] | None:
        """Return the options of one component, or None for BF16.

        They are those of its name, or else of ``default``, which is not for what ``is_stored``
        quantized: None is as it is stored there. Keys below the component become layers that are
        ignored.
        """
        if self.everywhere is not None:
            return dict(self.everywhere) if is_transformer(component) else None
        if is_stored and not self.names(component):
            return None
        given = self.components.get(component, self.components.get(DEFAULT))
        if given is None:
            return None
        below = self.parts_of(component)
        if not below:
            return dict(given)
        ignored = [*given.get("ignored_layers", ()), *(_subtree(path) for path in below)]
        return {**given, "ignored_layers": ignored}

    def parts_of(self, component: str) -> list[str]:
        """Return the paths in a component that keys leave in BF16."""
        start = f"{component}."
        return [key.removeprefix(start) for key in self.components if key.startswith(start)]

    def check_parts(self, component: str, model: nn.Module) -> None:
        """Check that each path in a component leads somewhere in its model, which needs no values.

        Raises:
            OptionError: one does not.
        """
        names = [name for _, name in possible_names(model) if name]
        for path in self.parts_of(component):
            if not any(matches(_subtree(path), name) for name in names):
                inside = ", ".join(name for name, _ in model.named_children())
                raise OptionError(
                    f"{component!r} is a {type(model).__name__}, which has no part {path!r}."
                    f"{hint(path, names)} It has: {inside}."
                )

    def names(self, component: str) -> bool:
        """Say whether a key is of a component, or of a part of it."""
        return any(key.split(".")[0] == component for key in self.components)

    @property
    def chosen(self) -> list[Mapping[str, Any]]:
        """The options of all that is quantized."""
        return [o for o in (self.everywhere, *self.components.values()) if o is not None]

    @property
    def reads_steps(self) -> bool:
        """Whether some options depend on the denoising step."""
        return any(options.get("w4a8_fallback_steps") for options in self.chosen)

    def with_options(
        self, *, compiler: str | None, ignored_layers: Sequence[str]
    ) -> PipelineQuantConfig:
        """Return the config with this compiler, if any, and these ignored layers too everywhere.

        Raises:
            OptionError: an unknown compiler, or a pattern that is none.
        """

        def changed(options: Options, component: str) -> Options:
            if options is None:
                return None
            ignored = [*options.get("ignored_layers", ()), *ignored_layers]
            more: dict[str, Any] = {"ignored_layers": ignored} if ignored else {}
            if compiler:
                more["compiler"] = compiler
            return _checked({**options, **more}, component)

        return PipelineQuantConfig(
            changed(self.everywhere, ""), {k: changed(v, k) for k, v in self.components.items()}
        )

    def check_names(self, components: Iterable[str]) -> None:
        """Check that each key is of a component, before it is known which ones are models.

        Raises:
            OptionError: one is not.
        """
        names = list(components)
        for key in self.components:
            if key != DEFAULT and key.split(".")[0] not in names:
                raise OptionError(unknown("component", key.split(".")[0], names))

    def check(self, components: Iterable[str], stages: Iterable[str] = ()) -> None:
        """Check the keys against a pipeline. None is right for what is no model, too.

        Args:
            components: the names of its models.
            stages: those that generate in stages of their own, such as an autoregressive one.

        Raises:
            OptionError: a key gives options to what is no model, or one method was given for a
                pipeline where it is not clear what it means.
        """
        names = list(components)
        for key, options in self.components.items():
            if options is not None and key != DEFAULT and key not in names:
                raise OptionError(unknown("component", key, names))
        stages = list(stages)
        if self.everywhere is not None and (stages or not any(map(is_transformer, names))):
            why = (
                f"it has a stage beside the transformer ({', '.join(stages)})"
                if stages
                else ("it has no component named transformer")
            )
            example = names[0] if names else "transformer"
            raise OptionError(
                f"one method does not say what to quantize in this pipeline, because {why}. Name "
                f"the components: quantization={{{example!r}: {self.everywhere['method']!r}}}. "
                f"It has: {', '.join(names) or 'none with weights'}."
            )


def is_transformer(component: str) -> bool:
    """Say whether a component is a diffusion transformer by its name: also Wan's second expert."""
    return re.fullmatch(r"transformer(_\d+)?", component) is not None


def build_quant_config(quantization: Any) -> PipelineQuantConfig:
    """Check what a user says of a pipeline.

    Args:
        quantization: a method, or a dict with ``method`` and other options, for the transformers;
            or a dict of components, each with a method, such a dict, or None for BF16, and
            ``default`` for components that are not named. A key may be a dotted path into a
            component, with None, to leave that part in BF16. None alone leaves everything as it is
            stored, which for omniq's own format is quantized.

    Raises:
        OptionError: unknown options or methods.
    """
    if isinstance(quantization, PipelineQuantConfig):
        return quantization
    if quantization is None:
        return PipelineQuantConfig()
    if isinstance(quantization, str):
        return PipelineQuantConfig(everywhere=_checked(quantization, ""))
    if not isinstance(quantization, Mapping) or not quantization:
        raise OptionError(
            f"quantization must be a method, a dict with 'method', or a dict of components, not "
            f"{quantization!r}."
        )
    if "method" in quantization:
        return PipelineQuantConfig(everywhere=_checked(quantization, ""))
    components = {str(key): _checked(value, str(key)) for key, value in quantization.items()}
    for key, options in components.items():
        owner, *parts = key.split(".")
        if not all(parts):
            raise OptionError(f"{key!r} is no dotted path, such as {owner + '.proj_out'!r}.")
        if parts and options is not None:
            raise OptionError(
                f"{key!r} is a part of {owner!r}, and one component has one method: give it to "
                f"{owner!r}, and None to parts that stay in BF16."
            )
        if parts and owner not in components and components.get(DEFAULT) is None:
            raise OptionError(
                f"{key!r} keeps a part of {owner!r} in BF16, and nothing says how to quantize the "
                f"rest: give a method to {owner!r}, or to {DEFAULT!r}."
            )
    return PipelineQuantConfig(components=components)


def _checked(value: Any, component: str) -> Options:
    if value is None:
        return None
    options = {"method": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        raise OptionError(
            f"quantization of {component!r} must be a method, a dict with 'method', or None, not "
            f"{value!r}."
        )
    try:
        QuantConfig.from_options(options)
    except OptionError as error:
        if not component:
            raise
        raise OptionError(f"quantization of {component!r}: {error}") from error
    return dict(options)


def _subtree(path: str) -> str:
    return rf"re:{re.escape(path)}(\..*)?"
