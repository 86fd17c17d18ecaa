"""A hub with one repository, in place of `huggingface_hub`'s downloads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.utils import filter_repo_objects

HUB_ID = "somebody/pipeline"


class Hub:
    """A repository in a folder, and what was asked of it."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files = files
        self.cache = cache
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(
        self, repo_id: str, *, allow_patterns: Any, ignore_patterns: Any, **given: Any
    ) -> str:
        assert repo_id == HUB_ID
        self.calls.append(given)
        if given.get("local_files_only"):
            if not self.cache.is_dir():
                raise FileNotFoundError("nothing is cached")
            return str(self.cache)
        names = [p.relative_to(self.files).as_posix() for p in self.files.rglob("*") if p.is_file()]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.files / name, self.cache / name)
        return str(self.cache)

    def downloaded(self, folder: str = "") -> set[str]:
        place = self.cache / folder
        return {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
