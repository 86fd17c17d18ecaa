"""A whole diffusers pipeline with quantized components."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin

from omniq_compile.checkpoints.checkpoint_folder import pipeline_components, read_config, read_json
from omniq_compile.checkpoints.foreign import OWN
from omniq_compile.checkpoints.hub_download import hub_arguments, index_folder, whole_folder
from omniq_compile.checkpoints.load_arguments import (
    DTYPE_KEYWORD,
    check_device,
    check_dtype,
    check_pipeline_keywords,
)
from omniq_compile.checkpoints.loading import load_model
from omniq_compile.checkpoints.variant_files import mark_of
from omniq_compile.checkpoints.without_values import parameters_without_values
from omniq_compile.integrations.text_encoders import load_quantized
from omniq_compile.lowering.errors import CheckpointError, OmniqError, OptionError, hint
from omniq_compile.pipelines.components import (
    DEFAULT,
    PipelineQuantConfig,
    build_quant_config,
    is_transformer,
)

logger = logging.getLogger("omniq")

# What autoregressive models of transformers end in. As a text encoder one is a part of the prompt;
# under another name it is a stage of its own.
_LANGUAGE_MODELS = ("ForConditionalGeneration", "ForCausalLM")


def from_pretrained(
    folder: str | Path,
    quantization: Any = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype | None = None,
    **pipeline_arguments: Any,
) -> Any:
    """Load a diffusers pipeline with some components quantized while they load.

    Models of diffusers, and of transformers from version 5 on, are quantized tensor by tensor, so
    that their BF16 weights are never all resident.

    Args:
        folder: of the pipeline, or a hub id, of which one form of the weights is downloaded, and
            none of a component given here.
        quantization: see `build_quant_config`.
        dtype: of everything that is not quantized; None is bfloat16.
        device: to load the quantized components on; move the pipeline for the others. None is
            the one that ``device_map`` names, such as ``"cuda"``, which loads all of them there,
            else the CPU.
        variant: of the weight files, such as ``"fp16"``; as in diffusers, a component that has none
            of it is loaded from its other files.
        torch_dtype: another name for ``dtype``, as in diffusers.
        pipeline_arguments: passed on to ``DiffusionPipeline.from_pretrained``; a component given
            here is used as it is, and ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
            ``force_download`` and ``proxies`` are of the download.

    Raises:
        OptionError: unknown arguments, methods, options or components (the message lists the
            pipeline's own), a dtype or device that is none, or code in the folder that was not
            allowed to run.
        CheckpointError: files that are missing, damaged or quantized by something else.
        WeightError: a weight holds NaN or Inf.
    """
    config = build_quant_config(quantization)
    dtype = check_dtype(dtype, torch_dtype)
    device = _device(device, pipeline_arguments.get("device_map"))
    hub = hub_arguments(pipeline_arguments)
    described = index_folder(str(folder), hub)
    _check_own_code(described, pipeline_arguments)
    pipeline = (
        DiffusionPipeline
        if pipeline_arguments.get("custom_pipeline")
        else pipeline_class(described)
    )
    index = read_json(described / "model_index.json")
    check_pipeline_keywords(pipeline, pipeline_arguments, index)
    config.check_names(pipeline_components(described))
    place = whole_folder(
        str(folder),
        hub,
        variant=variant,
        given=pipeline_arguments,
        every_format=any(pipeline_arguments.get(name) for name in ("use_onnx", "use_flashpack")),
    )
    components = check_components(place, config, pipeline_arguments)
    with_variant = components_with(variant, place, components)
    loaded: dict[str, Any] = {}
    for name, (library, kind) in components.items():
        own = is_own(place / name)
        options = config.options_for(name, is_stored=own)
        if name in pipeline_arguments or (options is None and not own):
            continue
        loaded[name] = load_component(
            library,
            kind,
            place / name,
            options=options,
            dtype=dtype,
            device=device,
            variant=variant if name in with_variant else None,
        )
    pipe = pipeline.from_pretrained(
        str(place),
        **{DTYPE_KEYWORD: dtype},
        **({"variant": variant} if variant else {}),
        **loaded,
        **pipeline_arguments,
    )
    for name, component in loaded.items():
        if getattr(pipe, name) is not component:
            raise OmniqError(f"{type(pipe).__name__} did not take the quantized {name!r}.")
    return pipe


def _device(device: str | torch.device | None, device_map: Any) -> torch.device:
    """Return where to load what is quantized, which diffusers' own ``device_map`` does not move."""
    if device is not None or device_map is None:
        return check_device("cpu" if device is None else device)
    try:
        return check_device(device_map)
    except OptionError as error:
        raise OptionError(
            f"device_map {device_map!r} is no device here, and what omniq loads can only be placed "
            "by one. Give a device, such as 'cuda', which loads all components there; or leave "
            "device_map out and call pipe.enable_model_cpu_offload()."
        ) from error


def components_with(variant: str | None, place: Path, components: Iterable[str]) -> list[str]:
    """Return the components that have files of a variant: ``model.VARIANT.safetensors``.

    Raises:
        CheckpointError: none has, where diffusers would say so after weights were read.
    """
    if variant is None:
        return []
    mark = mark_of(variant)
    found = [n for n in components if any(mark.search(f.name) for f in (place / n).iterdir())]
    if not found:
        raise CheckpointError(
            f"no component of {place} has weights of variant {variant!r}, as in "
            f"model.{variant}.safetensors. Leave variant out, or name another."
        )
    return found


def _check_own_code(place: Path, pipeline_arguments: Mapping[str, Any]) -> None:
    """Ask before weights are read, where diffusers would after them."""
    name = read_json(place / "model_index.json").get("_class_name")
    if not isinstance(name, list) or pipeline_arguments.get("trust_remote_code"):
        return
    module, kind = name
    raise OptionError(
        f"{place} brings code of its own: {kind} in {module}.py, which runs only if you allow it. "
        "Read it, then pass trust_remote_code=True, or --trust-remote-code on the command line."
    )


def pipeline_class(place: Path) -> Any:
    """Return the pipeline's own class; code that a folder brings along is for diffusers to load.

    Asked through ``DiffusionPipeline``, diffusers 0.42 loads an optional component (Wan2.2's
    transformers) anew although it was passed.

    Raises:
        CheckpointError: diffusers has no such class.
    """
    index = place / "model_index.json"
    name = read_json(index).get("_class_name")
    if isinstance(name, list):
        return DiffusionPipeline
    cls = getattr(diffusers, str(name), None)
    if cls is None:
        pipelines = [n for n in dir(diffusers) if n.endswith("Pipeline")]
        raise CheckpointError(
            f"{index} names the class {name!r}, which diffusers {diffusers.__version__} lacks."
            f"{hint(name, pipelines)}"
        )
    return cls


def check_components(
    place: Path, config: PipelineQuantConfig, given: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """Return the library and class of each model of a pipeline, with the config checked on them.

    Args:
        place: the pipeline's folder.
        config: which components are quantized, and how.
        given: components that need no weights there.

    Raises:
        OptionError: the config does not fit the pipeline.
        CheckpointError: the folder has no model_index.json, or lacks files of what is to be
            quantized.
    """
    listed = pipeline_components(place)
    components = {
        name: entry
        for name, entry in listed.items()
        if _holds_weights(place / name) or (name in given and _is_described(place / name))
    }
    for name in [n for n, (_, kind) in components.items() if _is_of_several(kind, place / n)]:
        _, kind = components.pop(name)
        what = (
            f"{name!r} is a {kind}, of several models, which are loaded in BF16 or as they are "
            f"stored. Quantize it in the loaded pipeline: omniq_compile.quantize_(pipe.{name}, "
            "options)"
        )
        if config.names(name):
            if config.components.get(name, ...) is not None:
                raise OptionError(f"{place}: {what}, and leave it out here.")
        elif config.components.get(DEFAULT) is not None:
            logger.warning("%s: %s", place, what)
    if not components and config != PipelineQuantConfig():
        raise CheckpointError(
            f"{place} holds no component with weights and a config.json, so there is nothing to "
            "quantize. Download the whole pipeline, or name the folder that has them."
        )
    for name in listed:
        if name in given:
            continue
        if config.names(name) or (config.everywhere is not None and is_transformer(name)):
            _check_complete(place / name)
        if config.components.get(name, ...) is None and name in components and is_own(place / name):
            raise OptionError(
                f"{place / name} is stored quantized, and None asks for {name!r} in BF16. Leave "
                "it out to load it as it is stored, or give the folder it was quantized from."
            )
    config.check(components, [n for n, (_, kind) in components.items() if _is_stage(n, kind)])
    for name, (library, kind) in components.items():
        if config.parts_of(name) and name not in given:
            config.check_parts(name, _without_weights(library, kind, place / name))
    return components


def _without_weights(library: str, kind: str, folder: Path) -> Any:
    """Build a component's model with parameters on the meta device."""
    cls = component_class(library, kind, folder)
    with parameters_without_values():
        if not issubclass(cls, ModelMixin):
            return cls(cls.config_class.from_pretrained(folder))
        about = read_config(folder)
        about.pop("quantization_config", None)
        return cls.from_config(about)


def _check_complete(folder: Path) -> None:
    """Say what is missing of a component that model_index.json lists and that is to be quantized.

    A component that has neither a config.json nor weights is no model, but for transformers.

    Raises:
        CheckpointError: one of the two is missing.
    """
    described, weights = _is_described(folder), _has_weights(folder)
    if not described and (weights or is_transformer(folder.name)):
        raise CheckpointError(f"{folder / 'config.json'} is missing. Download the whole pipeline.")
    if described and not weights:
        raise CheckpointError(f"{folder} has no weights. Download the whole pipeline.")


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(
        file.suffix in (".safetensors", ".bin", ".gguf") for file in folder.iterdir()
    )


def _holds_weights(folder: Path) -> bool:
    """Say whether a component is a model: a scheduler or tokenizer has no config.json of one."""
    return _is_described(folder) and _has_weights(folder)


def _is_described(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _is_of_several(kind: str, folder: Path) -> bool:
    """Say whether a component is made of several models, of which a folder holds the first alone:
    a ``MultiControlNetModel``, whose others lie in ``controlnet_1`` and so on.
    """
    return kind.startswith("Multi") and read_config(folder).get("_class_name") != kind


def _is_stage(name: str, kind: str) -> bool:
    return kind.endswith(_LANGUAGE_MODELS) and not name.startswith("text_encoder")


def is_own(folder: Path) -> bool:
    """Say whether a component's folder is stored quantized by omniq."""
    stored = read_config(folder).get("quantization_config")
    return isinstance(stored, Mapping) and stored.get("quant_method") == OWN


def load_component(library: str, kind: str, folder: Path, **loading: Any) -> Any:
    """Load a quantized component, by `load_model` or, of transformers, by `load_quantized`.

    Args:
        library: that model_index.json names.
        kind: the class that it names.
        folder: of the component.
        loading: arguments that both functions take.

    Raises:
        OptionError: the class cannot be imported; and what both functions raise.
    """
    cls = component_class(library, kind, folder)
    load = load_model if issubclass(cls, ModelMixin) else load_quantized
    return load(cls, folder, **loading)


def component_class(library: str, kind: str, folder: Path) -> Any:
    """Return the class of a component, from the library that model_index.json names.

    A library may be one of diffusers' own pipelines, where a class has no other home: LTX-2's
    ``["ltx2", "LTX2TextConnectors"]``.

    Raises:
        OptionError: it cannot be imported.
    """
    try:
        own = getattr(diffusers.pipelines, library, None)
        return getattr(own or importlib.import_module(library), kind)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"{folder} is a {kind} of {library!r}, which cannot be imported ({error}), so it "
            f"cannot be quantized. Install {library}, or leave the component in BF16."
        ) from error
