"""One compile in one line."""

from __future__ import annotations

import math
from collections import Counter

from omniq_compile.lowering.formats import get_format
from omniq_compile.passes import dynamo
from omniq_compile.passes.context import Binding, Context
from omniq_compile.passes.sites import Kind, Site


def weight_bytes(binding: Binding) -> tuple[int, int]:
    """Return the bytes of a weight before and after quantization."""
    elements = math.prod(binding.shape)
    rows = elements // binding.shape[-1]
    after = get_format(binding.format).nbytes(rows, binding.shape[-1])
    return elements * binding.dtype.itemsize, after


def site_bytes(site: Site) -> tuple[int, int] | None:
    """Return the bytes of a site's weight before and after, or None where there is no weight."""
    if site.kind is Kind.ACTIVATION or site.problem is None:
        return None
    weight = dynamo.value(site.product.b.node)
    elements, K = weight.numel(), site.problem.K
    scheme = site.decision.scheme
    # A weight that is stored quantized shows the dtype of what it stands for.
    before = elements * weight.dtype.itemsize
    if scheme is None and site.stored is None:
        return before, before
    format = scheme.weight if scheme else str(site.stored and site.stored.format)
    return before, get_format(format).nbytes(elements // K, K)


def summary_line(context: Context, seconds: float) -> str:
    """Word what was found, rewritten and kept (and why), the bytes saved and the seconds."""
    methods = Counter(s.decision.method for s in context.sites if s.decision.method)
    kept = Counter(s.decision.reason for s in context.sites if s.decision.method is None)
    sizes = [weight_bytes(binding) for binding in context.bindings]
    before, after = (sum(size[i] for size in sizes) for i in (0, 1))
    rewritten = ", ".join(f"{n} {m}" for m, n in methods.items()) or "none rewritten"
    reasons = "; ".join(f"{n} x {reason}" for reason, n in kept.most_common())
    return (
        f"{context.target}: {len(context.sites)} sites: {rewritten}, {sum(kept.values())} kept"
        + (f" ({reasons})" if reasons else "")
        + f"; weights {before / 1e6:.1f} -> {after / 1e6:.1f} MB; passes {seconds:.2f} s"
    )
