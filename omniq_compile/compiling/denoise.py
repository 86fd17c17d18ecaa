"""The denoising step that a model is called for: what ``w4a8_fallback_steps`` refers to."""

from __future__ import annotations

from contextvars import ContextVar, Token
from operator import index
from typing import Any, SupportsIndex

from omniq_compile.lowering.errors import OptionError

_current: ContextVar[int | None] = ContextVar("omniq_denoise_step", default=None)


class denoise_step:
    """Publish the zero-based denoising step of the calls inside.

    Alone, around each call of a transformer::

        for i, t in enumerate(timesteps):
            with omniq.denoise_step(i):
                transformer(...)

    Or around a diffusers pipeline, which reports the end of each step::

        with omniq.denoise_step(0) as step:
            pipe(..., callback_on_step_end=step)
    """

    def __init__(self, step: SupportsIndex) -> None:
        """Take the zero-based step.

        Raises:
            OptionError: it is not an integer of at least 0.
        """
        if isinstance(step, bool) or not isinstance(step, SupportsIndex) or index(step) < 0:
            raise OptionError(f"a denoising step is an integer of at least 0, not {step!r}.")
        self._step = index(step)
        self._tokens: list[Token[int | None]] = []

    def __enter__(self) -> denoise_step:
        self._tokens.append(_current.set(self._step))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._tokens.pop())

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Step on: what diffusers calls as ``callback_on_step_end``.

        After a pipeline's last step the next call begins anew, as for a second picture.
        """
        is_last = step + 1 == getattr(pipeline, "num_timesteps", None)
        _current.set(self._step if is_last else step + 1)
        return callback_kwargs


def current_step() -> int:
    """Return the published step.

    Raises:
        OptionError: none is published.
    """
    step = _current.get()
    if step is None:
        raise OptionError(
            "option 'w4a8_fallback_steps' is set, and no denoising step is published. Call the "
            "model inside `with omniq_compile.denoise_step(i):`, or a diffusers pipeline as "
            "`with omniq_compile.denoise_step(0) as step: pipe(..., callback_on_step_end=step)`."
        )
    return step
