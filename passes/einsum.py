"""einsum, and tensordot as one of two operands, read as a product in the normal form."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from torch import fx

from omniq_compile.passes import dynamo
from omniq_compile.passes.expression import Step, is_the_weight
from omniq_compile.passes.sites import Operand, Product, product_of_several


def read_einsum(node: fx.Node) -> Product | None:
    """Read ``einsum(equation, x, y)``; None where it is no product of tensors."""
    equation, operands = _spelled(node)
    if len(operands) < 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    if len(operands) > 2:
        return product_of_several(operands, f"einsum {equation!r} is not one matrix product")
    x, y = operands
    ranks = (dynamo.value(x).dim(), dynamo.value(y).dim())
    letters = _letters(equation, ranks)
    if letters is None:
        return _unsupported(x, y, equation)
    return _read(x, y, *letters, equation)


def _spelled(node: fx.Node) -> tuple[str, list[Any]]:
    """Return the equation and the operands, also of ``einsum(x, [0, 1], y, [1, 2], [0, 2])``."""
    given: list[Any] = [*node.args]
    given += [node.kwargs[name] for name in ("equation", "tensors") if name in node.kwargs]
    if isinstance(given[0], str):
        equation, *operands = given
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = [*operands[0]]
        return equation, operands
    equation = ",".join(map(_term, given[1::2]))
    if len(given) % 2 == 0:
        return equation, given[::2]
    return f"{equation}->{_term(given[-1])}", given[:-1:2]


def _term(axes: Sequence[Any]) -> str:
    """Write the numbers of axes, from 0 to 51, as the letters that einsum takes them for."""
    letters = string.ascii_uppercase + string.ascii_lowercase
    return "".join("..." if axis is Ellipsis else letters[axis] for axis in axes)


def read_tensordot(node: fx.Node) -> Product:
    """Read ``tensordot(a, b, dims)`` as the einsum that it is."""
    arguments: dict[str, Any] = dict(zip(("a", "b", "dims"), node.args, strict=False))
    arguments |= node.kwargs
    x, y, dims = arguments["a"], arguments["b"], arguments.get("dims", 2)
    if isinstance(dims, fx.Node):
        return product_of_several([x, y], "a tensor says which dimensions tensordot sums")
    ranks = (dynamo.value(x).dim(), dynamo.value(y).dim())
    if isinstance(dims, int):
        dims = (range(ranks[0] - dims, ranks[0]), range(dims))
    a = string.ascii_letters[: ranks[0]]
    b = list(string.ascii_letters[ranks[0] : sum(ranks)])
    for i, j in zip(*dims, strict=True):
        b[j] = a[i]
    out = [c for c in (*a, *b) if not (c in a and c in b)]
    equation = f"{a},{''.join(b)}->{''.join(out)}"
    return _read(x, y, a, "".join(b), "".join(out), equation)


def _read(x: fx.Node, y: fx.Node, a: str, b: str, out: str, equation: str) -> Product:
    """Sort the letters into batch, M, N and K, and the tensors into ``[batch, M|N, K]``.

    Where only ``x`` is a weight, it is the second.
    """
    if is_the_weight(x, y):
        x, y, a, b = y, x, b, a
    batch = [c for c in a if c in b and c in out]
    inner = [c for c in a if c in b and c not in out]
    rows = [c for c in a if c not in b]
    columns = [c for c in b if c not in a]
    summed_alone = [c for c in rows + columns if c not in out]
    if summed_alone or not inner or not columns or not rows:
        return _unsupported(x, y, equation)
    if batch and (len(rows) > 1 or len(columns) > 1 or len(inner) > 1):
        return _unsupported(x, y, equation)
    x_sizes = dict(zip(a, dynamo.value(x).shape, strict=True))
    sizes = dict(zip(b, dynamo.value(y).shape, strict=True))
    # einsum broadcasts a summed size of 1; a GEMM does not.
    if any(_is_one(x_sizes[c]) != _is_one(sizes[c]) for c in inner):
        return _unsupported(x, y, equation)
    if not all(isinstance(sizes[c], int) for c in inner + columns) and len(inner + columns) > 2:
        return _unsupported(x, y, equation)
    a_steps = _permute(a, batch + rows + inner) + _flatten(-len(inner), -1)
    b_steps = _permute(b, batch + columns + inner) + _flatten(-len(inner), -1)
    if not batch:
        b_steps += _flatten(0, len(columns) - 1)
    out_steps: tuple[Step, ...] = ()
    if len(columns) > 1:
        out_steps += (("unflatten", (-1, tuple(int(sizes[c]) for c in columns))),)
    out_steps += _permute("".join(batch + rows + columns), list(out))
    return Product(Operand(x, a_steps), Operand(y, b_steps), out_steps=out_steps)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _letters(equation: str, ranks: tuple[int, int]) -> tuple[str, str, str] | None:
    """Spell out an equation of two operands: an ellipsis as letters, and the output that it has.

    None where there are not two terms, or one has a letter twice.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    free = [c for c in string.ascii_letters if c not in equation]
    widths = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for rank, term in zip(ranks, terms, strict=True)
    ]
    # Two ellipses are aligned at their ends, as in broadcasting.
    spelled = "".join(free[: max(widths)])
    a, b = (
        term.replace("...", spelled[len(spelled) - width :])
        for term, width in zip(terms, widths, strict=True)
    )
    if arrow:
        out = out.replace("...", spelled)
    else:
        once = (c for c in {*inputs} - {*",."} if inputs.count(c) == 1)
        out = spelled + "".join(sorted(once))
    if any(len(set(term)) != len(term) for term in (a, b, out)):
        return None
    return a, b, out


def _permute(current: str, wanted: list[str]) -> tuple[Step, ...]:
    order = tuple(current.index(c) for c in wanted)
    return () if order == tuple(range(len(order))) else (("permute", order),)


def _flatten(start: int, end: int) -> tuple[Step, ...]:
    single = start == end
    return () if single else (("flatten", (start, end)),)


def _unsupported(x: Any, y: Any, equation: str) -> Product:
    return Product(
        Operand(x), Operand(y), unsupported=f"einsum {equation!r} is not one matrix product"
    )
