"""QuantConfig: what a user may ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from omniq_compile.lowering.errors import OptionError
from omniq_compile.lowering.schemes import METHODS, Scheme, get_scheme
from omniq_compile.lowering.target import Target
from omniq_compile.passes.option_checks import CHECKS, METHODS_OF, unknown_option

# Narrower layers hold little of a transformer's work or memory, and their quantize and epilogue
# loops weigh more beside the smaller GEMM. On a CPU with fast BF16 GEMMs int8 gains from 256 on
# (docs/benchmarks, 2026-11-25).
MIN_FEATURES = 256

# vLLM-Omni's default for the method: the first blocks of a diffusion transformer are its most
# sensitive.
DUALSCALE_FALLBACK_LAYERS = 5


@dataclass(frozen=True)
class QuantConfig:
    """The checked options of one compile.

    Attributes:
        method: how weights and activations are quantized: ``"int8"``, ``"fp8"``, ``"mxfp8"``,
            ``"mxfp4"`` or ``"mxfp4_dualscale"``.
        ignored_layers: patterns of layers to keep in their own precision.
        activation_scheme: ``"dynamic"``: activation scales are computed in each call; ``"none"``:
            activations stay as they are, and weights alone are quantized (W8A16, W4A16).
        min_features: the smallest K or N, a layer's input or output features, worth quantizing; 1
            takes everything the kernels take.
        matmul: also quantize activation-times-activation products, per row of both operands.
        compiler: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
            Only the first reads ``inductor`` and ``mode``.
        inductor: settings passed on to Inductor. With ``max_autotune`` it also times omniq's Triton
            GEMMs in several tiles, where all sizes are known.
        mode: one of ``torch.compile``'s modes, which it does not take beside options itself:
            ``"default"``, ``"reduce-overhead"`` (CUDA graphs), ``"max-autotune"`` or
            ``"max-autotune-no-cudagraphs"``.
        target: the device to lower for, such as ``"cuda:sm_90"``; None means the model's own
            device.
        mxfp4_scale_alg: how an mxfp4 block chooses its scale: 0 (OCP) or 2 (UOS).
        weight_block_size: fp8: ``(rows, columns)`` of a weight that share a scale; None is a scale
            per row. Activations then have one per 1 x 128 group.
        num_bf16_fallback_layers: mxfp4_dualscale: how many leading transformer blocks stay BF16;
            None becomes the method's default.
        w4a8_fallback_layers: mxfp4: patterns of layers whose activations are mxfp8.
        w4a8_fallback_steps: mxfp4: zero-based denoising steps in which all activations are mxfp8.
        keep_all: not an option: why every site keeps its own precision, set for whole blocks.

    Raises:
        OptionError: a value that an option does not take, an option of another method, one that
            quantizes activations beside ``activation_scheme`` ``"none"``, or ``inductor`` or
            ``mode`` for another compiler, which would not read them.
    """

    method: str
    ignored_layers: tuple[str, ...] = ()
    activation_scheme: str = "dynamic"
    min_features: int = MIN_FEATURES
    matmul: bool = False
    compiler: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mode: str = "default"
    target: Target | None = None
    mxfp4_scale_alg: int = 0
    weight_block_size: tuple[int, int] | None = None
    num_bf16_fallback_layers: int = cast(int, None)
    w4a8_fallback_layers: tuple[str, ...] = ()
    w4a8_fallback_steps: tuple[int, ...] = ()
    keep_all: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():  # the method is the first
            value = getattr(self, name)
            if name == "num_bf16_fallback_layers" and value is None:
                value = DUALSCALE_FALLBACK_LAYERS if self.method == "mxfp4_dualscale" else 0
            object.__setattr__(self, name, check(value))
        unset = {f.name: f.default for f in fields(self)} | {"num_bf16_fallback_layers": 0}
        _refuse_other_methods(
            self.method, [name for name in METHODS_OF if getattr(self, name) != unset[name]]
        )
        if self.activation_scheme == "none":
            _refuse_quantized_activations(self)
        if self.compiler == "inductor":
            return
        for name, is_set in (("inductor", self.inductor), ("mode", self.mode != "default")):
            if is_set:
                raise OptionError(
                    f"option {name!r} is {getattr(self, name)!r}, which only compiler 'inductor' "
                    f"reads, and option 'compiler' is {self.compiler!r}. Leave out one of the two."
                )

    @property
    def scheme(self) -> Scheme:
        """The formats that the method multiplies in."""
        return get_scheme(
            self.method, self.mxfp4_scale_alg, self.weight_block_size, self.activation_scheme
        )

    @property
    def layer_patterns(self) -> dict[str, tuple[str, ...]]:
        """The patterns of layers, by the option that holds them."""
        return {
            "ignored_layers": self.ignored_layers,
            "w4a8_fallback_layers": self.w4a8_fallback_layers,
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | QuantConfig | None) -> QuantConfig:
        """Check a user's options.

        Raises:
            OptionError: an unknown option or value, or an option of another method; the message
                lists the valid ones.
        """
        if isinstance(options, QuantConfig):
            return options
        if isinstance(options, Mapping):
            for name in options:
                if name not in CHECKS:
                    raise OptionError(unknown_option(name))
        if not isinstance(options, Mapping) or "method" not in options:
            given = "none" if options is None else repr(options)
            raise OptionError(
                f'omniq needs options={{"method": ...}}. Methods: {", ".join(METHODS)}. Given: '
                f"{given}."
            )
        config = cls(**options)
        _refuse_other_methods(config.method, options)
        return config

    def to_options(self) -> dict[str, Any]:
        """Return the options as plain data that `from_options` takes, with the defaults."""
        names = [name for name in CHECKS if self.method in METHODS_OF.get(name, METHODS)]
        target = None if self.target is None else str(self.target)
        return {name: getattr(self, name) for name in names} | {"target": target}

    def with_mode(self, mode: str | None) -> QuantConfig:
        """Return the configuration with one of ``torch.compile``'s modes; None leaves its own.

        Raises:
            OptionError: an unknown mode, or one that the compiler does not read.
        """
        return self if mode is None else dataclasses.replace(self, mode=CHECKS["mode"](mode))

    def with_mxfp8_activations(self) -> QuantConfig:
        """Return the configuration of a denoising step listed in ``w4a8_fallback_steps``."""
        return dataclasses.replace(self, w4a8_fallback_layers=("re:.*",), w4a8_fallback_steps=())


def _refuse_quantized_activations(config: QuantConfig) -> None:
    """Check that no option quantizes activations where these are to stay as they are."""
    for name in ("matmul", "w4a8_fallback_layers", "w4a8_fallback_steps"):
        if getattr(config, name):
            raise OptionError(
                f"option {name!r} is {getattr(config, name)!r}, which quantizes activations, and "
                "option 'activation_scheme' is 'none', which leaves them as they are. Leave out "
                "one of the two."
            )


def _refuse_other_methods(method: str, names: Iterable[str]) -> None:
    """Check that options are some of a method."""
    for name in names:
        methods = METHODS_OF.get(name, METHODS)
        if method not in methods:
            raise OptionError(
                f"option {name!r} is for method {' and '.join(methods)}, not for {method!r}. "
                "Leave it out."
            )
