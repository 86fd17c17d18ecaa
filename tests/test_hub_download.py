"""A hub id: the arguments of a load reach the download, which brings what is read and no more."""

from __future__ import annotations

import json
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fake_hub import HUB_ID, Hub
from tiny_pipelines import save_text_to_image

import omniq_compile as omniq
from omniq_compile import CheckpointError, OptionError
from omniq_compile.cli import main
from omniq_compile.lowering.quantized_tensor import QuantizedTensor
from omniq_compile.models.random_models import random_model
from omniq_compile.quality.tune_state import fingerprint

pytest.importorskip("transformers")
OPTIONS = {"method": "int8", "min_features": 32}

# What a repository has beside what a load reads.
BESIDE = (
    "flux1.safetensors", "README.md", "sample.png", "transformer/diffusion_pytorch_model.bin",
    "transformer/flax_model.msgpack", "text_encoder/pytorch_model.bin", "vae/model.onnx",
    "vae/comfy/model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_text_to_image(tmp_path_factory.mktemp("repository") / "t2i")
    for name in BESIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"none of this is read")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    shutil.copytree(repository, tmp_path / "remote")
    hub = Hub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)  # where no folder is named like the repository
    return hub


def triple(file: Path) -> None:
    """Write a variant of a file of weights that can be told from it."""
    tensors = {k: t * 3 for k, t in safetensors.torch.load_file(file).items()}
    variant = file.with_name(f"{file.stem}.fp16.safetensors")
    safetensors.torch.save_file(tensors, variant, {"format": "pt"})


@pytest.mark.parametrize("load", [omniq.from_pretrained, omniq.load_model])
def test_arguments_reach_every_download(hub: Hub, load: Any) -> None:
    given = {
        "revision": "refs/pr/3", "token": "hf_secret", "cache_dir": "elsewhere",
        "force_download": True, "local_files_only": False,
    }  # fmt: skip
    how = {"quantization": OPTIONS} if load is omniq.from_pretrained else {"options": OPTIONS}
    load(HUB_ID, **how, **given)
    assert len(hub.calls) > 1
    assert all(call == given for call in hub.calls)


def test_nothing_is_passed_on_that_was_not_given(hub: Hub) -> None:
    omniq.load_model(HUB_ID, options=OPTIONS)
    assert hub.calls
    assert not any(hub.calls)


def test_a_pipeline_is_downloaded_once(hub: Hub) -> None:
    pipe = omniq.from_pretrained(HUB_ID, OPTIONS)
    assert any(isinstance(p, QuantizedTensor) for p in pipe.transformer.parameters())
    everything = {p.relative_to(hub.files).as_posix() for p in hub.files.rglob("*") if p.is_file()}
    assert hub.downloaded() == everything - (set(BESIDE) - {"README.md"})


def test_a_variant_is_downloaded_where_there_is_one(hub: Hub) -> None:
    weights = "diffusion_pytorch_model"
    for name in ("transformer", "vae"):
        triple(hub.files / name / f"{weights}.safetensors")
    expected = safetensors.torch.load_file(hub.files / f"vae/{weights}.fp16.safetensors")
    pipe = omniq.from_pretrained(HUB_ID, OPTIONS, variant="fp16")
    for name in ("transformer", "vae"):
        assert hub.downloaded(name) == {"config.json", f"{weights}.fp16.safetensors"}
    assert "model.safetensors" in hub.downloaded("text_encoder")
    bias = "decoder.conv_in.bias"
    assert torch.equal(pipe.vae.state_dict()[bias], expected[bias])


@pytest.mark.parametrize("load", [omniq.from_pretrained, omniq.load_model])
def test_a_variant_that_nothing_has(hub: Hub, load: Any) -> None:
    how = {"quantization": OPTIONS} if load is omniq.from_pretrained else {"options": OPTIONS}
    with pytest.raises(CheckpointError, match=r"no weights of .* are of variant 'bf16'"):
        load(HUB_ID, **how, variant="bf16")
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_weights_of_a_component_that_is_given_are_not_downloaded(hub: Hub) -> None:
    pipe = omniq.from_pretrained(HUB_ID, OPTIONS, text_encoder=None, tokenizer=None)
    assert pipe.text_encoder is None
    assert "model.safetensors" not in hub.downloaded("text_encoder")
    shutil.rmtree(hub.cache)
    again = omniq.from_pretrained(HUB_ID, OPTIONS, transformer=pipe.transformer)
    assert again.transformer is pipe.transformer
    assert hub.downloaded("transformer") == {"config.json"}


def test_weights_that_only_pickle_reads_are_left_to_diffusers(hub: Hub) -> None:
    vae = hub.files / "vae"
    file = vae / "diffusion_pytorch_model.safetensors"
    expected = safetensors.torch.load_file(file)
    torch.save(expected, file.with_suffix(".bin"))
    torch.save({}, vae / "diffusion_pytorch_model.fp16.bin")
    for safe in vae.rglob("*.safetensors"):
        safe.unlink()
    pipe = omniq.from_pretrained(HUB_ID, OPTIONS)
    assert hub.downloaded("vae") == {"config.json", "diffusion_pytorch_model.bin"}
    bias = "decoder.conv_in.bias"
    assert torch.equal(pipe.vae.state_dict()[bias], expected[bias])
    file.with_suffix(".bin").rename(hub.files / "transformer" / "diffusion_pytorch_model.bin")
    for safe in (hub.files / "transformer").rglob("*.safetensors"):
        safe.unlink()
    shutil.rmtree(hub.cache)
    with pytest.raises(CheckpointError, match="which only pickle reads, and omniq never does"):
        omniq.load_model(HUB_ID, options=OPTIONS)


@pytest.mark.parametrize("subfolder", [None, "transformer", "v1.0"])
def test_of_a_pipeline_one_model_is_downloaded(hub: Hub, subfolder: str | None) -> None:
    name = subfolder or "transformer"
    (hub.files / "transformer").rename(hub.files / name)
    model = omniq.load_model(HUB_ID, options=OPTIONS, subfolder=subfolder)
    assert type(model).__name__ == "AuraFlowTransformer2DModel"
    files = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert hub.downloaded(name) == files
    assert hub.downloaded() - {f"{name}/{file}" for file in files} <= {"model_index.json"}


def test_a_folder_that_the_repository_has_not(hub: Hub) -> None:
    words = rf"{HUB_ID} has no folder 'transfomer'\. Did you mean 'transformer'\?"
    with pytest.raises(CheckpointError, match=words):
        omniq.load_model(HUB_ID, options=OPTIONS, subfolder="transfomer")
    hub.files = hub.files / "transformer"
    with pytest.raises(CheckpointError, match=rf"{HUB_ID} has no folder 'unet'\.$"):
        omniq.load_model(HUB_ID, options=OPTIONS, subfolder="unet")


def test_a_model_alone_in_its_repository(hub: Hub) -> None:
    hub.files = hub.files / "transformer"
    (hub.files / "examples").mkdir()
    (hub.files / "examples" / "lora.safetensors").write_bytes(b"")
    omniq.load_model(HUB_ID, options=OPTIONS)
    assert hub.downloaded() == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_file_of_another_name_is_found(hub: Hub) -> None:
    folder = hub.files / "transformer"
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "own_name.safetensors")
    omniq.load_model(HUB_ID, options=OPTIONS)
    assert hub.downloaded("transformer") == {"config.json", "own_name.safetensors"}


def test_what_omniq_saved_is_downloaded(hub: Hub) -> None:
    method = json.dumps({"transformer": OPTIONS, "text_encoder": OPTIONS})
    command = ["quantize", str(hub.files), "--quantization", method, "--out"]
    assert main([*command, str(hub.files.with_name("quantized"))]) == 0
    hub.files = hub.files.with_name("quantized")
    pipe = omniq.from_pretrained(HUB_ID)
    assert "omniq_model.safetensors" in hub.downloaded("text_encoder")
    for model in (pipe.transformer, pipe.text_encoder):
        assert any(isinstance(p, QuantizedTensor) for p in model.parameters())


def test_without_a_network_the_cache_is_taken_as_it_is(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be downloaded: nothing is cached"):
        omniq.from_pretrained(HUB_ID, OPTIONS, local_files_only=True)
    omniq.from_pretrained(HUB_ID, OPTIONS)
    (hub.cache / "README.md").unlink()  # as diffusers' own download leaves it
    hub.files = hub.files / "nowhere"
    pipe = omniq.from_pretrained(HUB_ID, OPTIONS, local_files_only=True)
    assert any(isinstance(p, QuantizedTensor) for p in pipe.transformer.parameters())
    shutil.rmtree(hub.cache / "transformer")
    with pytest.raises(CheckpointError, match=r"transformer/config\.json is missing"):
        omniq.from_pretrained(HUB_ID, OPTIONS, local_files_only=True)


def test_a_repository_that_changes_meanwhile(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def moving(*arguments: Any, **given: Any) -> str:
        place = Path(hub.snapshot_download(*arguments, **given))
        return str(place.rename(place.with_name(f"commit{len(hub.calls)}")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", moving)
    with pytest.raises(CheckpointError, match="was changed on the hub while it was downloaded"):
        omniq.load_model(HUB_ID, options=OPTIONS)


def test_a_misnamed_argument_is_refused_before_a_download(hub: Hub) -> None:
    with pytest.raises(OptionError, match=r"'revison'\. Did you mean 'revision'\?"):
        omniq.load_model(HUB_ID, options=OPTIONS, revison="main")
    assert hub.calls == []
    with pytest.raises(OptionError, match=r"'revison' .*Did you mean 'revision'\?"):
        omniq.from_pretrained(HUB_ID, OPTIONS, revison="main")
    with pytest.raises(OptionError, match=r"'transfomer'\. Did you mean 'transformer'\?"):
        omniq.from_pretrained(HUB_ID, {"transfomer": "int8"})
    assert hub.downloaded() == {"model_index.json"}


def test_a_command_checks_arguments_before_weights_are_downloaded(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", HUB_ID, "--quantization", "int8", "--out", "x.png"]
    assert main([*command, "--argument", "promt=1"]) == 2
    assert "Did you mean 'prompt'" in capsys.readouterr().err
    assert hub.downloaded() == {"model_index.json"}


@pytest.mark.parametrize("model", ["pipeline", "transformer"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("int9", "unknown method 'int9'"),
        ({"transfomer": "int8"}, "Did you mean 'transformer'?"),
        ({"method": "int8", "matmul": True}, "option 'matmul' shapes no weight"),
        ("int8", "out exists already"),
    ],
)
def test_quantize_checks_what_it_is_told_before_weights_are_downloaded(
    hub: Hub, model: str, options: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if model == "transformer":
        hub.files = hub.files / "transformer"
        words = words.replace("Did you mean 'transformer'?", "is one model, not a pipeline")
    Path("out").mkdir()
    Path("out", "a").touch()
    given = options if isinstance(options, str) else json.dumps(options)
    assert main(["quantize", HUB_ID, "--quantization", given, "--out", "out"]) == 2
    assert words in capsys.readouterr().err
    assert {Path(name).name for name in hub.downloaded()} <= {"config.json", "model_index.json"}


TOKEN = "hf_SecretOfSomebody"
SMALL = ["--seeds", "0", "--steps", "2", "--prompt", "a red fox", "--argument", "height=32",
         "width=32", "--compiler", "eager"]  # fmt: skip
COMMANDS = {
    "generate": ["--quantization", json.dumps({"transformer": OPTIONS}), "--eager",
                 *SMALL[2:-2], "--out", "x.png"],
    "quantize": ["--quantization", json.dumps({"transformer": OPTIONS}), "--out", "made"],
    "compare": ["--quantization", json.dumps({"transformer": OPTIONS}), *SMALL, "--out", "made"],
    "tune": ["--method", "int8", "--min-features", "32", "--target-psnr", "1", *SMALL,
             "--measurements", "1", "--calls", "1", "--out", "made"],
}  # fmt: skip


def everything_written(folder: Path) -> str:
    return "".join(f.read_bytes().decode("latin-1") for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.zoo] if c == "tune" else []) for c in COMMANDS],
)
def test_a_commands_revision_and_token_reach_every_download(
    hub: Hub,
    command: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command in ("compare", "tune"):
        pytest.importorskip("skimage")
        # What was downloaded is not another thing compiled, which takes most of the time.
        monkeypatch.setattr("omniq_compile.quality.comparison.compile_component", lambda *_: None)
    told = ["--revision", "refs/pr/3", "--token", TOKEN]
    assert main([command, HUB_ID, *COMMANDS[command], *told]) in (0, 1)
    assert len(hub.calls) > 1
    assert all(call == {"revision": "refs/pr/3", "token": TOKEN} for call in hub.calls)
    printed = capfd.readouterr()
    written = everything_written(tmp_path)
    assert TOKEN not in printed.out + printed.err + written
    if command in ("compare", "tune"):
        assert '"revision": "refs/pr/3"' in written


def test_tune_does_not_go_on_from_another_commit(hub: Hub) -> None:
    before = fingerprint(HUB_ID, {"token": TOKEN})
    assert fingerprint(HUB_ID, {}) == before
    assert hub.downloaded() == {"model_index.json"}
    hub.cache = hub.cache.rename(hub.cache.with_name("another commit"))
    assert fingerprint(HUB_ID, {}) != before


@pytest.mark.parametrize("command", ["plan", "dump"])
def test_a_model_on_the_hub_is_shown_without_its_weights(
    hub: Hub, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformer = random_model("FluxTransformer2DModel", "tiny", num_blocks=1)
    shutil.rmtree(hub.files / "transformer")
    transformer.save_pretrained(hub.files / "transformer")
    index = json.loads((hub.files / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (hub.files / "model_index.json").write_text(json.dumps(index))
    options = ["--method", "int8", "--min-features", "1", "--token", TOKEN, "--revision", "v1"]
    if command == "plan":
        options += ["--height", "64", "--width", "64", "--text-tokens", "8"]
    assert main([command, HUB_ID, *options]) == 0
    printed = capsys.readouterr()
    assert "transformer_blocks" in printed.out
    assert TOKEN not in printed.out + printed.err
    assert hub.calls == [{"revision": "v1", "token": TOKEN}]
    assert {Path(name).name for name in hub.downloaded()} == {"config.json", "model_index.json"}


@pytest.mark.parametrize("command", [*COMMANDS, "plan", "dump"])
def test_a_path_that_is_misspelt_is_still_hinted_at(
    hub: Hub, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none_found(repo_id: str, **given: Any) -> str:
        raise FileNotFoundError(f"no repository\n {repo_id}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", none_found)
    Path("models/flux").mkdir(parents=True)
    assert main([command, "models/fluxx", *COMMANDS.get(command, ["--method", "int8"])]) == 2
    error = capsys.readouterr().err
    assert "cannot be downloaded: no repository models/fluxx" in error
    assert "Did you mean 'models/flux'?" in error


@pytest.mark.parametrize("load", [omniq.from_pretrained, omniq.load_model])
def test_what_a_library_says_of_a_token_is_told_without_it(
    hub: Hub, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(repo_id: str, *, token: str, **given: Any) -> str:
        raise ValueError(f"Illegal header value b'Bearer {token}'")  # as httpx has it

    monkeypatch.setattr("huggingface_hub.snapshot_download", refusing)
    how = {"quantization": OPTIONS} if load is omniq.from_pretrained else {"options": OPTIONS}
    with pytest.raises(CheckpointError, match="Illegal header value b'Bearer <token>'") as info:
        load(HUB_ID, **how, token=TOKEN)
    assert TOKEN not in "".join(traceback.format_exception(info.value))


@pytest.mark.parametrize("command", [*COMMANDS, "plan", "dump"])
def test_tokens_and_revisions_that_are_none(
    hub: Hub, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = COMMANDS.get(command, ["--method", "int8"])
    for given, words in (
        (["--token", ""], "--token: is empty"),
        (["--tokn", TOKEN], "unrecognized arguments: --tokn hf_..."),
    ):
        with pytest.raises(SystemExit):
            main([command, HUB_ID, *options, *given])
        error = capsys.readouterr().err
        assert words in error
        assert TOKEN not in error
    assert main([command, str(hub.files), *options, "--revision", "main"]) == 2
    assert f"of a hub id, such as Qwen/Qwen-Image, and {hub.files} is none" in (
        capsys.readouterr().err
    )
    assert hub.calls == []
