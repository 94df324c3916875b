"""Qwen3-VL: weights, tokenizer, prompts and pixels against transformers' own classes and numbers worked out by hand."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration

from copd_engine.models.qwen3_vl import Qwen3VLPromptEncoder
from copd_engine.testbed.model import SPECIAL, build_tokenizer
from copd_engine.types import EncodedPrompt, UserError
from tests import model_inputs
from tests.helpers import prompts_of_all_domains, response_of
from tests.model_inputs import example, image, packed_logp, text_prompt_encoder, video
from tests.plain import plain_logp

PATCH, MERGE = 4, 2  # of the testbed's model: one token per 8 x 8 pixels

model = model_inputs.model


@pytest.fixture(scope="module")
def encoder(model) -> Qwen3VLPromptEncoder:
    return model[1]


# Policy


@pytest.mark.parametrize("auto", [Qwen3VLForConditionalGeneration, AutoModelForImageTextToText])
def test_saved_weights_load_in_plain_transformers_with_the_same_logits(model, tmp_path, auto):
    policy, encoder = model
    policy.save(tmp_path)
    plain = auto.from_pretrained(tmp_path).eval()
    assert plain.config._attn_implementation == "sdpa"  # ours is not written into the config
    for prompt in prompts_of_all_domains(encoder, 1):
        response = response_of(encoder, prompt)
        torch.testing.assert_close(
            packed_logp(policy, encoder, prompt, response), plain_logp(plain, prompt, response), atol=1e-5, rtol=1e-5
        )


# Tokenizer


def test_the_vocabulary_has_384_tokens(encoder):
    tokenizer = encoder.tokenizer
    assert len(tokenizer) == tokenizer.vocab_size == 384
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(len(SPECIAL)))
    assert tokenizer.convert_ids_to_tokens(encoder.end_token_id) == "<|im_end|>"
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


@given(st.text(string.printable, max_size=60).filter(lambda text: "<|" not in text))
def test_decoding_undoes_encoding(text):
    encoder = text_prompt_encoder()
    assert encoder.decode(encoder.tokenizer(text)["input_ids"]) == text


def test_all_printable_ascii_survives_and_special_tokens_vanish(encoder):
    ids = encoder.tokenizer(string.printable)["input_ids"]
    assert encoder.decode(ids) == string.printable
    special = encoder.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert encoder.decode([*special, *ids, *special]) == string.printable


def test_every_digit_is_a_token_of_its_own(encoder):
    assert [encoder.decode([i]) for i in encoder.tokenizer("8+10=2#0")["input_ids"]] == list("8+10=2#0")


# Prompts with images and videos


def text_of(encoder, prompt: EncodedPrompt) -> str:
    return encoder.tokenizer.decode(prompt.input_ids_T)


def turn(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def pads(count: int, kind: str = "image") -> str:
    return f"<|vision_start|>{f'<|{kind}_pad|>' * count}<|vision_end|>"


def test_markers_say_where_images_stand(encoder):
    small, large = image(8, 8), image(16, 24)  # 1 and 2 x 3 tokens
    prompt = encoder.encode(example("Is <image> in <image>?", [small, large]))
    assert text_of(encoder, prompt) == turn(f"Is {pads(1)} in {pads(6)}?")
    assert prompt.image_grid_thw.tolist() == [[1, 2, 2], [1, 4, 6]]
    prompt = encoder.encode(example("Is <image> in <image>?", [large, small]))
    assert text_of(encoder, prompt) == turn(f"Is {pads(6)} in {pads(1)}?")
    assert prompt.image_grid_thw.tolist() == [[1, 4, 6], [1, 2, 2]]


def test_media_without_markers_stand_in_front(encoder):
    prompt = encoder.encode(example("What?", [image(8, 8), image(16, 16)]))
    assert text_of(encoder, prompt) == turn(f"{pads(1)}{pads(4)}What?")
    prompt = encoder.encode(example("<image>What?", [image(8, 8)]))
    assert text_of(encoder, prompt) == turn(f"{pads(1)}What?")


def test_videos_carry_times_and_one_block_per_two_frames(encoder):
    at_2 = encoder.encode(example("Look: <video>!", videos=[video(4)]))
    times = "".join(f"<{t} seconds>{pads(4, 'video')}" for t in ("0.2", "1.2"))  # (0 + .5) / 2 and (1 + 1.5) / 2
    assert text_of(encoder, at_2) == turn(f"Look: {times}!")
    assert at_2.video_grid_thw.tolist() == [[2, 4, 4]]
    at_half = encoder.encode(example("<video>", videos=[video(4)], fps=0.5))
    assert "<1.0 seconds>" in text_of(encoder, at_half)
    assert "<5.0 seconds>" in text_of(encoder, at_half)


def test_a_prompt_may_hold_an_image_and_a_video(encoder):
    prompt = encoder.encode(example("<video> or <image>?", [image(8, 8)], [video(2, 8, 8)]))
    assert text_of(encoder, prompt) == turn(f"<0.2 seconds>{pads(1, 'video')} or {pads(1)}?")


@pytest.mark.parametrize(
    ("prompt", "num_images", "num_videos", "message"),
    [
        ("<image><image>", 1, 0, r"'row-7' has 2 <image> markers for 1 file\(s\)"),
        ("<image>", 0, 0, r"has 1 <image> markers for 0 file\(s\)"),
        ("a <video> b", 1, 0, r"has 1 <video> markers for 0 file\(s\)"),
        ("<video><video>", 0, 1, r"has 2 <video> markers for 1 file\(s\)"),
        ("a <|image_pad|> b", 0, 0, r"'row-7' contains <\|image_pad\|>"),
        ("a <|video_pad|> b", 1, 0, r"'row-7' contains <\|video_pad\|>"),
    ],
)
def test_prompts_that_do_not_fit_their_files(encoder, prompt, num_images, num_videos, message):
    with pytest.raises(UserError, match=message):
        encoder.encode(example(prompt, [image()] * num_images, [video()] * num_videos))


def test_media_that_the_processor_refuses(encoder):
    with pytest.raises(UserError, match="'row-7' cannot be encoded"):
        encoder.encode(example("x", videos=[video(frames=1)]))
    with pytest.raises(UserError, match="'row-7' cannot be encoded: absolute aspect ratio"):
        encoder.encode(example("x", [image(8, 8 * 201)]))


def positions_by_hand(encoder, prompt: EncodedPrompt) -> tuple[list[list[int]], int]:
    """Text counts up in all three rows; pixels from p on stand at time p, row p + i, column p + j; then p + max."""
    if prompt.image_grid_thw is not None:
        blocks = [(h // MERGE, w // MERGE) for _, h, w in prompt.image_grid_thw.tolist()]
    elif prompt.video_grid_thw is not None:
        blocks = [(h // MERGE, w // MERGE) for t, h, w in prompt.video_grid_thw.tolist() for _ in range(t)]
    else:
        blocks = []
    ids, rows, position, at = prompt.input_ids_T.tolist(), [], 0, 0
    while at < len(ids):
        if ids[at] not in encoder.visual_token_ids:
            rows.append([position] * 3)
            position, at = position + 1, at + 1
            continue
        height, width = blocks.pop(0)
        rows += [[position, position + i, position + j] for i in range(height) for j in range(width)]
        position, at = position + max(height, width), at + height * width
    assert not blocks
    return [list(column) for column in zip(*rows, strict=True)], position


@pytest.mark.parametrize(
    "row",
    [
        example("no pictures"),
        example("a <image> b", [image(16, 40)]),
        example("<image> then <image>", [image(24, 8), image(8, 8)]),
        example("a <video> b", videos=[video(6, 8, 24)]),
    ],
    ids=["text", "image", "two images", "video"],
)
def test_positions_by_hand(encoder, row):
    prompt = encoder.encode(row)
    expected, following = positions_by_hand(encoder, prompt)
    assert prompt.position_ids_3T.tolist() == expected
    assert prompt.next_position == following


def patches_by_hand(frames: np.ndarray) -> np.ndarray:
    """``[frames, height, width, 3]`` uint8 -> one row per patch, in the order in which 2 x 2 patches become a token."""
    values = (frames.astype(np.float64) / 255 - 0.5) / 0.5
    side = PATCH * MERGE
    rows = []
    for time in range(0, len(values), 2):
        for token_y in range(values.shape[1] // side):
            for token_x in range(values.shape[2] // side):
                for patch_y in range(MERGE):
                    for patch_x in range(MERGE):
                        y, x = token_y * side + patch_y * PATCH, token_x * side + patch_x * PATCH
                        block = values[time : time + 2, y : y + PATCH, x : x + PATCH]  # [2, 4, 4, 3]
                        rows.append(block.transpose(3, 0, 1, 2).ravel())  # channel, time, y, x
    return np.stack(rows)


def test_patches_of_an_image_by_hand(encoder):
    picture = image(16, 24)
    prompt = encoder.encode(example("<image>", [picture]))
    frames = np.stack([np.asarray(picture)] * 2)  # an image is a video of two equal frames
    np.testing.assert_allclose(prompt.pixel_values.numpy(), patches_by_hand(frames), atol=1e-6)


@pytest.mark.parametrize("num_frames", [2, 5, 6])
def test_patches_of_a_video_by_hand(encoder, num_frames):
    frames = video(num_frames, 24, 16)
    prompt = encoder.encode(example("<video>", videos=[frames]))
    if num_frames % 2:  # the last frame once more
        frames = np.concatenate([frames, frames[-1:]])
    assert prompt.video_grid_thw.tolist() == [[len(frames) // 2, 6, 4]]
    assert prompt.pixel_values_videos.dtype == torch.float32
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), patches_by_hand(frames), atol=1e-6)


def test_two_videos_of_different_sizes_keep_their_order(encoder):
    first, second = video(4, 16, 16, 1), video(2, 8, 24, 2)
    prompt = encoder.encode(example("<video><video>", videos=[first, second]))
    assert prompt.video_grid_thw.tolist() == [[2, 4, 4], [1, 2, 6]]
    expected = np.concatenate([patches_by_hand(first), patches_by_hand(second)])
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), expected, atol=1e-6)


def test_videos_are_resized_to_whole_tokens_like_pil_does(encoder):
    """20 x 28 becomes 16 x 32 (round(2.5) is 2, round(3.5) is 4), bicubic with antialias, up to two grey levels.

    PIL also cuts at black and white between its two passes, so that is tested apart.
    """
    extreme = encoder.encode(example("<video>", videos=[video(2, 20, 28) // 128 * 255])).pixel_values_videos
    assert extreme.aminmax() == (-1.0, 1.0)
    frames = 64 + video(2, 20, 28) // 2
    prompt = encoder.encode(example("<video>", videos=[frames]))
    assert prompt.video_grid_thw.tolist() == [[1, 4, 8]]
    resized = np.stack([np.asarray(Image.fromarray(f).resize((32, 16), Image.Resampling.BICUBIC)) for f in frames])
    np.testing.assert_allclose(prompt.pixel_values_videos.numpy(), patches_by_hand(resized), atol=2.1 * 2 / 255)


def test_grey_videos_become_three_equal_channels(encoder):
    grey = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    rgb = encoder.processor.video_processor.convert_to_rgb(grey)
    assert rgb.shape == (2, 3, 3, 4)
    assert all(torch.equal(rgb[:, c], grey[:, 0]) for c in range(3))
    assert encoder.processor.video_processor.convert_to_rgb(rgb) is rgb
