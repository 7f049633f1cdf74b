"""A text-to-video pipeline small enough for tests: a Latte transformer in pixel space, five-word captions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from pab_fx.demo.clips import COLOURS, DIRECTIONS, SHAPES

VOCABULARY = ("a", "moving", *COLOURS, *SHAPES, *DIRECTIONS)
MAX_WORDS = 5


def encode_caption(caption: str) -> torch.Tensor:
    """Turn a caption into one one-hot vector per word.

    Args:
        caption: At most `MAX_WORDS` words of `VOCABULARY`. The empty caption is the null of classifier-free
            guidance.

    Returns:
        `[MAX_WORDS, len(VOCABULARY)]` float32; rows without a word are zero.

    Raises:
        ValueError: If there are too many words or unknown ones.
    """
    words = caption.lower().split()
    unknown = sorted(set(words) - set(VOCABULARY))
    if unknown:
        raise ValueError(f"unknown words {unknown} in {caption!r}; the vocabulary is {', '.join(VOCABULARY)}")
    if len(words) > MAX_WORDS:
        raise ValueError(f"{caption!r} has {len(words)} words, at most {MAX_WORDS} are possible")
    embeds = torch.zeros(MAX_WORDS, len(VOCABULARY))
    for position, word in enumerate(words):
        embeds[position, VOCABULARY.index(word)] = 1.0
    return embeds


@dataclass
class ClipPipelineOutput(BaseOutput):
    """Output of `ClipPipeline`.

    Args:
        frames: By `output_type`:
            `"np"`: array `[B, F, H, W, 3]` float32 in [0, 1];
            `"pt"`: tensor `[B, F, 3, H, W]` in [0, 1];
            `"pil"`: a list of B lists of F images;
            `"latent"`: tensor `[B, 3, F, H, W]` as denoised, in [-1, 1].
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]


class ClipPipeline(DiffusionPipeline):
    """Text-to-video in pixel space: diffusers' `LattePipeline` without text encoder and VAE.

    Args:
        transformer ([`LatteTransformer3DModel`]): Denoises clips `[B, 3, F, H, W]`, given one-hot words.
        scheduler ([`DDIMScheduler`]): With the prediction type that the transformer was trained for.

    Example:

    ```python
    >>> from pab_fx.demo import load_pipeline
    >>> pipe = load_pipeline()
    >>> frames = pipe("a red circle moving left", generator=torch.Generator().manual_seed(0)).frames[0]
    ```
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    transformer: Any  # diffusers annotates a model's config and a scheduler's timesteps too narrowly
    scheduler: Any

    def __init__(self, transformer: LatteTransformer3DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.video_processor = VideoProcessor(vae_scale_factor=1)
        self._guidance_scale = 1.0
        self._guidance_rescale = 0.0
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

    def encode_prompt(self, prompt: list[str], num_videos_per_prompt: int = 1) -> torch.Tensor:
        """One-hot words `[B, MAX_WORDS, len(VOCABULARY)]` in the transformer's dtype, B clips."""
        embeds = torch.stack([encode_caption(p) for p in prompt])
        embeds = embeds.repeat_interleave(num_videos_per_prompt, dim=0)
        return embeds.to(self._execution_device, self.transformer.dtype)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Initial noise `[B, 3, F, H, W]`, drawn unless given."""
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.video_length, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}")
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, self.transformer.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        latents = latents.to(self._execution_device, self.transformer.dtype)
        return latents * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.25,
        guidance_rescale: float = 1.0,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ClipPipelineOutput | tuple:
        """Generate clips.

        Args:
            prompt: Captions such as `"a red circle moving left"`, made of the words in `VOCABULARY`.
            negative_prompt: What to guide away from; nothing (the null caption) by default.
            num_inference_steps: Denoising steps.
            guidance_scale: Weight of classifier-free guidance; off at 1 and below, and then half as much is
                computed.
            guidance_rescale: How far the guided prediction is brought back to the standard deviation of the
                unguided one, 0 to 1 (arXiv 2305.08891, section 3.4). Sampling starts in pure noise, where
                guidance without it overshoots until the motion is lost.
            num_videos_per_prompt: Clips for each prompt, next to each other in the output.
            eta: DDIM's eta; 0 is deterministic given the initial noise.
            generator: Source of the initial noise; a list has one for each clip.
            latents: Initial noise `[B, 3, F, H, W]` in place of drawn one.
            output_type: `"np"`, `"pt"`, `"pil"` or `"latent"`.
            return_dict: Whether to return a `ClipPipelineOutput` rather than a tuple.
            callback_on_step_end: Called after each step with the pipeline, the step's index, its timestep and
                a dict of the tensors named in `callback_on_step_end_tensor_inputs`; what the dict it returns
                holds replaces them.
            callback_on_step_end_tensor_inputs: Some of `"latents"` and `"prompt_embeds"`.

        Returns:
            `ClipPipelineOutput`, or a tuple with the frames if `return_dict` is false.

        Raises:
            ValueError: If a prompt has unknown words, or if numbers of prompts, generators and latents don't
                agree.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompts)
        self._check_inputs(prompts, negatives, output_type, callback_on_step_end_tensor_inputs)
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._current_timestep = None
        self._interrupt = False

        prompt_embeds = self.encode_prompt(prompts, num_videos_per_prompt)
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([self.encode_prompt(negatives, num_videos_per_prompt), prompt_embeds])
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(len(prompts) * num_videos_per_prompt, generator, latents)
        accepted = inspect.signature(self.scheduler.step).parameters  # not every scheduler has an eta
        extra_step_kwargs = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                prediction = self._predict(latents, t, prompt_embeds)
                latents = self.scheduler.step(prediction, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    given = {k: tensors[k] for k in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, given) or {}
                    latents = returned.pop("latents", latents)
                    prompt_embeds = returned.pop("prompt_embeds", prompt_embeds)
                progress_bar.update()

        self._current_timestep = None
        frames = latents
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ClipPipelineOutput(frames=frames) if return_dict else (frames,)

    def _predict(self, latents: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """One guided call of the transformer: `[B, 3, F, H, W]` in the scheduler's prediction type."""
        model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
        model_input = self.scheduler.scale_model_input(model_input, t)
        prediction = self.transformer(
            hidden_states=model_input,
            encoder_hidden_states=prompt_embeds,
            timestep=t[None].to(model_input.device).expand(model_input.shape[0]),
            enable_temporal_attentions=True,
            return_dict=False,
        )[0]
        if self.do_classifier_free_guidance:
            uncond, cond = prediction.chunk(2)
            guided = uncond + self.guidance_scale * (cond - uncond)
            ratio = cond.std(dim=(1, 2, 3, 4), keepdim=True) / guided.std(dim=(1, 2, 3, 4), keepdim=True)
            prediction = guided * torch.lerp(torch.ones_like(ratio), ratio, self._guidance_rescale)
        return prediction

    def _check_inputs(
        self,
        prompts: list[str],
        negatives: list[str],
        output_type: str,
        callback_tensor_inputs: Sequence[str],
    ) -> None:
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of 'np', 'pt', 'pil', 'latent'")
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can have {self._callback_tensor_inputs}, not {sorted(unknown)}")
