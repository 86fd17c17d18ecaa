"""Downloads what a load reads of a hub id: of weights one form, and none of what is not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omniq_compile.checkpoints.checkpoint_folder import component_folder, pipeline_components
from omniq_compile.checkpoints.safetensors_files import STEMS
from omniq_compile.lowering.errors import CheckpointError, hint

# What ``huggingface_hub.snapshot_download`` takes of a user; from version 1 on it ignores proxies.
HUB_ARGUMENTS = (
    "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies",
)  # fmt: skip

_WEIGHTS = tuple(
    f"*.{ending}"
    for ending in (
        "safetensors", "bin", "pt", "pth", "ckpt", "pkl", "msgpack", "h5", "pb", "onnx",
        "onnx_data", "gguf", "flashpack",
    )
)  # fmt: skip
_MEDIA = tuple(f"*.{ending}" for ending in ("png", "jpg", "jpeg", "gif", "webp", "mp4", "webm"))


def hub_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of HUB_ARGUMENTS that are among a load's arguments."""
    return {name: given[name] for name in HUB_ARGUMENTS if name in given}


def may_be_hub_id(where: str) -> bool:
    """Tell what may be a hub id from a path; a folder or file of that name goes first."""
    is_path = where.startswith((".", "/", "~"))
    return where.count("/") == 1 and not is_path and not Path(where).exists()


def index_folder(where: str, hub: Mapping[str, Any]) -> Path:
    """Return a folder with a pipeline's model_index.json, of which nothing else need be there.

    Args:
        where: a folder or a hub id.
        hub: HUB_ARGUMENTS that were given.

    Raises:
        CheckpointError: there is no such folder, and no such pipeline can be downloaded.
    """
    return existing_folder(where) or _Repository(where, hub).fetch(["model_index.json"])


def described_folder(where: str, hub: Mapping[str, Any]) -> Path:
    """Return a folder with the configurations of a pipeline or a model, and no weights.

    Args:
        where: a folder or a hub id.
        hub: HUB_ARGUMENTS that were given.

    Raises:
        CheckpointError: there is no such folder, and nothing of that name can be downloaded.
    """
    files = ["model_index.json", "config.json", "*/config.json"]
    return existing_folder(where) or _Repository(where, hub).fetch(files)


def whole_folder(
    where: str,
    hub: Mapping[str, Any],
    *,
    variant: str | None = None,
    given: Iterable[str] = (),
    every_format: bool = False,
) -> Path:
    """Return a local folder for a pipeline, or a single model.

    Args:
        where: a folder or a hub id.
        hub: HUB_ARGUMENTS that were given.
        variant: of the weights; components that have none of it come without one.
        given: components whose weights are not needed.
        every_format: of weights, and not one alone.

    Raises:
        CheckpointError: there is no such folder, and no such model can be downloaded, or no
            component of it has weights of the variant.
    """
    folder = existing_folder(where)
    if folder is not None:
        return folder
    repository = _Repository(where, hub)
    place = repository.fetch(["model_index.json", "config.json"])
    if every_format:
        return repository.fetch()
    repository.fetch(ignore=[*_WEIGHTS, *_MEDIA])
    names = [""]
    if (place / "model_index.json").is_file():
        names = [name for name in pipeline_components(place) if name not in set(given)]
    repository.fetch_weights([n for n in names if (place / n / "config.json").is_file()], variant)
    return place


def whole_component(
    where: str, hub: Mapping[str, Any], subfolder: str | None, cls: type | None, variant: str | None
) -> Path:
    """Return the folder of one model, alone or of a pipeline, of which no more is downloaded.

    Args:
        where: a folder or a hub id, of the model or its pipeline.
        hub: HUB_ARGUMENTS that were given.
        subfolder: of the pipeline; None is that of the class.
        cls: the model's class; None is that of the component ``transformer``.
        variant: of the weights.

    Raises:
        CheckpointError: there is no such folder or component, and none can be downloaded.
    """
    folder = existing_folder(where)
    if folder is not None:
        return component_folder(folder, subfolder, cls)
    repository = _Repository(where, hub)
    described = f"{subfolder}/config.json" if subfolder else "config.json"
    place = repository.fetch(["model_index.json", described])
    component = component_folder(place, subfolder, cls)
    name = component.relative_to(place).as_posix().removeprefix(".")
    files = _prefix(name)
    repository.fetch([f"{files}*"], [*_WEIGHTS, f"{files}*/*"])
    if not component.is_dir():
        has_index = (place / "model_index.json").is_file()
        meant = hint(name, pipeline_components(place)) if has_index else ""
        raise CheckpointError(f"{where} has no folder {name!r}.{meant}")
    repository.fetch_weights([name], variant)
    return component


def existing_folder(where: str) -> Path | None:
    """Return the folder, or None for what may be a hub id.

    Raises:
        CheckpointError: it is neither.
    """
    if Path(where).is_dir():
        return Path(where)
    if Path(where).is_file():
        raise CheckpointError(
            f"{where} is a file, and not a folder of diffusers. A single file of weights is loaded "
            "by diffusers: Class.from_single_file(file, config=folder, dtype=torch.bfloat16, "
            "quantization_config=omniq_compile.DiffusersConfig(method))."
        )
    if not may_be_hub_id(where):
        raise CheckpointError(
            f"{where} is not a folder, and no hub id, which is OWNER/NAME. Check the path."
        )
    return None


def _prefix(folder: str) -> str:
    return f"{folder}/" if folder else ""


def _without_token(text: str, token: object) -> str:
    """Return what a library said of a request, which may be its headers, without the token."""
    return text.replace(token, "<token>") if isinstance(token, str) and token else text


class _Repository:
    """One repository of the hub, and the folder that its files are downloaded into."""

    def __init__(self, hub_id: str, hub: Mapping[str, Any]) -> None:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        self._id = hub_id
        self._hub = hub
        self._place: Path | None = None
        self._offline = HF_HUB_OFFLINE or bool(hub.get("local_files_only"))

    def fetch(self, allow: Sequence[str] | None = None, ignore: Sequence[str] = ()) -> Path:
        """Download the files that match, and return the folder.

        Without a network that folder is taken as it is: another program may have left out files
        that it did not need, and what a load misses, the load names.
        """
        from huggingface_hub import snapshot_download

        if self._offline and self._place is not None:
            return self._place
        try:
            place = Path(
                snapshot_download(
                    self._id,
                    allow_patterns=None if allow is None else list(allow),
                    ignore_patterns=list(ignore) or None,
                    **self._hub,
                )
            )
        except Exception as error:
            told = _without_token(str(error), self._hub.get("token"))
            # A traceback would show the original's words too.
            cause = error if told == str(error) else None
            told = " ".join(told.split())
            meant = hint(self._id, [str(entry) for entry in Path(self._id).parent.glob("*")])
            raise CheckpointError(
                f"there is no folder {self._id!r}, and {self._id!r} cannot be downloaded: "
                f"{told}{meant}"
            ) from cause
        if place != (self._place or place):
            raise CheckpointError(
                f"{self._id} was changed on the hub while it was downloaded. Load it again, or "
                "name a commit with revision=..."
            )
        self._place = place
        return place

    def fetch_weights(self, folders: Sequence[str], variant: str | None) -> None:
        """Download one form of the weights of each folder: the first that it has.

        What there is, is found out by asking: without a network a list of files cannot be had.

        Raises:
            CheckpointError: no folder has weights of the variant.
        """
        plain = [name for stem in STEMS for name in (f"{stem}.", f"{stem}-*.")]
        forms = [
            ([f"{name}safetensors" for name in plain], ["*.*.safetensors"]),
            (["*.safetensors"], []),
            (["*.bin"], ["*.*.bin"]),  # which diffusers may read, and omniq never does
        ]
        if variant is not None:
            endings = (f".{variant}.", f".{variant}-*.", f"-*.{variant}.")
            wanted = [f"{stem}{ending}safetensors" for stem in STEMS for ending in endings]
            self._fetch_form(folders, wanted, [])
            missing = self._without(folders, wanted, [])
            if folders and len(missing) == len(folders):
                raise CheckpointError(
                    f"no weights of {self._id} are of variant {variant!r}, as in "
                    f"model.{variant}.safetensors. Leave variant out, or name another."
                )
            folders = missing
        for names, ignored in forms:
            self._fetch_form(folders, names, ignored)
            folders = self._without(folders, names, ignored)

    def _fetch_form(self, folders: Sequence[str], names: list[str], ignored: list[str]) -> None:
        if folders:
            # A pattern is of a whole path, in which a folder's name may have a dot too.
            prefixes = [_prefix(folder) for folder in folders]
            ignored = [f"{prefix}{name}" for prefix in prefixes for name in (*ignored, "*/*")]
            self.fetch([f"{p}{name}" for p in prefixes for name in names], ignored)

    def _without(self, folders: Sequence[str], names: list[str], ignored: list[str]) -> list[str]:
        def has(folder: str) -> bool:
            assert self._place is not None
            return any(
                any(fnmatchcase(file.name, name) for name in names)
                and not any(fnmatchcase(file.name, name) for name in ignored)
                for file in (self._place / folder).iterdir()
            )

        return [folder for folder in folders if not has(folder)]
