"""Train the digits transformer with flow matching and save it as a diffusers pipeline folder."""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from judge import Digits, held_out_accuracy, load_split, read_digits
from pipeline import pipeline as digits_pipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

FOLDER = Path(__file__).parent / "pipeline"

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
EMA_DECAY = 0.999
LOSS_WINDOW = 200
GENERATED_PER_DIGIT = 20


def build_transformer() -> QwenImageTransformer2DModel:
    """Build Qwen-Image's own architecture at width 128, 4 blocks: 4.9 MB of BF16 weights."""
    return QwenImageTransformer2DModel(
        patch_size=digits_pipeline.PATCH_SIZE,
        in_channels=digits_pipeline.PATCH_SIZE**2,
        out_channels=1,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=digits_pipeline.NUM_DIGITS,
        axes_dims_rope=(8, 12, 12),
    )


def flow_matching_loss(
    model: QwenImageTransformer2DModel, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared error of the velocity, at one random sigma per picture.

    Args:
        model: predicts `noise - tokens`, as `FlowMatchEulerDiscreteScheduler` expects.
        tokens: clean patch tokens, float32 `[n, 16, 4]` from -1 to 1.
        labels: digits, int64 `[n]`.
    """
    num = len(tokens)
    noise = torch.randn_like(tokens)
    # One sigma in each n-th of [0, 1]: a steadier loss than n independent draws.
    sigma = (torch.arange(num) + torch.rand(num)) / num
    mix = sigma[:, None, None]
    velocity = model(
        hidden_states=(1 - mix) * tokens + mix * noise,
        encoder_hidden_states=digits_pipeline.encode_digits(labels),
        timestep=sigma,
        img_shapes=[[(1, digits_pipeline.GRID, digits_pipeline.GRID)]] * num,
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(velocity, noise - tokens)


def to_tokens(digits: Digits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return patch tokens, float32 `[n, 16, 4]` from -1 to 1, and labels, int64 `[n]`."""
    images = torch.from_numpy(digits.images) * 2 - 1
    return digits_pipeline.patchify(images), torch.from_numpy(digits.labels)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return the linear warm-up, then the cosine down to zero, as a factor from 0 to 1."""
    warmup = min(WARMUP_STEPS, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def train(num_steps: int, seed: int, console: Console) -> tuple[QwenImageTransformer2DModel, float]:
    """Return the EMA model in float32 and its training loss over the last 200 steps."""
    torch.manual_seed(seed)
    tokens, labels = to_tokens(load_split()[0])
    model = build_transformer()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps)
    )
    losses: list[float] = []
    order = torch.randperm(len(tokens))
    with training_progress(console) as progress:
        task = progress.add_task("training", total=num_steps, loss="")
        for step in range(num_steps):
            if len(order) < BATCH_SIZE:
                order = torch.randperm(len(tokens))
            batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            loss = flow_matching_loss(model, tokens[batch], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            losses.append(loss.item())
            recent = losses[-LOSS_WINDOW:]
            mean_loss = sum(recent) / len(recent)
            progress.update(task, advance=1, loss=f"loss {mean_loss:.4f}")
            if not progress.console.is_terminal and step % 500 == 499:
                console.print(f"step {step + 1}: loss {mean_loss:.4f}")
    return averaged.module.eval(), mean_loss


def training_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
    )


def held_out_loss(model: QwenImageTransformer2DModel) -> float:
    """Return the flow-matching loss on the pictures held out of training."""
    torch.manual_seed(0)
    tokens, labels = to_tokens(load_split()[1])
    with torch.no_grad():
        return flow_matching_loss(model, tokens, labels).item()


def save(model: QwenImageTransformer2DModel, folder: Path) -> digits_pipeline.DigitsPipeline:
    """Write `folder` in BF16, for `DiffusionPipeline.from_pretrained`, and return what it holds."""
    pipe = digits_pipeline.DigitsPipeline(
        model.to(torch.bfloat16), FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    pipe.save_pretrained(folder)
    # save_pretrained does not record in which file of the folder the pipeline class is.
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text())
    index["_class_name"] = ["pipeline", "DigitsPipeline"]
    index_path.write_text(json.dumps(index, indent=2) + "\n")
    source = Path(digits_pipeline.__file__)
    if source.parent.resolve() != folder.resolve():
        shutil.copyfile(source, folder / source.name)
    return pipe


def share_read_right(pipe: digits_pipeline.DigitsPipeline, seed: int) -> float:
    """Return the share of 200 generated pictures read as the digit asked for, 0 to 1."""
    digits = [digit for digit in range(10) for _ in range(GENERATED_PER_DIGIT)]
    images = pipe(digits, generator=torch.Generator().manual_seed(seed)).images
    return float((read_digits(images) == digits).mean())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the pipeline folder to write")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    return args


def main() -> None:
    args = parse_args()
    console = Console()
    # One thread and deterministic kernels: the same seed gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    model, loss = train(args.steps, args.seed, console)
    minutes = (time.perf_counter() - start) / 60
    test_loss = held_out_loss(model)
    pipe = save(model, args.out)
    weights = args.out / "transformer" / "diffusion_pytorch_model.safetensors"
    console.print(f"trained {args.steps} steps in {minutes:.1f} min, wrote {args.out}")
    console.print(f"loss: {loss:.4f} in training, {test_loss:.4f} on held-out pictures")
    console.print(f"weights: {weights.stat().st_size:,} bytes in BF16")
    console.print(f"classifier on real held-out digits: {held_out_accuracy():.1%}")
    console.print(f"generated pictures read right: {share_read_right(pipe, args.seed):.1%}")


if __name__ == "__main__":
    main()
