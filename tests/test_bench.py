"""`omniq bench`, with variants that need no C++ compiler."""

import argparse
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from omniq_compile.benchmark import machine
from omniq_compile.benchmark.machine import environment, time_calls, to_device
from omniq_compile.benchmark.measure import Variant, default_variants, run_bench
from omniq_compile.benchmark.result import BASELINE, BenchConfig, BenchResult, Measurement
from omniq_compile.cli import bench
from omniq_compile.lowering.errors import OmniqError
from omniq_compile.memory import peak_of_call, peak_rss, state_bytes

SMALL = BenchConfig(width=64, image_tokens=16, text_tokens=8, rounds=2, dtype="float32")
OMNIQ_EAGER = {"method": "int8", "compiler": "eager", "min_features": 32}


def console():
    return Console(file=io.StringIO(), width=100)


def recording(name, log):
    def build(model, inputs):
        def call(**inputs):
            log.append(name)
            return model(**inputs)

        return call

    return Variant(name, build)


def failing(name, calls_before):
    def build(model, inputs):
        left = [calls_before]

        def call(**inputs):
            if not left[0]:
                raise ValueError("out of [luck]\n\nmuch advice")
            left[0] -= 1
            return model(**inputs)

        return call

    return Variant(name, build)


def omniq_eager(model, inputs):
    return torch.compile(model, backend="omniq", options=OMNIQ_EAGER)


def test_variants_take_turns():
    log = []
    result = run_bench(SMALL, console(), [recording(name, log) for name in "ABC"])
    assert log == [*"AABBCC", *"AABBCC" * 2]
    assert [len(m.seconds) for m in result.measurements] == [2, 2, 2]
    assert not result.failed


def test_variants_share_weights_and_inputs():
    variants = [
        Variant("eager", lambda model, inputs: model),
        Variant(BASELINE, lambda model, inputs: torch.compile(model, backend="eager")),
        Variant("omniq int8", omniq_eager),
    ]
    result = run_bench(SMALL, console(), variants)
    eager, base, omniq = result.measurements
    assert [m.error for m in result.measurements] == [None] * 3
    assert eager.error_to_eager == eager.error_to_float32 == 0
    assert base.error_to_eager < 1e-5
    assert 1e-4 < omniq.error_to_eager < 0.1
    assert omniq.weight_bytes == eager.weight_bytes
    assert omniq.quantized_bytes > 0
    assert base.quantized_bytes == 0
    assert result.lookups_per_call > 0
    assert result.lookup_seconds_per_call > 0
    assert result.notes == []


def test_omniq_that_rewrites_nothing_is_noted():
    result = run_bench(SMALL, console(), [Variant("omniq int8", lambda model, inputs: model)])
    assert "nothing was rewritten" in result.notes[0]


@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_failing_variant_is_reported_and_the_others_go_on(calls_before):
    log = []
    variants = [failing("bad", calls_before), recording(BASELINE, log)]
    screen = console()
    result = run_bench(SMALL, screen, variants)
    bad, good = result.measurements
    assert result.failed
    assert bad.error.startswith("ValueError: out of [luck]")
    assert "in call" in bad.traceback
    assert bad.median_seconds is None
    assert len(good.seconds) == 2
    assert result.speedups("bad") is None
    assert result.speedups(BASELINE) == (1, 1)
    bench.print_table(result, screen)
    assert "bad failed: ValueError: out of [luck]\n" in screen.file.getvalue()
    assert "advice" not in screen.file.getvalue()


def test_a_timing_is_the_mean_of_calls_in_a_row():
    log = []
    config = replace(SMALL, calls=3, settle=2)
    result = run_bench(config, console(), [recording(name, log) for name in "AB"])
    assert log == [*"AABB", *"AAAAABBBBB" * 2]
    assert result.environment["calls_before_timing"] == 2
    assert result.environment["calls_per_timing"] == 3
    assert [len(m.seconds) for m in result.measurements] == [2, 2]
    assert result.measurements[0].median_host_seconds is None


class Device:
    """A GPU's queue: the host asks for a call in ``host`` seconds, and it runs for ``device``."""

    def __init__(self, host, device):
        self.host, self.device = host, device
        self.now = self.free = 0.0

    def call(self):
        self.now += self.host
        self.free = max(self.free, self.now) + self.device

    def Event(self, enable_timing):
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", max(self.free, self.now))
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event


@pytest.mark.parametrize(("host", "device", "seconds"), [(0.2, 1.0, 1.0), (2.0, 1.0, 2.0)])
def test_a_gpu_is_timed_by_its_own_clock_behind_earlier_work(monkeypatch, host, device, seconds):
    gpu = Device(host, device)
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    gpu.call()
    timing = time_calls(gpu.call, torch.device("cuda"), 10)
    assert timing.seconds == pytest.approx(seconds)
    assert timing.host_seconds == pytest.approx(host)


def test_tensors_that_modules_hold_as_plain_attributes_move_too():
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].table = torch.ones(4, dtype=torch.complex64)
    assert to_device(model, torch.device("meta")) is model
    assert model[0].table.is_meta
    assert model[0].table.dtype is torch.complex64
    assert model[0].weight.is_meta


def test_calls_as_cuda_graphs_are_in_the_table_and_the_json():
    slow = Measurement(BASELINE, [1.0, 1.0], [0.1], graph_seconds=[0.012, 0.013, 0.014])
    fast = Measurement("omniq int8", [1.0, 1.0], [0.1], graph_seconds=[0.008, 0.0065, 0.004])
    waits = Measurement("torchao int8", [1.0, 1.0], [0.1], graph_error="it waits")
    where = environment(BenchConfig())
    result = BenchResult(BenchConfig(), where, [slow, fast, waits])
    assert result.graph_speedup("omniq int8") == 2.0
    assert result.graph_speedup("torchao int8") is None
    summary = json.loads(result.to_json())["summary"]
    assert summary["omniq int8"]["median_graph_seconds"] == 0.0065
    assert summary["omniq int8"]["graph_speedup"] == 2.0
    screen = Console(file=io.StringIO(), width=200)
    screen.print(bench._speed_table(result))
    bench.print_table(result, screen)
    assert "torchao int8 is no CUDA graph: it waits" in screen.file.getvalue()
    assert "as a graph" in screen.file.getvalue()
    assert "6.50 ms" in screen.file.getvalue()


def test_host_seconds_are_in_the_table_and_the_json():
    m = Measurement(BASELINE, [1.0, 1.0], host_seconds=[0.0011, 0.0013, 0.0099])
    result = BenchResult(SMALL, environment(SMALL), [m])
    assert json.loads(result.to_json())["summary"][BASELINE]["median_host_seconds"] == 0.0013
    screen = console()
    bench.print_table(result, screen)
    assert "1.30 ms" in screen.file.getvalue()
    m.host_seconds.clear()
    screen = console()
    bench.print_table(result, screen)
    assert "host" not in screen.file.getvalue()


def test_speedups_by_round_and_of_medians():
    base = Measurement(BASELINE, [1.0, 4.0, 3.0])
    other = Measurement("other", [1.0, 1.0, 2.0])
    result = BenchResult(SMALL, {}, [base, other])
    assert result.speedups("other") == (1.5, 3.0)


def test_json_round_trip():
    result = run_bench(SMALL, console(), [recording(BASELINE, []), failing("bad", 0)])
    assert BenchResult.from_json(result.to_json()) == result
    assert '"speedup_median_of_rounds": 1.0' in result.to_json()


def test_json_of_an_output_that_is_not_finite():
    """Which readers of JSON other than Python's refuse where it is written as a bare NaN."""
    other = Measurement("omniq int8", [1.0], error_to_eager=math.nan, error_to_float32=math.inf)
    result = BenchResult(SMALL, {}, [Measurement(BASELINE, [1.0]), other])

    def refuse(word: str) -> None:
        raise ValueError(word)

    written = json.loads(result.to_json(), parse_constant=refuse)
    assert written["measurements"][1]["error_to_eager"] == "NaN"
    read = BenchResult.from_json(result.to_json()).measurements[1]
    assert math.isnan(read.error_to_eager)
    assert read.error_to_float32 == math.inf


def parse(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_arguments_become_a_config():
    assert bench.config_from(parse()) == BenchConfig()
    config = bench.config_from(parse("--quick", "--rounds", "5", "--no-eager", "--no-torchao"))
    assert (config.width, config.image_tokens, config.text_tokens) == (256, 64, 16)
    assert (config.rounds, config.eager, config.torchao) == (5, False, False)
    assert [v.name for v in default_variants(config)[0]] == [BASELINE, "omniq int8"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "int9"], "unknown method 'int9'. Did you mean 'int8'?"),
        (["--dtype", "bfloat"], "Did you mean 'bfloat16'?"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--rounds", "0"], "rounds 0"),
        (["--image-tokens", "0"], "image_tokens 0: it must be at least 1"),
        (["--text-tokens", "-1"], "text_tokens -1: it must be at least 1"),
        (["--settle", "-1"], "settle -1: it must be at least 0"),
        (["--threads", "0"], "threads 0"),
        (["--threads", "99999999"], "threads 99999999: this machine has "),
        (["--seed", "99999999999999999999"], "seed 99999999999999999999: it must be from 0 to"),
        (["--calls", "0"], "calls 0"),
        (["--model", "QwenImage"], "Did you mean 'QwenImageTransformer2DModel'?"),
        (
            ["--json", "no/such/folder/x.json"],
            "--json: cannot write 'no/such/folder/x.json': No such file or directory.",
        ),
    ],
)
def test_arguments_that_cannot_be_measured(arguments, expected):
    with pytest.raises(OmniqError) as info:
        bench.run(parse(*arguments))
    assert expected in str(info.value)


@pytest.mark.parametrize(
    "given",
    [
        "--model QwenImageTransformer2DModel", "--width 64", "--blocks 1", "--image-tokens 9",
        "--text-tokens 9", "--rounds 5", "--warmup 1", "--settle 1", "--method int8",
        "--dtype float32", "--device cpu", "--threads 2", "--seed 0", "--no-eager", "--torchao",
        "--quick", "--json x.json",
    ],
)  # fmt: skip
def test_a_suite_refuses_the_options_of_one_model(given, monkeypatch):
    """Also where what is given is the default."""
    monkeypatch.setattr(bench, "run_command", lambda *arguments: 0)
    with pytest.raises(OmniqError) as info:
        bench.run(parse("--suite", "smoke", *given.split()))
    assert str(info.value).startswith(f"{given.split()[0]} is for one model")


def test_every_option_is_of_one_model_or_of_a_suite(monkeypatch):
    """None that is added later is ignored without a word."""
    monkeypatch.setattr(bench, "run_command", lambda *arguments: 0)
    assert (
        bench.run(parse("--suite", "smoke", "--case", "words", "--report", "x", "--jobs", "2")) == 0
    )
    of_a_suite = {"suite", "case", "variant", "report", "jobs"}
    names = {*BenchConfig.__dataclass_fields__, "quick", "json"}
    assert set(vars(parse())) - of_a_suite == names


@pytest.mark.parametrize(("calls_before", "code"), [(0, 1), (9, 0)])
def test_run_writes_json_and_returns_the_exit_code(tmp_path, monkeypatch, calls_before, code):
    variants = ([failing("only", calls_before)], ["a note"])
    monkeypatch.setattr("omniq_compile.benchmark.measure.default_variants", lambda config: variants)
    file = tmp_path / "result.json"
    arguments = parse("--quick", "--width", "64", "--dtype", "float32", "--json", str(file))
    assert bench.run(arguments) == code
    result = BenchResult.from_json(file.read_text())
    assert result.notes == ["a note"]
    assert result.failed == bool(code)


def test_state_bytes_of_a_subclass_are_those_inside_it():
    torchao = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    assert state_bytes(model) == 64 * 32 * 4
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    assert 64 * 32 <= state_bytes(model) < 64 * 32 * 1.5


def test_state_bytes_count_a_tied_weight_once():
    """As T5EncoderModel has `shared.weight` and `encoder.embed_tokens.weight`."""
    model = torch.nn.Sequential(torch.nn.Embedding(32, 64), torch.nn.Linear(64, 32, bias=False))
    assert state_bytes(model) == 2 * 64 * 32 * 4
    model[1].weight = model[0].weight
    assert state_bytes(model) == 64 * 32 * 4


def test_peak_of_call_sees_what_a_call_allocates():
    size = 256 << 20  # large beside what other tests left to be freed
    peak = peak_of_call(lambda: torch.ones(size, dtype=torch.uint8), torch.device("cpu"))
    assert peak is None or peak > 0.9 * size
    assert peak_rss() > size


def test_what_windows_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr("os.getloadavg")
    assert peak_rss() == 0
    assert environment(BenchConfig())["load_average"] == "unknown"


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    size = 1 << 30
    held = torch.ones(size, dtype=torch.uint8)
    code = "from omniq_compile.memory import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 26 < int(done.stdout) < held.numel()
