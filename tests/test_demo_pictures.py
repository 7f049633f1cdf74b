"""The second model: its pictures, their judge, the pipeline, and what the trained weights can do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio

import pab_fx
from pab_fx import Blocks, Every, Policy, Residual
from pab_fx.demo import WEIGHTS, PicturePipeline, load_pipeline
from pab_fx.demo.clips import SIZE
from pab_fx.demo.picture_pipeline import MAX_WORDS, VOCABULARY, encode_caption
from pab_fx.demo.pictures import CAPTIONS, DIGITS, Caption, draw, overlap, recognise

PROMPT = "a red three above a blue seven"


@pytest.fixture(scope="module")
def pipe() -> PicturePipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pipe = load_pipeline("pictures")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe: PicturePipeline, captions: list[Caption], **kwargs: Any) -> np.ndarray:
    """`[N, SIZE, SIZE, 3]` in 0 to 1, each from a seed of its own."""
    generators = [seeded(10_000 + i) for i in range(len(captions))]
    return pipe([str(caption) for caption in captions], generator=generators, **kwargs).images


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CAPTIONS), st.integers(0, 2**32))
def test_the_judge_recognises_what_is_drawn(caption: Caption, seed: int) -> None:
    picture = draw(caption, np.random.default_rng(seed))
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.float32
    assert np.abs(picture).max() <= 1
    assert recognise(picture) == caption
    assert overlap(picture, caption) > 0.8


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(CAPTIONS), st.integers(0, 2**32))
def test_the_judge_survives_noise(caption: Caption, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert recognise(draw(caption, rng) + 0.1 * rng.standard_normal((SIZE, SIZE, 3))) == caption


def test_a_picture_of_one_digit_or_none_is_not_recognised() -> None:
    picture = draw(Caption.parse("a red three before a blue seven"), np.random.default_rng(0))
    picture[:, SIZE // 2 :] = -0.9
    for seen in (picture, np.full_like(picture, -0.9)):
        assert recognise(seen) is None
        assert overlap(seen, CAPTIONS[0]) == 0


def test_captions_and_prompts_are_inverse_and_a_few_differ_in_everything() -> None:
    assert [Caption.parse(str(c)) for c in CAPTIONS] == list(CAPTIONS)
    assert len(set(CAPTIONS)) == 6000
    assert {caption.first[1] for caption in CAPTIONS[:96]} == set(DIGITS)
    for prompt in ("", "a red three", "a red three under a blue seven", "a red three above a red seven"):
        with pytest.raises(ValueError, match="above a blue seven"):
            Caption.parse(prompt)


def test_an_encoded_caption_has_each_word_and_its_place() -> None:
    embeds = encode_caption(PROMPT)
    assert embeds.shape == (MAX_WORDS, len(VOCABULARY) + MAX_WORDS)
    assert [VOCABULARY[i] for i in embeds[:, : len(VOCABULARY)].argmax(dim=1)] == PROMPT.split()
    assert torch.equal(embeds[:, len(VOCABULARY) :], torch.eye(MAX_WORDS))
    assert encode_caption("").count_nonzero() == 0
    with pytest.raises(ValueError, match="purple"):
        encode_caption("a purple three above a blue seven")


def test_output_types(pipe: PicturePipeline) -> None:
    common: dict[str, Any] = {"prompt": [PROMPT, str(CAPTIONS[0])], "num_inference_steps": 2}
    images = pipe(**common, generator=seeded()).images
    assert images.shape == (2, SIZE, SIZE, 3)
    assert 0 <= images.min() <= images.max() <= 1
    latent = pipe(**common, generator=seeded(), output_type="latent", return_dict=False)[0]
    np.testing.assert_allclose(images, (latent / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert pipe(**common, generator=seeded(), output_type="pt").images.shape == (2, 3, SIZE, SIZE)
    assert pipe(**common, generator=seeded(), output_type="pil").images[1].size == (SIZE, SIZE)
    with pytest.raises(ValueError, match="output_type"):
        pipe(PROMPT, output_type="gif")


def test_the_same_seed_makes_the_same_picture_and_another_seed_another(pipe: PicturePipeline) -> None:
    first, again, other = (pipe(PROMPT, num_inference_steps=4, generator=seeded(s)).images for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_guidance_is_one_batch_with_the_empty_prompt(pipe: PicturePipeline) -> None:
    batches: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    guided, empty, plain = (
        pipe(PROMPT, negative, num_inference_steps=2, guidance_scale=scale, generator=seeded()).images
        for negative, scale in ((None, 3.0), ("", 3.0), (None, 1.0))
    )
    hook.remove()
    assert batches == [2, 2, 2, 2, 1, 1]
    np.testing.assert_array_equal(guided, empty)
    assert np.abs(guided - plain).max() > 0


def test_trained_pictures_show_what_their_captions_say(pipe: PicturePipeline) -> None:
    captions = list(CAPTIONS[:8])
    seen = [recognise(2 * picture - 1) for picture in sample(pipe, captions)]
    assert sum(a == b for a, b in zip(seen, captions, strict=True)) >= 7


def test_weights_are_below_4_mb_and_load_as_float32(pipe: PicturePipeline) -> None:
    assert sum(file.stat().st_size for file in (WEIGHTS / "pictures").rglob("*") if file.is_file()) < 4e6
    assert pipe.transformer.dtype == torch.float32


def test_a_policy_reuses_and_changes_the_pictures_a_little(pipe: PicturePipeline) -> None:
    captions = list(CAPTIONS[:2])
    without = sample(pipe, captions)
    policy = Policy(Blocks(), Every(2, warmup=1), Residual())
    with pab_fx.enable(pipe, policy, inner="eager") as pab:
        cached = sample(pipe, captions)
        (role,) = pab.report().roles
    assert 0.4 < role.reused / (role.reused + role.computed) < 0.5
    assert 25 < peak_signal_noise_ratio(without, cached, data_range=1.0) < 90


def test_an_unknown_pipeline_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'films', only clips, pictures"):
        load_pipeline("films")
