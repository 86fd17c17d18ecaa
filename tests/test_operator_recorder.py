"""The recorder itself: wrong arguments, orders, dtypes, shapes and layouts have to fail."""

from __future__ import annotations

import tomllib
from typing import Any

import fake_torch_npu
import pytest
import torch
from operator_recorder import SCHEMAS, Recorder, WrongCall

M, K, N = 7, 128, 9
BF16 = torch.bfloat16


def right_calls() -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """One documented call of each kind, by a name of its own."""
    e4m3 = torch.zeros(M, K).to(torch.float8_e4m3fn)
    pairs = torch.full((M, K // 64, 2), 127, dtype=torch.uint8)
    b_pairs = torch.full((N, K // 64, 2), 127, dtype=torch.uint8)
    packed, b_packed = torch.zeros(M, K // 2).byte(), torch.zeros(N, K // 2).byte()
    mx = {
        "pertoken_scale": pairs, "bias": torch.zeros(N), "output_dtype": BF16,
        "pertoken_scale_dtype": 293, "scale_dtype": 293, "group_sizes": [1, 1, 32],
    }  # fmt: skip
    fractal = b_packed.view(torch.int8).clone()
    fractal.npu_format = 29  # type: ignore[attr-defined]
    return {
        "npu_dynamic_quant": ([torch.zeros(M, K, dtype=BF16)], {}),
        "npu_dynamic_mx_quant": ([torch.zeros(M, K, dtype=BF16)], {"dst_type": 292}),
        "npu_dynamic_mx_quant UOS": (
            [torch.zeros(M, K, dtype=BF16)],
            {"scale_alg": 2, "dst_type_max": 7.25},
        ),
        "npu_dynamic_dual_level_mx_quant": ([torch.zeros(M, K, dtype=BF16)], {}),
        "npu_quant_matmul int8": (
            [torch.zeros(M, K).char(), torch.zeros(N, K).char().t(), torch.ones(N)],
            {"pertoken_scale": torch.ones(M), "bias": torch.zeros(N), "output_dtype": BF16},
        ),
        "npu_quant_matmul mxfp8": (
            [e4m3, torch.zeros(N, K).to(torch.float8_e4m3fn).t(), b_pairs.transpose(0, 1)],
            mx,
        ),
        "npu_quant_matmul mxfp4": (
            [packed, b_packed.t(), b_pairs.transpose(0, 1)],
            mx | {"x1_dtype": 296, "x2_dtype": 296},
        ),
        "npu_quant_matmul mixed": (
            [e4m3, b_packed.t(), b_pairs.transpose(0, 1)],
            mx | {"x2_dtype": 296, "bias": torch.zeros(1, N, dtype=BF16)},
        ),
        "npu_format_cast": ([b_packed.view(torch.int8), 29], {"customize_dtype": torch.int8}),
        "npu_dual_level_quant_matmul": (
            [packed, fractal, torch.ones(M, 1), torch.ones(1, N), pairs, b_pairs],
            {"bias": torch.zeros(N), "output_dtype": BF16},
        ),
    }


def call(name: str, args: list[Any], kwargs: dict[str, Any], where: str = "ascend950") -> None:
    module, recorder = fake_torch_npu.install(where)
    getattr(module, name.split()[0])(*args, **kwargs)
    assert [c.operator for c in recorder.calls] == [name.split()[0]]


@pytest.mark.parametrize("name", right_calls())
def test_a_documented_call_passes(name: str) -> None:
    call(name, *right_calls()[name])


def swap(first: int, second: int) -> Any:
    def change(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[first], args[second] = args[second], args[first]

    return change


def put(key: Any, value: Any) -> Any:
    """Set an argument, by place or by name, to a value or to a function of the right one."""

    def change(args: list[Any], kwargs: dict[str, Any]) -> None:
        holder: Any = args if isinstance(key, int) else kwargs
        old = holder[key] if isinstance(key, int) else kwargs.get(key)
        holder[key] = value(old) if callable(value) and not isinstance(value, type) else value

    return change


def drop(key: Any) -> Any:
    def change(args: list[Any], kwargs: dict[str, Any]) -> None:
        del (args if isinstance(key, int) else kwargs)[key]

    return change


def more(*values: Any) -> Any:
    return lambda args, kwargs: args.extend(values)


WRONG = [
    ("npu_dynamic_quant", put(0, torch.zeros(M, K)), "float32"),
    ("npu_dynamic_quant", put("dst_type", torch.quint4x2), "dst_type is given"),
    ("npu_dynamic_quant", put("smooth_scale", None), "no argument 'smooth_scale'"),
    ("npu_dynamic_quant", more(None), "positional arguments"),
    ("npu_dynamic_quant", drop(0), "needs 'input'"),
    ("npu_dynamic_mx_quant", put("dst_type", 291), "dst_type = 291"),
    ("npu_dynamic_mx_quant", put("block_size", 16), "block_size = 16"),
    ("npu_dynamic_mx_quant", put("axis", 0), "axis = 0"),
    ("npu_dynamic_mx_quant", put("scale_alg", 2), "scale_alg = 2"),
    ("npu_dynamic_mx_quant UOS", drop("scale_alg"), "dst_type_max is given"),
    ("npu_dynamic_mx_quant UOS", put("dst_type_max", 7.0), "dst_type_max = 7.0"),
    ("npu_dynamic_mx_quant UOS", put(0, torch.zeros(M, 33, dtype=BF16)), "K % 2 == 0"),
    (
        "npu_dynamic_dual_level_mx_quant",
        put("smooth_scale", torch.ones(K)),
        "smooth_scale is given",
    ),
    ("npu_quant_matmul int8", swap(0, 1), "x2 is [7, 128]"),
    ("npu_quant_matmul int8", put(1, lambda w: w.t().contiguous()), "x2 is"),
    ("npu_quant_matmul int8", put(0, lambda x: x.unsqueeze(0)), "x1 is"),
    ("npu_quant_matmul int8", put(0, lambda x: x.byte()), "x1 is torch.uint8"),
    ("npu_quant_matmul int8", put(2, lambda s: s.unsqueeze(-1)), "scale is"),
    ("npu_quant_matmul int8", put(2, lambda s: s.to(torch.float64)), "scale is torch.float64"),
    ("npu_quant_matmul int8", put("pertoken_scale", lambda s: s[:-1]), "pertoken_scale is"),
    ("npu_quant_matmul int8", drop("pertoken_scale"), "pertoken_scale is missing"),
    ("npu_quant_matmul int8", put("bias", lambda b: b.half()), "bias is torch.float16"),
    ("npu_quant_matmul int8", put("bias", lambda b: b.unsqueeze(0)), "bias is"),
    ("npu_quant_matmul int8", put("bias", torch.zeros(K)), "bias is"),
    ("npu_quant_matmul int8", drop("output_dtype"), "output_dtype = None"),
    ("npu_quant_matmul int8", put("output_dtype", torch.float32), "output_dtype = 'float32'"),
    ("npu_quant_matmul int8", put("offset", torch.zeros(N)), "offset is given"),
    ("npu_quant_matmul int8", more(None), "positional arguments"),
    ("npu_quant_matmul mxfp8", put(1, lambda w: w.t()), "x2 is"),
    ("npu_quant_matmul mxfp8", put(2, lambda s: s.transpose(0, 1)), "scale is"),
    ("npu_quant_matmul mxfp8", put(2, lambda s: s.contiguous()), "does not hold"),
    ("npu_quant_matmul mxfp8", put("bias", lambda b: b.to(BF16)), "bias is torch.bfloat16"),
    ("npu_quant_matmul mxfp8", put("group_sizes", [1, 1, 128]), "group_sizes"),
    ("npu_quant_matmul mxfp8", drop("group_sizes"), "group_sizes"),
    ("npu_quant_matmul mxfp8", drop("scale_dtype"), "scale_dtype = None"),
    ("npu_quant_matmul mxfp8", put("x1_dtype", 296), "x1_dtype is given"),
    ("npu_quant_matmul mxfp8", put("pertoken_scale", lambda s: s.flatten(1)), "pertoken_scale is"),
    ("npu_quant_matmul mxfp4", put(1, lambda w: w.contiguous()), "does not hold"),
    ("npu_quant_matmul mxfp4", drop("x2_dtype"), "x2_dtype"),
    ("npu_quant_matmul mxfp4", put("x1_dtype", 297), "x1_dtype = 297"),
    ("npu_quant_matmul mixed", put("bias", lambda b: b.flatten()), "bias is"),
    ("npu_quant_matmul mixed", put("bias", lambda b: b.float()), "bias is torch.float32"),
    ("npu_quant_matmul mixed", put("output_dtype", torch.float16), "output_dtype = 'float16'"),
    ("npu_format_cast", put(1, 2), "acl_format = 2"),
    ("npu_format_cast", drop("customize_dtype"), "customize_dtype"),
    ("npu_dual_level_quant_matmul", swap(2, 3), "x1_level0_scale is"),
    # Each operand's two levels beside each other, which is not the operator's order.
    ("npu_dual_level_quant_matmul", swap(3, 4), "x2_level0_scale is torch.uint8"),
    ("npu_dual_level_quant_matmul", swap(4, 5), "x1_level1_scale is"),
    ("npu_dual_level_quant_matmul", put(1, lambda w: w.clone()), "npu_format"),
    ("npu_dual_level_quant_matmul", put(3, lambda s: s.t()), "x2_level0_scale is"),
    ("npu_dual_level_quant_matmul", put(5, lambda s: s.transpose(0, 1)), "x2_level1_scale is"),
    ("npu_dual_level_quant_matmul", put("bias", lambda b: b.to(BF16)), "bias is torch.bfloat16"),
    ("npu_dual_level_quant_matmul", put("output_dtype", torch.float32), "output_dtype"),
]


@pytest.mark.parametrize(("name", "change", "said"), WRONG)
def test_a_wrong_call_fails_and_says_why(name: str, change: Any, said: str) -> None:
    args, kwargs = right_calls()[name]
    change(args, kwargs)
    with pytest.raises(WrongCall) as raised:
        call(name, args, kwargs)
    assert said in str(raised.value)


def gemm_calls() -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """One documented call of torch and of AITER of each kind, ``library where operator``."""
    M, K, N = 32, 256, 64
    e4m3 = [torch.zeros(rows, K).to(torch.float8_e4m3fn) for rows in (M, N)]
    e2m1 = [torch.zeros(n, K // 2).byte().view(torch.float4_e2m1fn_x2) for n in (M, N)]
    rows = [torch.ones(M, 1), torch.ones(1, N)]
    padded = [torch.zeros(128, K // 32).byte().view(torch.float8_e8m0fnu) for _ in (M, N)]
    shuffled = [torch.zeros(256, K // 32).byte().view(torch.float8_e8m0fnu) for _ in (M, N)]
    int8 = [torch.zeros(M, K).char(), torch.zeros(N, K).char().t()]
    fnuz = [e.view(torch.uint8).view(torch.float8_e4m3fnuz) for e in e4m3]
    by_row = {"bias": torch.zeros(N, dtype=BF16), "out_dtype": BF16}
    return {
        "torch xe _scaled_mm": ([e4m3[0], e4m3[1].t(), *rows], by_row),
        "torch gfx942 _scaled_mm": ([fnuz[0], fnuz[1].t(), *rows], by_row),
        "torch gfx950 _scaled_mm": ([e2m1[0], e2m1[1].t(), *padded], {"out_dtype": BF16}),
        "torch gfx950 _int_mm": (int8, {}),
        "aiter gfx950 gemm_a4w4": ([*e2m1, *shuffled], {"dtype": BF16}),
    }


def by_columns(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8).t().contiguous().t().view(codes.dtype)


@pytest.mark.parametrize("name", gemm_calls())
def test_a_documented_gemm_passes(name: str) -> None:
    library, where, operator = name.split()
    Recorder(library, where).bind(operator, *gemm_calls()[name])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("torch xe _scaled_mm", put("use_fast_accum", True), "use_fast_accum is given"),
        ("torch xe _scaled_mm", put(1, lambda w: w.contiguous()), "does not hold"),
        ("torch xe _scaled_mm", put(3, torch.ones(1)), "scale_b is [1]"),
        ("torch xe _scaled_mm", swap(2, 3), "scale_a is"),
        ("torch xe _scaled_mm", put("out_dtype", torch.float16), "out_dtype = 'float16'"),
        ("torch xe _scaled_mm", put("bias", torch.zeros(64)), "bias is torch.float32"),
        ("torch gfx942 _scaled_mm", put(0, torch.zeros(32, 256).to(torch.float8_e4m3fn)), "e4m3fn"),
        ("torch gfx950 _scaled_mm", put("bias", torch.zeros(64, dtype=BF16)), "bias is given"),
        ("torch gfx950 _scaled_mm", put(2, lambda s: s[:32]), "scale_a.numel()"),
        ("torch gfx950 _scaled_mm", put(0, lambda x: x[:31]), "M % 16 == 0"),
        (
            "torch gfx950 _scaled_mm",
            put(2, lambda s: s.view(torch.uint8)),
            "scale_a is torch.uint8",
        ),
        ("torch gfx950 _int_mm", put(0, lambda x: x[:16]), "M > 16"),
        ("torch gfx950 _int_mm", put(1, lambda w: w.contiguous()), "does not hold"),
        ("torch gfx950 _int_mm", put(0, lambda x: x.byte()), "self is torch.uint8"),
        ("aiter gfx950 gemm_a4w4", put("bias", torch.zeros(64)), "bias is given"),
        ("aiter gfx950 gemm_a4w4", put("bpreshuffle", False), "bpreshuffle = False"),
        ("aiter gfx950 gemm_a4w4", put(1, by_columns), "contiguous"),
        ("aiter gfx950 gemm_a4w4", swap(1, 2), "B is torch.float8_e8m0fnu"),
        ("aiter gfx950 gemm_a4w4", put(2, lambda s: s[:32]), "A_scale is [32, 8]"),
        ("aiter gfx950 gemm_a4w4", put("dtype", torch.float32), "dtype = 'float32'"),
    ],
)
def test_a_wrong_gemm_fails_and_says_why(name: str, change: Any, said: str) -> None:
    library, where, operator = name.split()
    args, kwargs = gemm_calls()[name]
    change(args, kwargs)
    with pytest.raises(WrongCall) as raised:
        Recorder(library, where).bind(operator, tuple(args), kwargs)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["_scaled_mm", "_int_mm"])
def test_the_records_of_torch_are_those_of_the_installed_one(name: str) -> None:
    recorded = torch._C.parse_schema(Recorder("torch", "xe").table[name]["schema"])
    installed = getattr(torch.ops.aten, name).default._schema
    assert str(recorded) == str(installed).removeprefix("aten::")


def test_an_operator_of_a_later_architecture_is_not_offered() -> None:
    args, kwargs = right_calls()["npu_quant_matmul mxfp8"]
    with pytest.raises(WrongCall, match="on ascend910b"):
        call("npu_quant_matmul", args, kwargs, "ascend910b")


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.toml")), ids=lambda p: p.stem)
def test_every_record_has_its_source_and_names_arguments_of_its_schema(path: Any) -> None:
    table = tomllib.loads(path.read_text("utf-8"))
    for name, row in table.items():
        if name == "constants":
            continue
        assert row["source"]
        schema = torch._C.parse_schema(row["schema"])
        assert schema.name == name
        known = {a.name for a in schema.arguments}
        for case in row["case"]:
            named = {*case.get("dtypes", ()), *case.get("values", ()), *case.get("shapes", ())}
            assert named <= known, case["name"]
