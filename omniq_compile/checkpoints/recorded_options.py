"""What config.json says of a quantized model: the options that shaped its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import nn

import omniq_compile
from omniq_compile.checkpoints.foreign import OWN
from omniq_compile.checkpoints.safetensors_files import SafetensorsFiles
from omniq_compile.checkpoints.state import VERSION, stored_names
from omniq_compile.lowering.errors import CheckpointError, OptionError, unknown
from omniq_compile.lowering.schemes import METHODS
from omniq_compile.passes.config import QuantConfig
from omniq_compile.passes.option_checks import CHECKS, METHODS_OF

# The options that shape a quantized model, and not only one compile of it.
STORED_OPTIONS = (
    "method",
    "ignored_layers",
    "min_features",
    "mxfp4_scale_alg",
    "weight_block_size",
    "num_bf16_fallback_layers",
)


# What a library's ``from_pretrained`` takes: ``target`` decides which layers a kernel takes.
_LOADING_OPTIONS = (*STORED_OPTIONS, "target")


def refuse_unstored(options: Iterable[str], where: str) -> None:
    """Refuse options that shape no stored weight, and would be lost.

    Args:
        options: their names.
        where: they go instead.

    Raises:
        OptionError: one is among them.
    """
    for name in options:
        if name not in _LOADING_OPTIONS and name in CHECKS:
            raise OptionError(
                f"option {name!r} shapes no weight: give it to {where}. What is stored takes "
                f"{', '.join(_LOADING_OPTIONS)}."
            )


class Method(StrEnum):
    """The ``quant_method`` of config.json; diffusers asks for its ``value``."""

    OMNIQ = OWN


class RecordedConfig:
    """What the configuration objects of diffusers and transformers share.

    Attributes:
        about: what stands in config.json, or will.
        options: to quantize with.
    """

    about: dict[str, Any]
    options: QuantConfig

    def __init__(self, method: str, **options: Any) -> None:
        """Check the options.

        Raises:
            OptionError: an unknown option or value, or one that shapes no weight.
        """
        refuse_unstored(options, "torch.compile, in its options")
        for name in options:
            if name not in _LOADING_OPTIONS:
                raise OptionError(unknown("option", name, _LOADING_OPTIONS))
        self.options = QuantConfig.from_options({"method": method, **options})
        self.about = quantization_config(self.options)

    @classmethod
    def of(cls, config: QuantConfig) -> Any:
        """Return the configuration of options that were checked."""
        made = cls.__new__(cls)
        made.options, made.about = config, quantization_config(config)
        return made

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **unused: Any
    ) -> Any:
        """Take what stands in config.json, or a user's options in a dict.

        Raises:
            OptionError: a user's options are unknown or do not fit.
        """
        given = {name: value for name, value in config_dict.items() if name != "quant_method"}
        if "version" not in given:
            made = cls(**given) if "method" in given else cls.of(QuantConfig.from_options(given))
        else:  # checked when the files are read, which the message can then name
            made = cls.__new__(cls)
            made.about = dict(config_dict)
        return (made, unused) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in config.json."""
        return dict(self.about)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same; both libraries print it."""
        return self.to_dict()


def quantization_config(config: QuantConfig) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json."""
    options = {name: getattr(config, name) for name in STORED_OPTIONS}
    return {
        "quant_method": OWN,
        "version": VERSION,
        "omniq_version": omniq_compile.__version__,
        "format": config.scheme.weight,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
    }


def options_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that `quantization_config` was made of, as a user gives them."""
    options = {name: about[name] for name in STORED_OPTIONS if name in about}
    return {
        name: value
        for name, value in options.items()
        if options["method"] in METHODS_OF.get(name, METHODS) and value is not None
    }


def difference(about: Mapping[str, Any], options: Mapping[str, Any] | QuantConfig) -> str:
    """Word how options differ from what a model was quantized with; "" where they do not.

    Of a dict only what it gives is compared, as the rest may be left out.
    """
    asked = quantization_config(QuantConfig.from_options(options))
    given = [n for n in STORED_OPTIONS if isinstance(options, QuantConfig) or n in options]
    if about.get("format") != asked["format"]:
        return f"quantized to {about.get('format')}, and the options ask for {asked['format']}"
    for name in given:
        held, wanted = about.get(name), asked[name]
        if name == "ignored_layers":  # in any order
            held, wanted = sorted(set(held or ())), sorted(set(wanted))
        if held != wanted:
            return f"quantized with {name} = {held!r}, and the options ask for {wanted!r}"
    return ""


def check_stored(
    place: Path, stored: Mapping[str, Any], options: Mapping[str, Any] | QuantConfig | None
) -> None:
    """Check omniq's own checkpoint against what was asked for, where anything was.

    Raises:
        CheckpointError: it is of another version, or no record of one.
        OptionError: it was not made with these options.
    """
    if not isinstance(stored, Mapping):
        raise CheckpointError(
            f"{place}: quantization_config in config.json is no JSON object. Download the original "
            "checkpoint again."
        )
    if stored.get("version") != VERSION:
        raise CheckpointError(
            f"{place} was quantized in version {stored.get('version')!r} of omniq's format, and "
            f"this omniq reads version {VERSION}. Quantize the original checkpoint again."
        )
    differs = "" if options is None else difference(stored, options)
    if differs:
        raise OptionError(
            f"{place} is {differs}. Leave the options out, or load the original checkpoint."
        )


def check_formats(
    files: SafetensorsFiles, weights: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    """Check the record against the codes, as a file of JSON is easily edited by hand.

    Args:
        files: of a model that is stored quantized.
        weights: that the metadata of the files describes; some may have another format.
        stored: the record in config.json.

    Raises:
        CheckpointError: it is of a method that none of the weights was quantized by.
    """
    place = files.folder / "config.json"
    recorded = {"method": "none", **stored}
    try:
        options = {**options_of(recorded), "method": recorded["method"]}
        expected = QuantConfig.from_options(options).scheme.weight
    except OptionError as error:
        raise CheckpointError(f"quantization_config in {place} is damaged: {error}") from error
    formats = {about["format"]: stored_names(name, about)[0] for name, about in weights.items()}
    if formats and expected not in formats:
        found, codes = next(iter(formats.items()))
        raise CheckpointError(
            f"{place} says that method {stored['method']!r} quantized these weights, which stores "
            f"{expected}, and the codes are {found} ({codes!r} has dtype "
            f"{files.tensors[codes].dtype}). Undo what was changed in config.json, or quantize "
            "the original checkpoint again."
        )


def quantization_record(model: nn.Module) -> Mapping[str, Any] | None:
    """Return what config.json will say of a model that omniq quantized, or None for another."""
    about = getattr(model, "omniq_quantization", None)
    return about if isinstance(about, Mapping) else None


def stored_options(model: nn.Module) -> dict[str, Any] | None:
    """Return the options to compile a model with that omniq quantized, or None for another."""
    about = quantization_record(model)
    return None if about is None else options_of(about)


def options_to_run(model: nn.Module, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the options to compile a component with.

    Args:
        model: which omniq may have loaded as it was stored.
        given: what the user asked for. Options the model was stored with may be omitted; options
            that came from ``default`` are ignored where the model is stored quantized.

    Returns:
        None where it is not quantized.
    """
    stored = stored_options(model)
    if stored is None:
        return given
    if given is None or QuantConfig.from_options(given).method != stored["method"]:
        return stored
    return {**given, **stored}
