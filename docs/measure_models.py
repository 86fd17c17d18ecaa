"""Run every transformer class of diffusers beside BF16, and write the table of docs/models.md.

python docs/measure_models.py            # all classes, a few minutes on two quiet cores
python docs/measure_models.py Flux Wan   # only classes whose names begin so; other rows stay

What it measures is kept in docs/models.json, from which the page is written.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from zoo.walk import (  # noqa: E402
    METHODS,
    Backend,
    build_recipe,
    exported_transformers,
    linears_that_run,
    relative_error,
    tensors,
)

PAGE, MEASURED = HERE / "models.md", HERE / "models.json"


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """Return what one class loses in each method, and which of its linear layers were rewritten."""
    torch._dynamo.reset()
    model, inputs = build_recipe(name)
    called, output = linears_that_run(model, inputs())
    expected = tensors(output)
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    errors = {}
    for method in METHODS:
        backend.method = method
        errors[method] = relative_error(tensors(compiled(**inputs())), expected)
    weights = {layer: model.get_submodule(layer).weight for layer in called}
    low = any(w.dtype is torch.bfloat16 for w in weights.values())
    left = {k: w for k, w in weights.items() if id(w) not in backend.weights[METHODS[0]]}
    return {
        "errors": errors,
        "run": len(called),
        "rewritten": len(called) - len(left),
        "float32": sorted(k for k, w in left.items() if low and w.dtype is torch.float32),
        "untraced": sorted(k for k, w in left.items() if not low or w.dtype is not torch.float32),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(expected[0].dtype).removeprefix("torch."),
        "with": f"diffusers {diffusers.__version__}, torch {torch.__version__.split('+')[0]}",
    }


def short(layers: list[str]) -> str:
    """Word layer names in one cell: block numbers become a star."""
    names = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", layer) for layer in layers)
    return ", ".join(f"`{name}`" for name in names) or "none"


def table(measured: dict[str, Any]) -> str:
    head = [
        "class", "layers to skip", "kept in float32 by the model", "outside the graphs",
        "linears rewritten", *(f"error, {m}" for m in METHODS), "size", "compared with",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name, row in sorted(measured.items()):
        lines.append(
            [
                name,
                "none",
                short(row["float32"]),
                short(row["untraced"]),
                f"{row['rewritten']} of {row['run']}",
                *(f"{row['errors'][m]:.4f}" for m in METHODS),
                f"{row['parameters'] / 1e3:,.0f} k parameters",
                row["dtype"],
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    console = Console()
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    begins = tuple(sys.argv[1:])
    names = [n for n in exported_transformers() if not begins or n.startswith(begins)]
    for name in track(names, "classes", console=console):
        measured[name] = measure(name)
        MEASURED.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    measured = {n: measured[n] for n in exported_transformers() if n in measured}
    page = PAGE.read_text(encoding="utf-8")
    changed, count = re.subn(
        r"(<!-- classes -->\n).*?(<!-- end classes -->)",
        lambda m: m[1] + table(measured) + "\n" + m[2],
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{PAGE} has no place for the table")
    PAGE.write_text(changed, encoding="utf-8")
    console.print(f"wrote {len(measured)} rows to {PAGE}")


if __name__ == "__main__":
    main()
