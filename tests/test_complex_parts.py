"""Frequencies cut and joined from tables of complex numbers become real tables, cut alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import count, traced
from test_real_rotary import check, complex_products, lowered, rotate, same, unit
from torch import fx

from omniq_compile.models.random_models import make_inputs, random_model


def complex_values(gm: fx.GraphModule) -> int:
    """Count what is made of complex numbers in a graph, beside its inputs."""
    values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op != "placeholder"]
    return sum(isinstance(v, torch.Tensor) and v.is_complex() for v in values)


# Ways to get frequencies [7, 6] from a table [19, 6], or several of it.
MOVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda t: t[3:10],
    "the last rows": lambda t: t[-7:, ...],
    "picked rows": lambda t: t[torch.tensor([0, 18, 3, 3, 5, 1, 2])],
    "by split": lambda t: torch.cat([c[2:9] for c in t.split([1, 2, 3], dim=-1)], dim=-1),
    "by split with sizes": lambda t: torch.cat(t[2:9].split_with_sizes([2, 4], 1)[::-1], dim=-1),
    "one of what is no move": lambda t: t.tensor_split([2, 9])[1][..., :],
    "by chunk": lambda t: torch.cat(list(t.narrow(0, 4, 7).chunk(2, 1))[::-1], -1),
    "by unbind": lambda t: torch.stack(t[:7].unbind(1)[::-1], dim=-1),
    "of both ends": lambda t: torch.cat([t[-3:], t[:4]]),
    "over a grid": lambda t: torch.cat(
        [t[:1, :2].view(1, 1, -1).expand(7, 1, -1), t[:7, 2:].view(7, 1, -1)], dim=-1
    ).reshape(7, -1).clone().contiguous(),
    "transposed": lambda t: t.t().contiguous().mT[5:12],
    "one for all": lambda t: t[4].unsqueeze(0).expand(7, 6),
    "to where it is": lambda t: t.to(t.device)[8:15],
    "to its own dtype": lambda t: t.to(torch.complex64)[2:9],
    "overloads": lambda t: torch.ops.aten.slice.Tensor(torch.ops.aten.alias.default(t), 0, 2, 9),
    "of a table made here": lambda t: torch.polar(t.abs(), t.angle())[2:9],
    "of pairs": lambda t: torch.view_as_complex(torch.view_as_real(t) * 2)[2:9],
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_frequencies_are_cut_and_joined_as_real_numbers(name: str) -> None:
    def function(x: torch.Tensor, y: torch.Tensor, table: torch.Tensor) -> Any:
        f = MOVED[name](table)
        return rotate(x, f.unsqueeze(1)), rotate(y, f.unsqueeze(1))

    x, y, table = torch.randn(2, 7, 3, 12), torch.randn(7, 1, 12), unit(19, 6)
    ((gm, values),) = traced(function, x, y, table)
    after = lowered(gm)
    assert complex_products(gm) == 2
    # What is not moved alone stays as it is, and its result is read.
    stay = ("of a table made here", "to its own dtype", "one of what is no move")
    assert complex_values(after) == (name in stay)
    assert count(after, torch.view_as_real) == 1
    for out, given in zip(after(*values), (x, y), strict=True):
        check(out, given, MOVED[name](table)[:, None])


def doubled(f: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Write to a part of frequencies between two uses."""
    part.mul_(2)
    return f


CHANGED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "written between": lambda x, f: (rotate(x, f), rotate(x, doubled(f, f))),
    "written before": lambda x, f: rotate(x, doubled(f, f)[:7]),
    "a part is written": lambda x, f: rotate(x, doubled(f, f[1])),
    "what they were is written": lambda x, f: (
        lambda g, h: (rotate(x, h), doubled(g, g), rotate(x, h), rotate(x, g[:7]))
    )(f, torch.cat([f[:3], f[3:]])),
    "written by another name": lambda x, f: (lambda g: (doubled(f, f), rotate(x, g)))(
        f.mul_(2).contiguous()
    ),
    "what they are a view of is written": lambda x, f: (lambda g: (doubled(f, f), rotate(x, g)))(
        f.as_strided((7, 6), (6, 1)).contiguous()
    ),
    "turned in place": lambda x, f: (f.t_(), rotate(x, f.mT))[1],
    "read too": lambda x, f: (rotate(x, f[:7]), f[:7] * 2, f[:7]),
    "in double precision between": lambda x, f: rotate(x, f.to(torch.complex128).to(f.dtype)),
    "as other numbers between": lambda x, f: rotate(
        x, f.view(torch.int64)[:7].view(torch.complex64)
    ),
    "conjugated between": lambda x, f: rotate(x, f.conj().resolve_conj()[:7]),
    "joined with real numbers": lambda x, f: rotate(x, torch.cat([f[:3], f[3:].real])),
    "joined with conjugated ones": lambda x, f: rotate(x, torch.cat([f[:3], f[3:].conj()])),
    "made of their parts": lambda x, f: rotate(x, torch.complex(f.real, -f.imag)[:7]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_else_is_done_to_frequencies_is_done(name: str) -> None:
    """Whatever of it becomes real arithmetic, all results are what they were."""

    def function(x: torch.Tensor, table: torch.Tensor) -> Any:
        out = CHANGED[name](x, table.clone()[-7:])
        return out if isinstance(out, tuple) else (out,)

    assert same(function, torch.randn(2, 7, 12), unit(8, 6))[0] >= 1


def test_a_table_goes_to_another_device_as_it_is() -> None:
    """Its parts would be two copies, of every second number each."""

    def function(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return rotate(x, table[:9].to("meta")[2:])

    ((gm, _),) = traced(function, torch.randn(2, 7, 12, device="meta"), unit(19, 6))
    after = lowered(gm)
    assert (complex_products(after), count(after, torch.view_as_real)) == (0, 1)
    (moved,) = after.graph.find_nodes(op="call_method", target="to")[:1]
    assert [user.target for user in moved.users] == [torch.view_as_real]


def test_a_models_tables_are_read_as_real_numbers_once_each() -> None:
    model = random_model("QwenImageTransformer2DModel", "tiny", num_blocks=2)
    inputs = make_inputs(model, image_tokens=16, text_tokens=7)
    ((gm, _),) = traced(model, **inputs)
    after = lowered(gm)
    # Of positions before and behind the middle; one more `to` has no reader in the model itself.
    assert count(after, torch.view_as_real) == 2
    assert (complex_products(gm), complex_products(after), complex_values(after)) == (8, 0, 1)
