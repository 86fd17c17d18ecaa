"""The class-conditioned diffusers pipeline that turns digits into 8x8 pictures."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    QwenImageTransformer2DModel,
)
from diffusers.utils.torch_utils import randn_tensor

NUM_DIGITS = 10
IMAGE_SIZE = 8
PATCH_SIZE = 2
GRID = IMAGE_SIZE // PATCH_SIZE
OUTPUT_TYPES = ("np", "pt", "pil")


def patchify(images: torch.Tensor) -> torch.Tensor:
    """Cut pictures `[n, 8, 8]` into patch tokens `[n, 16, 4]`, as `QwenImagePipeline` does."""
    patches = images.unflatten(2, (GRID, PATCH_SIZE)).unflatten(1, (GRID, PATCH_SIZE))
    return patches.transpose(2, 3).flatten(3).flatten(1, 2)


def unpatchify(tokens: torch.Tensor) -> torch.Tensor:
    """Put patch tokens `[n, 16, 4]` back together as pictures `[n, 8, 8]`."""
    patches = tokens.unflatten(2, (PATCH_SIZE, PATCH_SIZE)).unflatten(1, (GRID, GRID))
    return patches.transpose(2, 3).flatten(3).flatten(1, 2)


def encode_digits(digits: torch.Tensor) -> torch.Tensor:
    """Turn digits, int64 `[n]`, into one text token each: one-hot, float32 `[n, 1, 10]`."""
    return torch.nn.functional.one_hot(digits, NUM_DIGITS).float().unsqueeze(1)


class DigitsPipeline(DiffusionPipeline):
    """Draws handwritten digits with a small `QwenImageTransformer2DModel`.

    The transformer works on pixels, so there is no VAE; the digit itself takes the place of the
    prompt, so there is no text encoder.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def transformer_inputs(
        self, digits: Sequence[int], latents: torch.Tensor, sigma: torch.Tensor
    ) -> dict[str, Any]:
        """Return the transformer's keyword arguments for one step.

        Args:
            digits: the n digits to draw, each an int from 0 to 9.
            latents: noisy patch tokens `[n, 16, 4]`, any float dtype.
            sigma: the share of noise in them, a scalar tensor from 0 to 1.
        """
        device, dtype = latents.device, self.transformer.dtype
        classes = torch.tensor(digits, dtype=torch.int64, device=device)
        return {
            "hidden_states": latents.to(dtype),
            "encoder_hidden_states": encode_digits(classes).to(dtype),
            "timestep": sigma.to(device, dtype).expand(len(classes)),
            "img_shapes": [[(1, GRID, GRID)]] * len(classes),
            "return_dict": False,
        }

    @torch.no_grad()
    def __call__(
        self,
        digits: Sequence[int],
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for each of `digits`.

        Args:
            digits: the n digits to draw, each an int from 0 to 9.
            num_inference_steps: Euler steps from noise to picture, at least 1.
            generator: source of the starting noise; a list holds one for each picture.
            output_type: "np" or "pt" for a float32 array or tensor `[n, 8, 8]`, 0 (paper) to
                1 (ink); "pil" for a list of n greyscale pictures.
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": latents})`
                after each step, as in every diffusers pipeline; the latents it returns are used.
        """
        _check_digits(digits)
        _check_options(num_inference_steps, output_type)
        if isinstance(generator, list) and len(generator) != len(digits):
            raise ValueError(
                f"generator is a list of {len(generator)}, but {len(digits)} digits were asked "
                f"for: give one generator per digit, or a single one for all"
            )
        device = self._execution_device

        # Float32 between steps: BF16 would round away most of a small Euler step.
        shape = (len(digits), GRID * GRID, PATCH_SIZE**2)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        # The default schedule spends its last step between sigma 0.001 and 0.
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)

        with self.progress_bar(total=num_inference_steps) as progress:
            for step, t in enumerate(self.scheduler.timesteps):
                sigma = t / self.scheduler.config.num_train_timesteps
                velocity = self.transformer(**self.transformer_inputs(digits, latents, sigma))[0]
                latents = self.scheduler.step(velocity.float(), t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, step, t, {"latents": latents})["latents"]
                progress.update()

        images = _to_output((unpatchify(latents) / 2 + 0.5).clamp(0, 1), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _check_digits(digits: Sequence[int]) -> None:
    if not isinstance(digits, (list, tuple)):
        raise TypeError(
            f"digits must be a list of ints, such as [3] or [0, 1, 2]; got {digits!r} of type "
            f"{type(digits).__name__}"
        )
    if not digits:
        raise ValueError("digits is empty: name at least one digit to draw, such as [3]")
    for index, digit in enumerate(digits):
        if isinstance(digit, bool) or not isinstance(digit, (int, np.integer)):
            raise TypeError(
                f"digits[{index}] must be an int from 0 to 9; got {digit!r} of type "
                f"{type(digit).__name__}"
            )
        if not 0 <= digit < NUM_DIGITS:
            raise ValueError(
                f"digits[{index}] is {digit}, but the model only knows 0 to {NUM_DIGITS - 1}; "
                f"ask for one picture per digit, such as [4, 2] for 42"
            )


def _check_options(num_inference_steps: int, output_type: str) -> None:
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
        raise TypeError(
            f"num_inference_steps must be an int, such as 20; got {num_inference_steps!r} of type "
            f"{type(num_inference_steps).__name__}"
        )
    if num_inference_steps < 1:
        raise ValueError(
            f"num_inference_steps must be at least 1, got {num_inference_steps}; 20 draws well"
        )
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}"
        )


def _to_output(
    images: torch.Tensor, output_type: str
) -> torch.Tensor | np.ndarray | list[PIL.Image.Image]:
    """Convert float32 `[n, 8, 8]` in 0 to 1 to the output type asked for."""
    if output_type == "pt":
        return images
    array = images.cpu().numpy()
    if output_type == "np":
        return array
    return [PIL.Image.fromarray(picture) for picture in (array * 255).round().astype("uint8")]
