"""An inspection as JSON, in a structure that docs/inspector.md describes."""

from __future__ import annotations

import dataclasses
import json

import omniq_compile
from omniq_compile.inspector.inspection import Inspection

# Grows when a field changes its meaning or goes away; new fields leave it as it is.
VERSION = 1


def render_json(inspection: Inspection) -> str:
    """Return the document."""
    document = {
        "version": VERSION,
        "omniq": omniq_compile.__version__,
        **dataclasses.asdict(inspection),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
