"""What `omniq tune` has measured so far, on disk after every measurement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omniq_compile.checkpoints.checkpoint_folder import pipeline_components
from omniq_compile.checkpoints.hub_download import index_folder
from omniq_compile.lowering.errors import OptionError
from omniq_compile.quality.compare_result import write_json

VERSION = 1


class TuneState:
    """Measurements by name, each made once, whichever run made it.

    Attributes:
        resumed: how many an earlier run left.
    """

    def __init__(self, file: Path, about: Mapping[str, Any], *, restart: bool = False) -> None:
        """Open or begin a state.

        Args:
            file: of JSON.
            about: what the measurements depend on.
            restart: forget what is there.

        Raises:
            OptionError: the file is of a run that measured something else, or damaged.
        """
        self._file = file
        self._about = json.loads(json.dumps(about))
        self._measured: dict[str, list[float]] = {}
        if file.exists() and not restart:
            self._measured = self._read()
        self.resumed = len(self._measured)

    def _read(self) -> dict[str, list[float]]:
        advice = "Choose another --out, or forget it with --restart."
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            about, measured = content["about"], content["measured"]
            found = {name: [float(v) for v in values] for name, values in measured.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"{self._file} cannot be read: {error!r}. {advice}") from error
        if content.get("version") != VERSION or about != self._about:
            keys = sorted({*about, *self._about})
            differ = [k for k in keys if about.get(k) != self._about.get(k)] or ["version"]
            raise OptionError(
                f"{self._file} is of another run: it differs in {', '.join(differ)}. {advice}"
            )
        return found

    def get(self, name: str) -> list[float] | None:
        """Return a measurement, or None."""
        return self._measured.get(name)

    def put(self, name: str, values: list[float]) -> None:
        """Keep a measurement, on disk when this returns."""
        self._measured[name] = values
        content = {"version": VERSION, "about": self._about, "measured": self._measured}
        write_json(self._file, content)


def name_of_set(kept: Collection[str]) -> str:
    """Name a set of layers, shortly and the same in every run."""
    return hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:24]


def fingerprint(folder: str, hub: Mapping[str, Any]) -> list[list[Any]]:
    """Return what a pipeline is known by: its own files, with their sizes and times.

    Of a hub id it is the folder that its files are downloaded into, which is named by the commit:
    the branch may have moved on since an earlier run.

    Args:
        folder: of the pipeline, or a hub id.
        hub: HUB_ARGUMENTS that were given.

    Raises:
        CheckpointError: there is no such pipeline.
    """
    root = Path(folder)
    if not root.is_dir():
        return [[folder, index_folder(folder, hub).name]]
    # Beside its components and code lies what is no part of it, such as this run's own results.
    parts = {"model_index.json", *pipeline_components(root)}
    files = [
        (p.relative_to(root), p)
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.suffix != ".pyc"
    ]
    stats = [(n.as_posix(), p.stat()) for n, p in files if n.parts[0] in parts or n.suffix == ".py"]
    return [[folder], *([name, s.st_size, s.st_mtime_ns] for name, s in stats)]
