"""What the demo's two pipelines share: one-hot words, classifier-free guidance, the loop over steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

Callback = Callable[[Any, int, torch.Tensor, dict], dict]
"""Takes the pipeline, the step's number, its timestep and tensors by name; returns those to replace."""


def encode_words(caption: str, vocabulary: Sequence[str], most: int) -> torch.Tensor:
    """Turn a caption into one one-hot vector per word.

    Args:
        caption: At most `most` words of `vocabulary`. The empty caption is the null of classifier-free guidance.
        vocabulary: All words.
        most: The number of rows.

    Returns:
        `[most, len(vocabulary)]` float32; rows without a word are zero.

    Raises:
        ValueError: If there are too many words or unknown ones.
    """
    words = caption.lower().split()
    unknown = sorted(set(words) - set(vocabulary))
    if unknown:
        raise ValueError(f"unknown words {unknown} in {caption!r}; the vocabulary is {', '.join(vocabulary)}")
    if len(words) > most:
        raise ValueError(f"{caption!r} has {len(words)} words, at most {most} are possible")
    embeds = torch.zeros(most, len(vocabulary))
    for position, word in enumerate(words):
        embeds[position, vocabulary.index(word)] = 1.0
    return embeds


class CaptionPipeline(DiffusionPipeline, ABC):
    """A pipeline in pixel space without text encoder and VAE.

    A subclass says how captions are encoded (`encode_caption`), how noise is shaped (`latent_shape`), how the
    transformer is called (`_predict`), and what `__call__` takes and returns.

    Args:
        transformer: Denoises, given one-hot words.
        scheduler: With the prediction type that the transformer was trained for.
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    transformer: Any  # diffusers annotates a model's config and a scheduler's timesteps too narrowly
    scheduler: Any

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: torch.Tensor | None = None
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The step being denoised, on the scheduler's scale (0 to 1000); None outside a generation."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the remaining steps."""
        return self._interrupt

    @abstractmethod
    def encode_caption(self, caption: str) -> torch.Tensor:
        """One prompt as `[L, V]` float32."""

    @abstractmethod
    def latent_shape(self, batch_size: int) -> tuple[int, ...]:
        """Of the noise that a generation begins with."""

    @abstractmethod
    def _predict(self, latents: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """One guided call of the transformer: shaped as the latents, in the scheduler's prediction type."""

    def encode_prompt(self, prompt: list[str], per_prompt: int = 1) -> torch.Tensor:
        """Words `[B, L, V]` in the transformer's dtype, each prompt `per_prompt` times."""
        embeds = torch.stack([self.encode_caption(p) for p in prompt])
        embeds = embeds.repeat_interleave(per_prompt, dim=0)
        return embeds.to(self._execution_device, self.transformer.dtype)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Initial noise, shaped as `latent_shape` says, drawn unless given."""
        shape = self.latent_shape(batch_size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}")
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, self.transformer.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        latents = latents.to(self._execution_device, self.transformer.dtype)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching has none

    def _denoise(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None,
        per_prompt: int,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        callback: Callback | None,
        callback_tensors: Sequence[str],
        step_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Denoised latents; `step_kwargs` go to `scheduler.step`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompts)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can have {self._callback_tensor_inputs}, not {sorted(unknown)}")
        self._current_timestep = None
        self._interrupt = False

        prompt_embeds = self.encode_prompt(prompts, per_prompt)
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([self.encode_prompt(negatives, per_prompt), prompt_embeds])
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(len(prompts) * per_prompt, generator, latents)

        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                prediction = self._predict(latents, t, prompt_embeds)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    returned = callback(self, i, t, {k: tensors[k] for k in callback_tensors}) or {}
                    latents = returned.pop("latents", latents)
                    prompt_embeds = returned.pop("prompt_embeds", prompt_embeds)
                progress_bar.update()

        self._current_timestep = None
        return latents


def check_output_type(output_type: str) -> None:
    """Raise ValueError for what a pipeline cannot return, before it generates."""
    if output_type not in ("np", "pt", "pil", "latent"):
        raise ValueError(f"output_type {output_type!r} is none of 'np', 'pt', 'pil', 'latent'")
