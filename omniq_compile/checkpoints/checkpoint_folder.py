"""What lies in a folder of diffusers: its components, their files of JSON, and a model's class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniq_compile.lowering.errors import CheckpointError, OptionError, hint


def component_folder(folder: Path, subfolder: str | None, cls: type | None) -> Path:
    """Return the folder of one component, from its own or its pipeline's folder.

    Raises:
        CheckpointError: the pipeline has no such component, or several of the class.
    """
    if subfolder is not None:
        return folder / subfolder
    if not (folder / "model_index.json").is_file():
        return folder
    components = pipeline_components(folder)
    wanted = [
        name
        for name, (_, class_name) in components.items()
        if (class_name == cls.__name__ if cls is not None else name == "transformer")
    ]
    if not wanted:
        what = f"of class {cls.__name__}" if cls is not None else "named 'transformer'"
        raise CheckpointError(
            f"the pipeline in {folder} has no component {what}. It has "
            + ", ".join(f"{name} ({kind})" for name, (_, kind) in components.items())
            + ". Name one with subfolder=..."
        )
    if len(wanted) > 1:
        assert cls is not None
        raise CheckpointError(
            f"the pipeline in {folder} has several components of class {cls.__name__}. Name one "
            f"with subfolder=...: {', '.join(wanted)}."
        )
    return folder / wanted[0]


def _is_component(name: str, entry: Any) -> bool:
    # [null, null] is a component that the pipeline goes without.
    is_pair = isinstance(entry, list) and len(entry) == 2
    return (
        is_pair
        and not name.startswith("_")
        and all(part and isinstance(part, str) for part in entry)
    )


def pipeline_components(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the library and class of each component of a pipeline's folder.

    Raises:
        CheckpointError: it has no model_index.json.
    """
    index = read_json(folder / "model_index.json")
    return {name: tuple(entry) for name, entry in index.items() if _is_component(name, entry)}


def read_config(folder: Path) -> dict[str, Any]:
    """Read a component's config.json.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Check the path.")
    return read_json(folder / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: it is missing or does not.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing{_modular(file.parent)}.") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object.")
    return content


def _modular(folder: Path) -> str:
    """Say what to do with the folder of a modular pipeline, which has an index of its own."""
    if not (folder / "modular_model_index.json").is_file():
        return ""
    return (
        ": the folder holds a modular pipeline. Load one of its components by load_model with "
        "subfolder=..., or give a DiffusersConfig to its load_components(quantization_config=...)"
    )


def model_class(about: Mapping[str, Any], cls: type | None, folder: Path) -> Any:
    """Return a diffusers model's class, checked against what its config names.

    Args:
        about: the content of its config.json.
        cls: that a user asks for, or None.
        folder: where it lies, for messages.

    Raises:
        CheckpointError: it is a model of another library, or of a class that diffusers lacks.
        OptionError: it is of another class than ``cls``, or that is no diffusers model.
    """
    # Late, as it takes seconds, in which a command would not yet say that a path is wrong.
    import diffusers

    name = about.get("_class_name")
    if cls is None:
        if name is None and about.get("architectures"):
            raise CheckpointError(
                f"{folder} is a transformers model ({about['architectures'][0]}): name it through "
                'its pipeline\'s folder, as in {"text_encoder": "int8"}.'
            )
        found = getattr(diffusers, str(name), None)
        if found is None:
            models = [n for n in dir(diffusers) if n.endswith("Model")]
            raise CheckpointError(
                f"{folder} is of class {name!r}, which diffusers lacks.{hint(name, models)}"
            )
        cls = found
    elif name not in (None, cls.__name__):
        raise OptionError(f"{folder} is a {name}, not a {cls.__name__}.")
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise OptionError(
            f"load_model loads diffusers' models, and {cls} is none. Load it with its own library, "
            "and then call omniq_compile.quantize_(model, options)."
        )
    return cls
