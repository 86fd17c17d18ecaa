"""What a benchmark was asked, and what it found: plain records that go to JSON and back."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from omniq_compile.lowering.errors import OptionError, unknown
from omniq_compile.lowering.target import ARCHITECTURES, TORCH_DEVICES
from omniq_compile.passes.config import QuantConfig
from omniq_compile.strict_json import to_json

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BASELINE = "Inductor"

# Those that omniq lowers for, by PyTorch's names; AMD's GPUs are cuda too.
DEVICES = tuple(dict.fromkeys(TORCH_DEVICES.get(name, name) for name in ARCHITECTURES))

# In a row, for one timing, and before it: a denoising loop calls block after block, in which the
# host gets ahead of a device that is the slower of the two.
ACCELERATOR_CALLS, ACCELERATOR_SETTLE = 10, 5


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; ``width`` None is the class's released width.

    ``warmup`` counts untimed calls once before all rounds, ``settle`` those before each timing,
    ``calls`` those in a row that one timing is the mean of: by default 1 and 1 on the CPU, and 5
    and 10 on an accelerator, which would wait for the host before a single one.

    Raises:
        OptionError: an unknown method or dtype, a number out of range, or a device that is absent.
    """

    model: str = "QwenImageTransformer2DModel"
    width: int | None = None
    blocks: int = 1
    image_tokens: int = 1024
    text_tokens: int = 128
    method: str = "int8"
    rounds: int = 7
    warmup: int = 1
    settle: int | None = None
    calls: int | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    eager: bool = True
    torchao: bool = True
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        QuantConfig.from_options({"method": self.method})  # before the others are measured
        if self.dtype not in DTYPES:
            raise OptionError(unknown("dtype", self.dtype, DTYPES))
        for name in (
            "image_tokens",
            "text_tokens",
            "rounds",
            "warmup",
            "settle",
            "threads",
            "calls",
        ):
            value, least = getattr(self, name), 0 if name in ("warmup", "settle") else 1
            if value is not None and value < least:
                raise OptionError(f"{name} {value}: it must be at least {least}")
        cores = os.cpu_count() or 1
        if self.threads is not None and self.threads > cores:
            # PyTorch takes any number, and the process dies where the system refuses a thread.
            raise OptionError(f"threads {self.threads}: this machine has {cores} CPU cores")
        if not 0 <= self.seed < 1 << 63:
            raise OptionError(f"seed {self.seed}: it must be from 0 to 2**63 - 1")
        if self.device not in DEVICES:
            raise OptionError(unknown("device", self.device, DEVICES))
        module = getattr(torch, self.device, None)  # torch.npu is there once torch_npu is
        if module is None or not module.is_available():
            raise OptionError(f"device {self.device!r}: this PyTorch sees none; use cpu")

    @property
    def calls_per_timing(self) -> int:
        """``calls``, or the default of the device."""
        return self.calls or (1 if self.device == "cpu" else ACCELERATOR_CALLS)

    @property
    def calls_before_timing(self) -> int:
        """``settle``, or the default of the device."""
        if self.settle is not None:
            return self.settle
        return 1 if self.device == "cpu" else ACCELERATOR_SETTLE


@dataclass
class Measurement:
    """What one variant did. Times are in seconds, memory in bytes.

    seconds are of one call, the mean of those of a timing; on a GPU they are the device's, and
    host_seconds those that the host takes to ask for one. Where the host is the slower of the two,
    or a call has more launches than the device queues (about 1000), both are about the same.
    graph_seconds are those of the device where the call is replayed as a CUDA graph, which takes
    the host next to no time; graph_error says why it cannot be.
    first_call_seconds holds compilation, and quantization of the weights. The errors are
    ||y - reference|| / ||reference|| over the whole output, in float32. weight_bytes is the
    module's own state, quantized_bytes what omniq keeps beside it. peak_call_bytes is the most
    that one warm call added to the memory in use; on the CPU that is a lower bound, since memory
    that the allocator had kept does not show. peak_rss_bytes is the process's highest resident
    memory by the end of the first call, with every variant before this one held.

    A variant that failed says why in `error`, and has no statistics.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    graph_seconds: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None
    error_to_float32: float | None = None
    error_to_eager: float | None = None
    weight_bytes: int | None = None
    quantized_bytes: int | None = None
    peak_call_bytes: int | None = None
    peak_rss_bytes: int | None = None
    graph_error: str | None = None
    error: str | None = None
    traceback: str | None = None

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and not self.error else None

    @property
    def median_host_seconds(self) -> float | None:
        return (
            statistics.median(self.host_seconds) if self.host_seconds and not self.error else None
        )

    @property
    def median_graph_seconds(self) -> float | None:
        return (
            statistics.median(self.graph_seconds) if self.graph_seconds and not self.error else None
        )

    @property
    def min_seconds(self) -> float | None:
        return min(self.seconds) if self.seconds and not self.error else None


@dataclass
class BenchResult:
    """All measurements of one run, in the order in which the variants took turns.

    The lookups are those of omniq's weights, and their seconds the time that they add to a round.
    """

    config: BenchConfig
    environment: dict[str, Any]
    measurements: list[Measurement]
    lookups_per_call: float = 0.0
    lookup_seconds_per_call: float = 0.0
    peak_rss_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether any variant failed."""
        return any(m.error for m in self.measurements)

    def speedups(self, name: str) -> tuple[float, float] | None:
        """Return how many times as fast as Inductor a variant is, or None where one has no times.

        Two ways: the median of the rounds' ratios, and the ratio of the medians.
        """
        by_name = {m.name: m for m in self.measurements}
        base, other = by_name.get(BASELINE), by_name[name]
        if base is None or base.median_seconds is None or other.median_seconds is None:
            return None
        by_round = [b / o for b, o in zip(base.seconds, other.seconds, strict=True)]
        return statistics.median(by_round), base.median_seconds / other.median_seconds

    def graph_speedup(self, name: str) -> float | None:
        """Return the median of the rounds' ratios where both calls are CUDA graphs, or None."""
        by_name = {m.name: m for m in self.measurements}
        base, other = by_name.get(BASELINE), by_name[name]
        if base is None or not base.graph_seconds or not other.graph_seconds or other.error:
            return None
        pairs = zip(base.graph_seconds, other.graph_seconds, strict=True)
        return statistics.median(b / o for b, o in pairs)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, and under "summary" the statistics that follow from it."""
        summary = {}
        for m in self.measurements:
            by_round, of_medians = self.speedups(m.name) or (None, None)
            summary[m.name] = {
                "median_seconds": m.median_seconds,
                "min_seconds": m.min_seconds,
                "median_host_seconds": m.median_host_seconds,
                "median_graph_seconds": m.median_graph_seconds,
                "graph_speedup": self.graph_speedup(m.name),
                "speedup_median_of_rounds": by_round,
                "speedup_of_medians": of_medians,
            }
        return {**asdict(self), "summary": summary}

    def to_json(self) -> str:
        """Return `as_dict` as JSON."""
        return to_json(self.as_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> BenchResult:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        data.pop("summary", None)
        data["config"] = BenchConfig(**data["config"])
        data["measurements"] = [Measurement(**m) for m in data["measurements"]]
        for m in data["measurements"]:
            for name in ("error_to_float32", "error_to_eager"):
                value = getattr(m, name)
                setattr(m, name, None if value is None else float(value))
        return cls(**data)
