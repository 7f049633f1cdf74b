"""A text-to-image pipeline small enough for tests: an SD3 transformer in pixel space, seven-word captions."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from pab_fx.demo.clips import COLOURS
from pab_fx.demo.pictures import DIGITS, RELATIONS
from pab_fx.demo.pipeline import Callback, CaptionPipeline, check_output_type, encode_words

VOCABULARY = ("a", *COLOURS, *DIGITS, *RELATIONS)
MAX_WORDS = 7


def encode_caption(caption: str) -> torch.Tensor:
    """Turn a caption into a vector per word: the word and its place, both one-hot.

    Joint attention does not know the order of its tokens, and here it matters which colour is whose.

    Args:
        caption: At most `MAX_WORDS` words of `VOCABULARY`. The empty caption is the null of classifier-free guidance.

    Returns:
        `[MAX_WORDS, len(VOCABULARY) + MAX_WORDS]` float32; rows without a word are zero.

    Raises:
        ValueError: If there are too many words or unknown ones.
    """
    words = encode_words(caption, VOCABULARY, MAX_WORDS)
    return torch.cat([words, torch.diag(words.sum(dim=1))], dim=1)


class PicturePipeline(CaptionPipeline):
    """Text-to-image in pixel space: diffusers' `StableDiffusion3Pipeline` without text encoders and VAE.

    Guidance is Stable Diffusion 3's: both predictions are made as one batch. The pooled text is the sum of the words.

    Args:
        transformer ([`SD3Transformer2DModel`]): Denoises pictures `[B, 3, H, W]`, given one-hot words.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): Flow matching, as the transformer was trained.

    Example:

    ```python
    >>> from pab_fx.demo import load_pipeline
    >>> pipe = load_pipeline("pictures")
    >>> image = pipe("a red three above a blue seven", generator=torch.Generator().manual_seed(0)).images[0]
    ```
    """

    def __init__(self, transformer: SD3Transformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__(transformer, scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def encode_caption(self, caption: str) -> torch.Tensor:
        """One prompt as `[MAX_WORDS, len(VOCABULARY) + MAX_WORDS]` float32."""
        return encode_caption(caption)

    def latent_shape(self, batch_size: int) -> tuple[int, ...]:
        """`[B, 3, H, W]`."""
        config = self.transformer.config
        return (batch_size, config.in_channels, config.sample_size, config.sample_size)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate pictures.

        Args:
            prompt: Captions such as `"a red three above a blue seven"`, made of the words in `VOCABULARY`.
            negative_prompt: What to guide away from; nothing (the null caption) by default.
            num_inference_steps: Denoising steps.
            guidance_scale: Weight of classifier-free guidance; off at 1 and below, and then half as much is computed.
            num_images_per_prompt: Pictures for each prompt, next to each other in the output.
            generator: Source of the initial noise; a list has one for each picture.
            latents: Initial noise `[B, 3, H, W]` in place of drawn one.
            output_type: `"np"` for `[B, H, W, 3]` float32 in [0, 1], `"pt"` for `[B, 3, H, W]`, `"pil"` for a list, or
                `"latent"` for `[B, 3, H, W]` as denoised, in [-1, 1].
            return_dict: Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called after each step with the pipeline, the step's index, its timestep and a dict of
                the tensors named in `callback_on_step_end_tensor_inputs`; what the dict it returns holds replaces them.
            callback_on_step_end_tensor_inputs: Some of `"latents"` and `"prompt_embeds"`.

        Returns:
            `ImagePipelineOutput`, or a tuple with the images if `return_dict` is false.

        Raises:
            ValueError: If a prompt has unknown words, or if numbers of prompts, generators and latents don't agree.
        """
        check_output_type(output_type)
        self._guidance_scale = guidance_scale
        images = self._denoise(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            num_inference_steps,
            generator,
            latents,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            step_kwargs={},
        )
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """One guided call of the transformer: the velocity `[B, 3, H, W]`."""
        model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
        velocity = self.transformer(
            hidden_states=model_input,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=prompt_embeds.sum(dim=1),
            timestep=t.to(model_input.device).expand(model_input.shape[0]),
            return_dict=False,
        )[0]
        if self.do_classifier_free_guidance:
            uncond, cond = velocity.chunk(2)
            velocity = uncond + self.guidance_scale * (cond - uncond)
        return velocity


# diffusers before 0.37 reads the components' classes off the signature, and cannot read them as text
PicturePipeline.__init__.__annotations__ = typing.get_type_hints(PicturePipeline.__init__)
