"""`omniq plan`: a model's sites, work and memory without a weight, against models that run."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import omniq_compile as omniq
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.lowering.target import Target
from omniq_compile.models.families import FAMILIES, preset_config, transformer_class
from omniq_compile.models.random_models import make_inputs, random_model
from omniq_compile.passes.config import QuantConfig
from omniq_compile.planning import folded_trace
from omniq_compile.planning.meta_run import run_on_meta, to_meta
from omniq_compile.planning.plan import Plan, plan_model
from omniq_compile.reports import report

CONFIGS = Path(__file__).parent / "configs"
TARGET = "cpu:generic"
# Lowered to one operator for each: the decisions are what is compared, and lowering takes longer.
FEW_OPERATORS = "npu:ascend950"
FAMILY_NAMES = sorted(FAMILIES)


def planned(
    model: nn.Module, inputs: dict[str, Any], target: str = TARGET, **options: Any
) -> tuple[Plan, list[Any]]:
    """Plan for a model that has values, by a copy that has none."""
    empty = copy.deepcopy(model).to("meta")
    config = QuantConfig.from_options({"min_features": 1, **options})
    plan, sites = plan_model(empty, to_meta(inputs), config, Target.parse(target))
    return plan, [report._site(0, site) for site in sites]


def family(name: str, num_blocks: int = 3) -> tuple[nn.Module, dict[str, Any]]:
    model = random_model(name, width=128, num_blocks=num_blocks)
    return model, make_inputs(model, image_tokens=36, text_tokens=10)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_plan_has_the_sites_of_a_whole_trace(name: str) -> None:
    model, inputs = family(name)
    # A whole trace of Z-Image has graph breaks, in which leading blocks cannot be counted.
    leading = 0 if name == "ZImageTransformer2DModel" else 2
    options = {
        "method": "mxfp4_dualscale",
        "num_bf16_fallback_layers": leading,
        "ignored_layers": ["re:.*(blocks|layers)\\.2\\..*(to_k|k_proj).*", "norm_out"],
        "min_features": 1,
    }
    expected = omniq.explain(model, inputs, options, target=FEW_OPERATORS, stages=())
    plan, sites = planned(model, inputs, FEW_OPERATORS, **options)
    assert sites == [dataclasses.replace(site, graph=0) for site in expected.sites]
    reasons = {site.decision.reason for site in sites}
    assert any("leading blocks" in reason for reason in reasons) == bool(leading)
    assert any("ignored by" in reason for reason in reasons)
    quantized = [row for row in plan.rows if row.method]
    assert sum(row.bytes_before for row in quantized) == expected.weight_bytes_before
    assert sum(row.bytes_after for row in quantized) == expected.weight_bytes_after
    assert sum(row.count for row in plan.rows) == len(expected.sites)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_work_and_weights_are_those_of_a_model_that_runs(name: str) -> None:
    model, inputs = family(name, num_blocks=2)
    counter = FlopCounterMode(display=False)
    # The plain kernel is made of products that PyTorch's own counter knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    plan, _ = planned(model, inputs, method="int8")
    assert plan.flops == counter.get_total_flops()
    assert plan.attention_flops > 0
    assert plan.weight_bytes_before == stored(model)
    omniq.quantize_(model, {"method": "int8", "min_features": 1})
    assert plan.weight_bytes_after == stored(model)


VARIANTS = [
    ("QwenImageTransformer2DModel", {"use_additional_t_cond": True, "use_layer3d_rope": True}),
    ("QwenImageTransformer2DModel", {"zero_cond_t": True}),
    ("WanTransformer3DModel", {"image_dim": 64, "added_kv_proj_dim": 128}),
    (
        "WanTransformer3DModel",
        {"image_dim": 64, "added_kv_proj_dim": 128, "pos_embed_seq_len": 514},
    ),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_configuration_gets_the_inputs_that_it_wants(name: str, settings: dict[str, Any]) -> None:
    config = preset_config(name, "tiny", width=128) | settings
    model = transformer_class(name).from_config(config).bfloat16().eval()
    inputs = make_inputs(model, image_tokens=36, text_tokens=512)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    plan, _ = planned(model, inputs, method="int8")
    assert plan.flops == counter.get_total_flops()
    # No layer is left out, which would be weights that a load quantizes and a plan does not.
    assert all(row.M for row in plan.rows)
    omniq.quantize_(model, {"method": "int8", "min_features": 1})
    assert plan.weight_bytes_after == stored(model)


def test_inputs_that_a_model_refuses_are_an_error() -> None:
    class Wants(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            if y is None:
                raise ValueError("y must be provided")
            return x + y

    with pytest.raises(OmniqError, match=r"Wants refused the inputs .* y must be provided"):
        run_on_meta(Wants(), {"x": torch.empty(2, device="meta")}, {})


def stored(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the classes of the modules that are traced from here on."""
    traced: list[str] = []
    original = folded_trace.run_traced

    def spy(module: nn.Module, *rest: Any) -> None:
        traced.append(type(module).__name__)
        original(module, *rest)

    monkeypatch.setattr(folded_trace, "run_traced", spy)
    return traced


def test_each_kind_of_block_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = spied(monkeypatch)
    model, inputs = family("ZImageTransformer2DModel")
    planned(model, inputs, method="int8")
    # Refiners of noise (with modulation) and of text (without), and layers over both.
    assert sorted(traced) == ["ZImageTransformer2DModel", *["ZImageTransformerBlock"] * 3]


class Block(nn.Module):
    """Runs its layers in one of two ways that no parameter shows."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.up, self.down, self.twice = nn.Linear(64, 96), nn.Linear(96, 64), twice

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.down(self.up(x).relu())
        return x + self.down(self.up(x)) if self.twice else x


class Pair(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), "not a tensor"


class Tower(nn.Module):
    def __init__(self, blocks: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.first, self.blocks, self.order = nn.Linear(38, 64), nn.ModuleList(blocks), order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for i in self.order:
            out = self.blocks[i](x)
            x = out[0] if isinstance(out, tuple) else out
        return x @ x.transpose(-1, -2)


@pytest.mark.parametrize(
    ("blocks", "order"),
    [
        ([Block(False), Block(True), Block(False)], [0, 1, 2]),
        ([Block(False), Block(False)], [1, 0]),
        ([Block(False), Block(False)], [0, 0, 1]),  # a block called twice
        ([Pair(False), Pair(False)], [0, 1]),  # a result that is no tensor
    ],
)
def test_blocks_that_differ_are_not_taken_for_one_another(
    blocks: list[nn.Module], order: list[int]
) -> None:
    model, x = Tower(blocks, order).requires_grad_(False), torch.randn(3, 7, 38)
    options = {"method": "fp8", "min_features": 1, "ignored_layers": ["blocks.1.down"]}
    expected = omniq.explain(model, {"x": x}, options, target=TARGET)
    assert planned(model, {"x": x}, **options)[1] == expected.sites


class Nested(nn.Module):
    """Hands its blocks tensors in containers, and gets some back."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(NestedBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = (self.angles(x), x)
        for block in self.blocks:
            x, (_, x) = block({"x": x}, pair)
        return x


class NestedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: dict[str, torch.Tensor], pair: tuple[torch.Tensor, ...]) -> Any:
        out = self.layer(x["x"] * pair[0])
        return out, (pair[1], out + x["x"])


def test_blocks_that_take_and_return_containers_are_traced_once_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Nested().requires_grad_(False), torch.randn(3, 7, 64)
    expected = omniq.explain(model, {"x": x}, {"method": "int8", "min_features": 1}, target=TARGET)
    traced = spied(monkeypatch)
    assert planned(model, {"x": x}, method="int8")[1] == expected.sites
    assert [site.layer for site in expected.sites] == ["angles", "blocks.0.layer", "blocks.1.layer"]
    assert sorted(traced) == ["Nested", "NestedBlock"]


class Fused(nn.Module):
    """Reads one parameter of q, k and v in slices, the last one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 3 * 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv.weight.chunk(3)
        mixed = nn.functional.linear(x, q) * nn.functional.linear(x, k)
        return self.out(mixed + nn.functional.linear(x, v) * nn.functional.linear(mixed, v))


def test_slices_of_a_parameter_are_counted_each_and_once() -> None:
    model, x = Fused().requires_grad_(False), torch.randn(3, 7, 64)
    plan, sites = planned(model, {"x": x}, method="int8")
    assert [site.weight for site in sites] == ["qkv.weight"] * 4 + ["out.weight"]
    assert sum(row.count for row in plan.rows) == 5
    before = model.qkv.weight.nbytes + model.out.weight.nbytes
    assert sum(row.bytes_before for row in plan.rows) == plan.weight_bytes_before == before
    omniq.quantize_(model, {"method": "int8", "min_features": 1})
    assert sum(row.bytes_after for row in plan.rows) == plan.weight_bytes_after == stored(model)


def test_the_peak_of_activations_is_what_is_alive_at_once() -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([x, x, x])  # 4 units alive
            y = y + 1  # 3 more before the old ones go: 6 beside the input
            del x
            return y[:1] * 2  # 1 more

    x = torch.randn(1, 256)
    run = run_on_meta(Chain(), {"x": x.to("meta")}, {})
    assert run.peak_bytes == 6 * x.nbytes


def test_memory_of_an_operator_that_ran_before_is_counted_again() -> None:
    class Repeats(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, two, three = x.tanh(), x.tanh(), x.t().tanh()  # 3 units alive
            assert (two.stride(), three.stride()) == (x.stride(), x.t().stride())
            assert x.double().tanh().dtype is torch.float64  # 4 more, beside the input
            return one.add_(two) + three.t()

    x = torch.randn(4, 256)
    run = run_on_meta(Repeats(), {"x": x.to("meta")}, {})
    assert run.peak_bytes == 8 * x.nbytes


def test_a_model_that_needs_values_is_an_error() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(OmniqError, match="Looks cannot run without values"):
        run_on_meta(Looks(), {"x": torch.ones(3, device="meta")}, {})


FULL_SIZE = {
    # Parameters as the models' cards round them, and the linear layers of their blocks and ends.
    "Qwen-Image/transformer": (20.4, 60 * 14 + 6),
    "Wan2.2-T2V-A14B/transformer": (14.3, 40 * 10 + 6),
    "Wan2.2-T2V-A14B/transformer_2": (14.3, 40 * 10 + 6),
    "Z-Image-Turbo/transformer": (6.15, 32 * 8 + 2 * 7 + 6),
    "FLUX.1-dev/transformer": (11.9, 19 * 14 + 38 * 6 + 10),
}
MEASURED = """
import sys
from omniq_compile.cli import main
from omniq_compile.memory import peak_rss
code = main(sys.argv[1:])
print("peak", peak_rss())
sys.exit(code)
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """Plan the five transformers in one process; returns the plans and its peak memory."""
    out = tmp_path_factory.mktemp("plan") / "plans.json"
    folders = sorted(str(path) for path in CONFIGS.iterdir())
    options = ["--method", "mxfp4_dualscale", "--target", "cuda:sm_100", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "plan", *folders, *options, "--out", str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    plans = json.loads(out.read_text())
    names = {str(Path(name).parent.relative_to(CONFIGS)): plan for name, plan in plans.items()}
    return names, int(done.stdout.split()[-1])


def test_full_size_models_are_planned_in_little_memory(
    full_size: tuple[dict[str, Any], int],
) -> None:
    plans, peak = full_size
    assert set(plans) == set(FULL_SIZE)
    assert peak < 2e9


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_have_the_published_sizes(
    name: str, full_size: tuple[dict[str, Any], int]
) -> None:
    plan, (billions, sites) = full_size[0][name], FULL_SIZE[name]
    assert round(plan["parameters"] / 1e9, 1) == round(billions, 1)
    assert sum(row["count"] for row in plan["rows"]) == sites
    queries = [row for row in plan["rows"] if re.search(r"att(n1?|ention)\.to_q$", row["kind"])]
    assert sum(row["count"] for row in queries if "leading" in row["reason"]) == 5
    assert plan["weight_bytes_after"] < 0.45 * plan["weight_bytes_before"]


def test_a_step_of_qwen_image_is_the_work_that_its_sizes_say(
    full_size: tuple[dict[str, Any], int],
) -> None:
    """A block: 8 projections of 3072 and two MLPs of 4 x 3072 over 4096 and 512 tokens."""
    plan = full_size[0]["Qwen-Image/transformer"]
    tokens, width = 4096 + 512, 3072
    linears = 60 * tokens * 2 * width**2 * (4 + 8)
    attention = 60 * 4 * tokens**2 * width
    assert plan["attention_flops"] == attention
    total = attention + plan["other_flops"] + sum(row["flops"] for row in plan["rows"])
    assert total == pytest.approx(linears + attention, rel=0.001)
