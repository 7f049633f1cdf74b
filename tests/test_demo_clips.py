"""The demo: its clips, their recogniser, the pipeline, and what the trained weights can do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatteTransformer3DModel

from pab_fx.demo import CAPTIONS, VOCABULARY, WEIGHTS, Caption, ClipPipeline, draw, fit, load_pipeline, recognise
from pab_fx.demo.clip_pipeline import encode_caption
from pab_fx.demo.clips import FRAMES, SIZE


@pytest.fixture
def pipe() -> ClipPipeline:
    """Untrained and tiny; its scheduler predicts clips as the trained one does."""
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=4,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=len(VOCABULARY),
        video_length=4,
    )
    pipe = ClipPipeline(transformer, DDIMScheduler(prediction_type="sample"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("caption", CAPTIONS, ids=str)
def test_drawn_clips_are_recognised(caption: Caption) -> None:
    clips = [draw(caption, np.random.default_rng(seed)) for seed in range(3)]
    assert clips[0].shape == (FRAMES, SIZE, SIZE, 3)
    assert clips[0].dtype == np.float32
    assert all(np.abs(clip).max() <= 1 for clip in clips)
    assert [recognise(clip) for clip in clips] == [caption] * 3
    for scores in map(fit, clips):
        assert max(scores, key=scores.get) == caption.shape


def test_recognition_survives_noise() -> None:
    rng = np.random.default_rng(0)
    noisy = [(c, draw(c, rng) + 0.15 * rng.standard_normal((FRAMES, SIZE, SIZE, 3))) for c in CAPTIONS]
    assert np.mean([recognise(clip) == caption for caption, clip in noisy]) > 0.97


def test_a_clip_with_an_empty_frame_is_not_recognised() -> None:
    clip = draw(CAPTIONS[0], np.random.default_rng(0))
    clip[3] = -0.9
    assert recognise(clip) is None
    assert fit(clip) == {}


def test_captions_and_prompts_are_inverse() -> None:
    assert [Caption.parse(str(c)) for c in CAPTIONS] == list(CAPTIONS)
    assert len(set(CAPTIONS)) == 96
    for prompt in ("", "a red circle", "a red circle moving sideways", "the red circle moving left"):
        with pytest.raises(ValueError, match="moving left"):
            Caption.parse(prompt)


def test_unknown_words_raise_and_name_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"purple.*magenta"):
        encode_caption("a purple circle moving left")
    with pytest.raises(ValueError, match="6 words"):
        encode_caption("a a a a a a")
    assert encode_caption("").count_nonzero() == 0
    assert encode_caption("a red circle moving left").sum(dim=-1).tolist() == [1.0] * 5


def test_pipeline_output_types(pipe: ClipPipeline) -> None:
    common = {"prompt": ["a red circle moving left", "a cyan cross moving up"], "num_inference_steps": 2}
    frames = pipe(**common, generator=seeded()).frames
    assert frames.shape == (2, 4, 16, 16, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1
    latent = pipe(**common, generator=seeded(), output_type="latent", return_dict=False)[0]
    assert latent.shape == (2, 3, 4, 16, 16)
    np.testing.assert_allclose(frames, (latent / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy(), atol=1e-6)
    assert pipe(**common, generator=seeded(), output_type="pt").frames.shape == (2, 4, 3, 16, 16)
    assert pipe(**common, generator=seeded(), output_type="pil").frames[1][3].size == (16, 16)
    assert pipe(**common, num_videos_per_prompt=2).frames.shape[0] == 4


def test_same_generator_same_clip_whatever_the_batch(pipe: ClipPipeline) -> None:
    prompts = ["a red circle moving left", "a cyan cross moving up"]
    together = pipe(prompts, num_inference_steps=3, generator=[seeded(1), seeded(2)]).frames
    alone = pipe(prompts[1], num_inference_steps=3, generator=seeded(2)).frames
    np.testing.assert_allclose(together[1:], alone, atol=1e-5)
    latents = torch.randn(1, 3, 4, 16, 16, generator=seeded(2))
    np.testing.assert_array_equal(pipe(prompts[1], num_inference_steps=3, latents=latents).frames, alone)


def test_guidance_doubles_the_batch_and_null_is_the_empty_prompt(pipe: ClipPipeline) -> None:
    batches = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    guided = pipe("a red circle moving left", num_inference_steps=2, guidance_scale=3.0, generator=seeded()).frames
    empty = pipe("a red circle moving left", "", num_inference_steps=2, guidance_scale=3.0, generator=seeded()).frames
    plain = pipe("a red circle moving left", num_inference_steps=2, guidance_scale=1.0, generator=seeded()).frames
    assert batches == [2, 2, 2, 2, 1, 1]
    np.testing.assert_array_equal(guided, empty)
    assert np.abs(guided - plain).max() > 0


def test_callback_sees_the_current_timestep_and_can_interrupt(pipe: ClipPipeline) -> None:
    seen = []

    def after_step(pipeline: ClipPipeline, i: int, t: torch.Tensor, tensors: dict) -> dict:
        assert pipeline.current_timestep == t
        assert pipeline.num_timesteps == 5
        seen.append((i, tensors["latents"].shape))
        pipeline._interrupt = i == 1
        return tensors

    pipe("a red circle moving left", num_inference_steps=5, callback_on_step_end=after_step)
    assert seen == [(0, (1, 3, 4, 16, 16)), (1, (1, 3, 4, 16, 16))]
    assert pipe.current_timestep is None


def test_bad_arguments_raise(pipe: ClipPipeline) -> None:
    prompt = "a red circle moving left"
    with pytest.raises(ValueError, match="2 negative prompts for 1"):
        pipe(prompt, ["", ""])
    with pytest.raises(ValueError, match="output_type"):
        pipe(prompt, output_type="gif")
    with pytest.raises(ValueError, match="2 generators for a batch of 1"):
        pipe(prompt, generator=[seeded(), seeded()])
    with pytest.raises(ValueError, match="expected"):
        pipe(prompt, latents=torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match="callbacks can have"):
        pipe(prompt, callback_on_step_end_tensor_inputs=["timestep"])


def test_pipeline_survives_saving_and_loading(pipe: ClipPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = ClipPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    first, second = (
        p("a red circle moving left", num_inference_steps=2, generator=seeded()).frames for p in (pipe, loaded)
    )
    np.testing.assert_array_equal(first, second)


def test_trained_model_shows_what_the_caption_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = [CAPTIONS[i] for i in range(2, 96, 13)]  # 8 captions, each colour, shape and direction among them
    generators = [seeded(10_000 + i) for i in range(len(captions))]
    frames = pipe([str(c) for c in captions], num_inference_steps=25, generator=generators).frames
    assert sum(recognise(2 * clip - 1) == caption for clip, caption in zip(frames, captions, strict=True)) >= 7
    assert sum(file.stat().st_size for file in (WEIGHTS / "clips").rglob("*") if file.is_file()) < 8e6
