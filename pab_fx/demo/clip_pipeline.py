"""A text-to-video pipeline small enough for tests: a Latte transformer in pixel space, five-word captions."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor

from pab_fx.demo.clips import COLOURS, DIRECTIONS, SHAPES
from pab_fx.demo.pipeline import Callback, CaptionPipeline, check_output_type, encode_words

VOCABULARY = ("a", "moving", *COLOURS, *SHAPES, *DIRECTIONS)
MAX_WORDS = 5


def encode_caption(caption: str) -> torch.Tensor:
    """Turn a caption into one one-hot vector per word, `[MAX_WORDS, len(VOCABULARY)]`: see `encode_words`."""
    return encode_words(caption, VOCABULARY, MAX_WORDS)


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


class ClipPipeline(CaptionPipeline):
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

    def __init__(self, transformer: LatteTransformer3DModel, scheduler: DDIMScheduler) -> None:
        super().__init__(transformer, scheduler)
        self.video_processor = VideoProcessor(vae_scale_factor=1)
        self._guidance_rescale = 0.0

    def encode_caption(self, caption: str) -> torch.Tensor:
        """One prompt as `[MAX_WORDS, len(VOCABULARY)]` float32."""
        return encode_caption(caption)

    def latent_shape(self, batch_size: int) -> tuple[int, ...]:
        """`[B, 3, F, H, W]`."""
        config = self.transformer.config
        return (batch_size, config.in_channels, config.video_length, config.sample_size, config.sample_size)

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
        callback_on_step_end: Callback | None = None,
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
        check_output_type(output_type)
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        accepted = inspect.signature(self.scheduler.step).parameters  # not every scheduler has an eta
        frames = self._denoise(
            prompt,
            negative_prompt,
            num_videos_per_prompt,
            num_inference_steps,
            generator,
            latents,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            step_kwargs={k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted},
        )
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(frames, output_type=output_type)
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


# diffusers before 0.37 reads the components' classes off the signature, and cannot read them as text
ClipPipeline.__init__.__annotations__ = typing.get_type_hints(ClipPipeline.__init__)
